package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
)

// tagPrefix begins the one word on a QEMU's command line that says whose it is:
// the note on the descriptor set of its console.
const tagPrefix = "dormouse:"

// tag names the VM's directory; commas are doubled, as QEMU's options want it.
func tag(dir string) string {
	return strings.ReplaceAll(tagPrefix+resolve(dir), ",", ",,")
}

// dirOf finds the directory on a command line, as /proc/PID/cmdline has it.
func dirOf(cmdline []byte) (string, bool) {
	for arg := range bytes.SplitSeq(cmdline, []byte{0}) {
		if _, rest, ok := strings.Cut(string(arg), ",opaque="+tagPrefix); ok {
			return strings.ReplaceAll(rest, ",,", ","), true
		}
	}
	return "", false
}

// resolve makes two spellings of one directory equal; one that is gone stays as it is.
func resolve(dir string) string {
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		return real
	}
	return filepath.Clean(dir)
}

// hold keeps a VM from Sweep, for as long as a handle on it or its Start lasts.
// What it returns is for letGo: the directory may be gone by then.
func (d *Driver) hold(dir string) string {
	dir = resolve(dir)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.held[dir]++
	return dir
}

func (d *Driver) letGo(dir string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.held[dir]--; d.held[dir] <= 0 {
		delete(d.held, dir)
	}
}

func (d *Driver) holds(dir string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.held[dir] > 0
}

// Sweep kills the QEMU processes whose directory lies below root and that this
// driver does not hold. It finds them by their command line, so it needs no
// file of theirs.
func (d *Driver) Sweep(ctx context.Context, root string) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("sweep qemu: %w", err)
	}
	root = resolve(root)
	var errs []error
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if err := d.sweepOne(ctx, pid, root); err != nil {
			errs = append(errs, fmt.Errorf("sweep qemu: pid %d: %w", pid, err))
		}
	}
	return errors.Join(errs...)
}

// sweepOne opens the process before it looks at it: what it sees, and what it
// kills, is then the same process or nothing.
func (d *Driver) sweepOne(ctx context.Context, pid int, root string) error {
	if !d.astray(pid, root) { // most processes, without a descriptor for each
		return nil
	}
	p, err := kernel.OpenPidFD(pid)
	if errors.Is(err, kernel.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = p.Close() }() // the process is what matters
	if !d.astray(pid, root) {
		return nil
	}
	if err := p.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, kernel.ErrGone) {
		return err
	}
	d.config.Log.Warn("vm swept: nobody had written it down", "pid", pid, "root", root)
	if err := p.Wait(ctx); err != nil {
		return err
	}
	_, err = p.Reap()
	return err
}

// astray reports whether a process is a QEMU of ours below root that nobody
// holds. A process that cannot be read is another user's, or gone.
func (d *Driver) astray(pid int, root string) bool {
	cmdline, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil {
		return false
	}
	dir, ok := dirOf(cmdline)
	if !ok || !below(root, dir) || d.holds(dir) {
		return false
	}
	exe, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
	if errors.Is(err, fs.ErrPermission) {
		return false
	}
	return strings.HasPrefix(filepath.Base(exe), "qemu")
}

func below(root, dir string) bool {
	rel, err := filepath.Rel(root, dir)
	return err == nil && filepath.IsLocal(rel)
}
