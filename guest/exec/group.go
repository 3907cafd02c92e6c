package exec

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

var groupNumber atomic.Uint64

// group is where all descendants of one command are found: a cgroup of its own
// where there are cgroups, else the tree that /proc shows.
type group struct {
	path string // of the cgroup, or empty
	dir  *os.File
}

// newGroup makes a cgroup below parent, or none when parent is empty.
func newGroup(parent string) (*group, error) {
	if parent == "" {
		return &group{}, nil
	}
	path := filepath.Join(parent, "run-"+strconv.FormatUint(groupNumber.Add(1), 10))
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, fmt.Errorf("make a cgroup: %w", err)
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open a cgroup: %w", err), os.Remove(path))
	}
	return &group{path: path, dir: dir}, nil
}

// enter makes a process start inside the group (clone3, Linux 5.7).
func (g *group) enter(sys *syscall.SysProcAttr) {
	if g.dir != nil {
		sys.UseCgroupFD, sys.CgroupFD = true, int(g.dir.Fd())
	}
}

// started lets go of what only the start needed.
func (g *group) started() {
	if g.dir != nil {
		_ = g.dir.Close() // a directory
	}
}

// remove deletes the cgroup. While a background job lives in it this fails, and
// the next sweep tries again.
func (g *group) remove() bool {
	if g.path == "" {
		return true
	}
	err := os.Remove(g.path)
	return err == nil || errors.Is(err, os.ErrNotExist)
}

// kill ends every process of the group but, without a cgroup, the first, which
// is pid.
func (g *group) kill(pid int) {
	if g.path != "" {
		kill := filepath.Join(g.path, "cgroup.kill") // Linux 5.14
		if os.WriteFile(kill, []byte("1"), 0) == nil {
			return
		}
	}
	killTree(pid)
}

// killTree kills the descendants of pid, and all of its session, but not pid
// itself. It looks until
// it finds nobody new: a process may fork while it looks.
func killTree(pid int) {
	killed := map[int]bool{}
	for {
		fresh := 0
		for _, victim := range tree(pid, killed) {
			if !killed[victim] {
				killed[victim] = true
				fresh++
				_ = syscall.Kill(victim, syscall.SIGKILL) // it may have ended by itself
			}
		}
		if fresh == 0 {
			return
		}
	}
}

// tree lists pid's session and its descendants, and those of the dead in known.
func tree(pid int, known map[int]bool) []int {
	type link struct{ pid, parent, session int }
	var all []link
	entries, _ := os.ReadDir("/proc") // without /proc there is nothing to find
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if parent, session, ok := parents(n); ok {
			all = append(all, link{n, parent, session})
		}
	}
	in := map[int]bool{pid: true}
	var found []int
	for grew := true; grew; {
		grew = false
		for _, l := range all {
			if !in[l.pid] && (in[l.parent] || known[l.parent] || l.session == pid) {
				in[l.pid] = true
				found = append(found, l.pid)
				grew = true
			}
		}
	}
	return found
}

// parents reads a process's parent and session from /proc/PID/stat. The name in
// parentheses may contain anything.
func parents(pid int) (parent, session int, ok bool) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, false
	}
	_, rest, _ := strings.Cut(string(data[strings.LastIndexByte(string(data), ')')+1:]), " ")
	fields := strings.Fields(rest) // state, ppid, pgrp, session
	if len(fields) < 4 {
		return 0, 0, false
	}
	parent, err1 := strconv.Atoi(fields[1])
	session, err2 := strconv.Atoi(fields[3])
	return parent, session, err1 == nil && err2 == nil
}
