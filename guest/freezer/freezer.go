// Package freezer makes all processes of a machine stand still but those of the
// agent, by the freezer of cgroup v2 (Linux 5.2), and lets them go on.
//
// It freezes every cgroup right below its root but the ones that it is told to
// spare, with all cgroups in them, so that one that a user's root has made for
// himself is frozen as well.
//
// It is all or nothing: a process that sleeps uninterruptibly in the kernel for
// longer than the caller waits lets all others go on.
package freezer

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

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Freezer freezes what is below one cgroup.
type Freezer struct {
	root  string
	spare []string
}

// New freezes what is below root, a cgroup v2 directory, but the named cgroups.
func New(root string, spare ...string) *Freezer { return &Freezer{root: root, spare: spare} }

// Freeze returns when every process stands still; until the context ends, which
// is an error of kind timeout when it was its deadline. After an error none is
// frozen.
func (f *Freezer) Freeze(ctx context.Context) error {
	groups, err := f.groups()
	if err == nil {
		err = freeze(ctx, groups)
	}
	if err != nil {
		return errors.Join(err, f.Thaw())
	}
	return nil
}

// Thaw lets them go on. Those that run are left alone.
func (f *Freezer) Thaw() error {
	groups, err := f.groups()
	errs := []error{err}
	for _, g := range groups {
		errs = append(errs, order(g, "0"))
	}
	return errors.Join(errs...)
}

// Idle says that there is no process to freeze.
func (f *Freezer) Idle() (bool, error) {
	groups, err := f.groups()
	for _, g := range groups {
		events, err := os.ReadFile(filepath.Join(g, "cgroup.events"))
		if gone(err) && missing(g) {
			continue
		}
		if err != nil || !says(string(events), "populated 0") {
			return false, err
		}
	}
	return err == nil, err
}

func (f *Freezer) groups() ([]string, error) {
	entries, err := os.ReadDir(f.root)
	if err != nil {
		return nil, fmt.Errorf("list cgroups: %w", err)
	}
	var groups []string
	for _, e := range entries {
		if e.IsDir() && !slices.Contains(f.spare, e.Name()) {
			groups = append(groups, filepath.Join(f.root, e.Name()))
		}
	}
	return groups, nil
}

// freeze gives the order to all before it waits for the first.
func freeze(ctx context.Context, groups []string) error {
	for _, g := range groups {
		if err := order(g, "1"); err != nil {
			return err
		}
	}
	for _, g := range groups {
		err := await(ctx, g)
		if errors.Is(err, context.DeadlineExceeded) {
			return sandbox.Errorf(sandbox.KindTimeout, "user processes do not stand still in time: %s", restless(g))
		}
		if err != nil {
			return fmt.Errorf("wait for user processes to stand still: %w", err)
		}
	}
	return nil
}

// order writes cgroup.freeze. A cgroup that has gone away has no processes.
func order(group, value string) error {
	f, err := os.OpenFile(filepath.Join(group, "cgroup.freeze"), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(value)
		err = errors.Join(err, f.Close())
	}
	switch {
	case gone(err) && missing(group):
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return sandbox.Errorf(sandbox.KindUnsupported, "freezing user processes needs Linux 5.2: %w", err)
	}
	return err
}

func missing(group string) bool {
	_, err := os.Lstat(group)
	return errors.Is(err, fs.ErrNotExist)
}

// gone: an open file of a cgroup that was removed has ENODEV.
func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) }

// look is how long, in milliseconds, a wait for the kernel's news does not see
// that its context has ended.
const look = 20

// await returns when a cgroup is frozen. The kernel tells who polls cgroup.events
// about every change since he last read it.
func await(ctx context.Context, group string) error {
	fd, err := unix.Open(filepath.Join(group, "cgroup.events"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if gone(err) && missing(group) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }() // read only
	buf := make([]byte, 256)
	for {
		n, err := unix.Pread(fd, buf, 0)
		switch {
		case gone(err):
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return err
		case err == nil && says(string(buf[:n]), "frozen 1"):
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		}
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}, look)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// says looks for a line of cgroup.events.
func says(events, want string) bool {
	for line := range strings.Lines(events) {
		if strings.TrimSpace(line) == want {
			return true
		}
	}
	return false
}

// restless names the threads of a cgroup that do not sleep as frozen ones do.
func restless(group string) string {
	const most = 3
	var names []string
	_ = filepath.WalkDir(group, func(path string, d fs.DirEntry, err error) error { // what is gone is nobody
		if err != nil || !d.IsDir() {
			return nil
		}
		threads, _ := os.ReadFile(filepath.Join(path, "cgroup.threads")) // likewise
		for _, field := range strings.Fields(string(threads)) {
			tid, _ := strconv.Atoi(field) // the kernel's own
			if p, err := kernel.StatProc(tid); err == nil && (p.State == 'D' || p.State == 'R') {
				comm, _ := os.ReadFile("/proc/" + field + "/comm") // it has gone on
				names = append(names, fmt.Sprintf("%d (%s) is in state %c", tid, strings.TrimSpace(string(comm)), p.State))
			}
		}
		return nil
	})
	switch {
	case len(names) == 0:
		return "which one is not known"
	case len(names) > most:
		names = append(names[:most], fmt.Sprintf("and %d more", len(names)-most))
	}
	return strings.Join(names, ", ")
}
