package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// How long a process may take to notice that its command is over, and how long
// saving a core may take, in an emulated machine.
const (
	endGrace  = 2 * time.Second
	coreGrace = time.Minute
)

// endRest waits for what a command has left running, and kills and names what
// does not end by itself: the next command starts on a clean machine.
func endRest() []string {
	rest := processes()
	for begun := time.Now(); len(rest) > 0; rest = processes() {
		limit := endGrace
		if strings.Contains(strings.Join(rest, "\n"), self+" core ") {
			limit = coreGrace
		}
		if time.Since(begun) > limit {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if len(rest) == 0 {
		return nil
	}
	for len(processes()) > 0 {
		_ = unix.Kill(-1, unix.SIGKILL) // it may have ended meanwhile
		time.Sleep(10 * time.Millisecond)
	}
	return rest
}

// processes are all but this one, the kernel's own, and those that have ended.
func processes() []string {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == 1 {
			continue
		}
		if _, err := os.Readlink("/proc/" + e.Name() + "/exe"); err != nil {
			continue // a kernel thread or a zombie has none
		}
		command, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if err == nil {
			text := strings.TrimSpace(strings.ReplaceAll(string(command), "\x00", " "))
			out = append(out, fmt.Sprintf("%d %.200s", pid, text))
		}
	}
	return out
}
