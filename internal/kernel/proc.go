package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// Proc is what /proc/PID/stat says about a process.
type Proc struct {
	State     byte // 'R', 'S', … ; 'Z' is a zombie: ended, not yet reaped
	Parent    int
	Session   int
	StartTime uint64 // clock ticks since boot; with the PID it names a process for this boot
}

// StatProc reads /proc/PID/stat. A process that does not exist is ErrGone.
func StatProc(pid int) (Proc, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return Proc{}, fmt.Errorf("pid %d: %w", pid, ErrGone)
	}
	if err != nil {
		return Proc{}, err
	}
	p, err := parseStat(string(data))
	if err != nil {
		return Proc{}, fmt.Errorf("read /proc/%d/stat: %w", pid, err)
	}
	return p, nil
}

// parseStat counts fields from the last ')': the command's name in front of it
// may hold anything, spaces and parentheses too.
func parseStat(line string) (Proc, error) {
	_, rest, ok := cutLast(line, ") ")
	if !ok {
		return Proc{}, fmt.Errorf("%q has no command name", line)
	}
	fields := strings.Fields(rest) // from field 3 on
	if len(fields) < 20 {
		return Proc{}, fmt.Errorf("%q has too few fields", line)
	}
	parent, err := strconv.Atoi(fields[1])
	if err != nil {
		return Proc{}, fmt.Errorf("parent: %w", err)
	}
	session, err := strconv.Atoi(fields[3])
	if err != nil {
		return Proc{}, fmt.Errorf("session: %w", err)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return Proc{}, fmt.Errorf("start time: %w", err)
	}
	return Proc{State: fields[0][0], Parent: parent, Session: session, StartTime: start}, nil
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// ProcStartTime is field 22 of /proc/PID/stat.
func ProcStartTime(pid int) (uint64, error) {
	p, err := StatProc(pid)
	return p.StartTime, err
}
