package dm

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

	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// A disk that has moved on is a line of copy-on-write files. The kernel writes to
// the last one that has a table; those before it are read-only parts (p-…), each
// on the one before. A file behind that is one that Prepare made: nothing was
// written to it, and after a boot it is the last of the line.

// cowName is the n-th copy-on-write file's in Config.Dir.
func cowName(n int) string {
	if n == 0 {
		return cowFile
	}
	return cowPrefix + strconv.Itoa(n) + cowSuffix
}

func (o *overlay) cow(n int) string { return filepath.Join(o.config.Dir, cowName(n)) }

// tag is what the loop device over the n-th file is called.
func (o *overlay) tag(n int) string {
	if n == 0 {
		return o.name
	}
	return o.name + "." + strconv.Itoa(n)
}

// partPrefix begins the names of the parts; the number of the file follows.
func (o *overlay) partPrefix() string {
	rest, _ := strings.CutPrefix(o.name, o.d.prefix()+overlayKind)
	return o.d.prefix() + partKind + rest + "."
}

func (o *overlay) part(n int) string { return o.partPrefix() + strconv.Itoa(n) }

// overlayOf is the overlay that a part belongs to.
func (d *Driver) overlayOf(part string) *overlay {
	rest, _ := strings.CutPrefix(part, d.prefix()+partKind)
	if i := strings.LastIndexByte(rest, '.'); i >= 0 {
		rest = rest[:i]
	}
	return &overlay{d: d, name: d.prefix() + overlayKind + rest}
}

// cows lists the numbers of the copy-on-write files in a folder, ascending.
func cows(dir string) (numbers []int, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		digits, _ := strings.CutPrefix(strings.TrimSuffix(e.Name(), cowSuffix), cowPrefix)
		n, err := strconv.Atoi(digits)
		if e.Name() == cowFile {
			n, err = 0, nil
		}
		if err == nil && n >= 0 && e.Name() == cowName(n) {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

// last is the number of the last file, of which none may be missing.
func (o *overlay) last() (int, error) {
	numbers, err := cows(o.config.Dir)
	if err != nil {
		return 0, err
	}
	for i, n := range numbers {
		if i != n {
			return 0, sandbox.Errorf(sandbox.KindConflict, "the disk has lost some of its content: %s is missing", o.cow(i))
		}
	}
	return max(0, len(numbers)-1), nil
}

// Allocated is what all files take.
func (o *overlay) Allocated() (total int64, _ error) {
	numbers, err := cows(o.config.Dir)
	if err == nil && len(numbers) == 0 {
		err = fmt.Errorf("%s: %w", o.cow(0), fs.ErrNotExist)
	}
	for _, number := range numbers {
		var n int64
		if n, err = sparse.AllocatedAt(o.cow(number)); err != nil {
			break
		}
		total += n
	}
	if err != nil {
		return 0, fmt.Errorf("size of disk: %w", err)
	}
	return total, nil
}

// errDetached is a disk that the kernel knows nothing of, or not as a whole.
var errDetached = errors.New("it is not attached")

// below says what a device lies on: another device, and a file of the line. It is
// errDetached unless the device works.
func (o *overlay) below(name string) (lower uint64, file int, err error) {
	dev, err := o.d.k.Status(name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, errDetached
	}
	if err != nil {
		return 0, 0, fmt.Errorf("look for device %s: %w", name, err)
	}
	if !dev.active || dev.suspended {
		return 0, 0, errDetached
	}
	deps, err := o.d.k.Deps(name)
	if err != nil {
		return 0, 0, fmt.Errorf("look below device %s: %w", name, err)
	}
	numbers, err := cows(o.config.Dir)
	if err != nil {
		return 0, 0, err
	}
	file = -1
	for _, dep := range deps {
		if unix.Major(dep) != loopMajor {
			lower = dep
			continue
		}
		l, err := o.d.k.LoopAt(dep)
		if err != nil {
			return 0, 0, fmt.Errorf("loop device %s: %w", number(dep), err)
		}
		i := slices.IndexFunc(numbers, func(n int) bool { return l.sameFile(o.cow(n)) })
		if i >= 0 {
			file = numbers[i]
		}
	}
	if file < 0 || lower == 0 {
		return 0, 0, errDetached
	}
	return lower, file, nil
}

// live finds the file that is written to, and what that lies on.
func (o *overlay) live() (file int, lower uint64, err error) {
	lower, file, err = o.below(o.name)
	return file, lower, err
}

// isOver reports whether the disk works, and what is below its parts.
func (o *overlay) isOver(origin uint64) (bool, error) {
	live, lower, err := o.live()
	for n := live - 1; err == nil && n >= 0; n-- {
		part, gone := o.d.k.Status(o.part(n))
		if gone != nil || part.dev != lower {
			return false, ignoreMissing(gone)
		}
		var file int
		if lower, file, err = o.below(o.part(n)); err == nil && file != n {
			return false, nil
		}
	}
	if errors.Is(err, errDetached) {
		return false, nil
	}
	return err == nil && lower == origin, err
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// parts lists the numbers of the parts that the kernel has, the topmost first.
func (o *overlay) parts() ([]int, error) {
	all, err := o.d.devices(partKind)
	if err != nil {
		return nil, err
	}
	var numbers []int
	for _, l := range all {
		digits, ok := strings.CutPrefix(l.name, o.partPrefix())
		if n, err := strconv.Atoi(digits); ok && err == nil {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	slices.Reverse(numbers)
	return numbers, nil
}

// mend brings in order what a process left that died while it moved a disk on, or
// what it could not do itself: the disk is where it was, or has moved. A part whose
// table in place is not yet the one of a snapshot has taken nothing over.
func (d *Driver) mend(ctx context.Context, o *overlay) error {
	dev, err := d.k.Status(o.name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !dev.active {
		return nil // nothing to save: what is left of it is taken down and made anew
	}
	if err != nil {
		return fmt.Errorf("look for device %s: %w", o.name, err)
	}
	numbers, err := o.parts()
	if err != nil {
		return err
	}
	for _, n := range numbers {
		if err := d.dropUnfinished(ctx, o, n); err != nil {
			return err
		}
	}
	if dev.suspended {
		if err := d.step(ctx, "mend/resume", func() error { return d.k.Resume(o.name) }); err != nil {
			return fmt.Errorf("resume device %s: %w", o.name, err)
		}
	}
	return nil
}

func (d *Driver) dropUnfinished(ctx context.Context, o *overlay, n int) error {
	info, err := d.k.Info(o.part(n))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ask device %s: %w", o.part(n), err)
	}
	if len(info) == 1 && info[0].kind == "snapshot" {
		return nil
	}
	// The table that waits to be the overlay's next one holds the part.
	if err := d.step(ctx, "mend/unload", func() error { return d.k.Unload(o.name) }); err != nil {
		return fmt.Errorf("clear the next table of device %s: %w", o.name, err)
	}
	return d.drop(ctx, "part", o.part(n))
}
