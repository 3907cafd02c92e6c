// Package cgroup puts each sandbox's VMM into a control group (version 2) of its
// own, which bounds its memory, its processes and its processor time.
//
// A Tree is one instance's branch of the hierarchy, a Group one sandbox's leaf.
// Nothing is remembered but names: what a crash left is found by them. The group
// comes before the process, which is born in it, and goes after it.
//
// What a limit does is the kernel's: see Documentation/admin-guide/cgroup-v2.rst.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Mount is where systemd, container engines and people mount the hierarchy.
const Mount = "/sys/fs/cgroup"

// controllers are what every group has.
var controllers = []string{"cpu", "memory", "pids"}

// Limits bound one group.
type Limits struct {
	MemBytes int64 // of memory, the page cache of its files and its kernel objects; more is an OOM kill of the group
	PIDs     int   // processes and threads
	CPUs     int   // processors' worth of time at the most; the share under contention follows it, too
}

// Tree is the branch of one instance.
type Tree struct{ dir string }

// Open makes the branch of an instance below the mount point. Where the host
// does not give us control groups, the error is of kind unsupported and says what
// is missing.
func Open(mount, instance string) (*Tree, error) {
	if err := usable(mount); err != nil {
		return nil, sandbox.WithKind(sandbox.KindUnsupported, err)
	}
	t := &Tree{dir: filepath.Join(mount, "dormouse-"+instance)}
	if err := enable(mount); err != nil {
		return nil, sandbox.WithKind(sandbox.KindUnsupported, err)
	}
	if err := os.Mkdir(t.dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, sandbox.Errorf(sandbox.KindUnsupported, "make control group: %w", err)
	}
	if err := enable(t.dir); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

// usable looks before anything is changed.
func usable(mount string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(mount, &st); err != nil {
		return fmt.Errorf("%s: %w", mount, err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("%s is not a control group hierarchy of version 2", mount)
	}
	has, err := os.ReadFile(filepath.Join(mount, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, c := range controllers {
		if !slices.Contains(strings.Fields(string(has)), c) {
			return fmt.Errorf("%s has no %s controller", mount, c)
		}
	}
	return nil
}

// enable hands the controllers on to the children of a group.
func enable(dir string) error {
	err := write(dir, "cgroup.subtree_control", "+"+strings.Join(controllers, " +"))
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s has processes of its own, so its children get no controllers: is this a container's group?", dir)
	}
	return err
}

// Close removes the branch when nothing is in it, and else leaves it.
func (t *Tree) Close() error {
	err := os.Remove(t.dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOTEMPTY) {
		return nil
	}
	return err
}

// Group is one sandbox's.
type Group struct{ dir string }

// Create makes a group with its limits. On error nothing of it is left.
func (t *Tree) Create(name string, l Limits) (_ *Group, err error) {
	g := t.group(name)
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		return nil, fmt.Errorf("make control group: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(g.dir))
		}
	}()
	for _, s := range l.settings() {
		if err := write(g.dir, s.file, s.value); err != nil {
			return nil, fmt.Errorf("limit control group: %w", err)
		}
	}
	return g, nil
}

type setting struct{ file, value string }

// settings are the files to write. A VMM is one process, so an OOM kill takes
// the group as a whole; processor time is accounted by the kernel's usual tenth
// of a second.
func (l Limits) settings() []setting {
	const periodUS = 100_000
	return []setting{
		{"memory.max", strconv.FormatInt(l.MemBytes, 10)},
		{"memory.oom.group", "1"},
		{"pids.max", strconv.Itoa(l.PIDs)},
		{"cpu.max", fmt.Sprintf("%d %d", l.CPUs*periodUS, periodUS)},
		{"cpu.weight", strconv.Itoa(min(100*l.CPUs, 10_000))},
	}
}

// Find is the group of that name, whether it exists or not: an earlier process
// may have made it.
func (t *Tree) Find(name string) *Group { return t.group(name) }

func (t *Tree) group(name string) *Group { return &Group{dir: filepath.Join(t.dir, name)} }

// Path is where a process is born into the group.
func (g *Group) Path() string { return g.dir }

// OOMKilled says that the kernel killed something in the group because the group
// was at its limit, or because the host had no memory left.
func (g *Group) OOMKilled() (bool, error) {
	data, err := os.ReadFile(filepath.Join(g.dir, "memory.events"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(data)) {
		if n, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok {
			return n != "0", nil
		}
	}
	return false, nil
}

// Remove kills what is left in the group and removes it. A group that is not
// there is success.
func (g *Group) Remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, removeLimit)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := os.Remove(g.dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("remove control group: %w", err)
		}
		if err := g.kill(); err != nil {
			return fmt.Errorf("empty control group: %w", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("remove control group: %w", err)
		}
	}
}

// removeLimit is how long a killed process may take to go.
const removeLimit = 10 * time.Second

// kill ends every process of the group (Linux 5.14); before that one by one,
// again and again until the group can be removed.
func (g *Group) kill() error {
	err := write(g.dir, "cgroup.kill", "1")
	if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	procs, err := os.ReadFile(filepath.Join(g.dir, "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, field := range strings.Fields(string(procs)) {
		pid, err := strconv.Atoi(field)
		if err != nil || pid <= 1 {
			continue // 0 is a process of another PID namespace, which is none of ours
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Sweep removes every group, and what runs in it, that keep does not name.
func (t *Tree) Sweep(ctx context.Context, keep func(name string) bool) error {
	entries, err := os.ReadDir(t.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() && !keep(e.Name()) {
			errs = append(errs, t.group(e.Name()).Remove(ctx))
		}
	}
	return errors.Join(errs...)
}

// write sets one of the kernel's files, which exist or are not supported.
func write(dir, file, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
