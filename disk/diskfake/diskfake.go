// Package diskfake keeps disks as plain files, for tests of what uses disks: it
// needs no tool and no kernel's help, and no VMM can open them.
//
// It passes the suite of drivers. A test writes to a disk with Write, as a guest
// would.
package diskfake

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const (
	recordName = "disk.json"
	filePrefix = "overlay-" // a file of the disk's size, one for each move
	mapSuffix  = ".map"     // a byte for each block of it that was written
)

// Driver makes disks.
type Driver struct {
	// Below makes moves as device-mapper does, without asking a VMM.
	Below bool

	mu     sync.Mutex
	report disk.Report
}

// Name is "fake".
func (d *Driver) Name() string { return "fake" }

// Report is what Check finds from now on.
func (d *Driver) Report(r disk.Report) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.report = r
}

// Check finds what Report said.
func (d *Driver) Check(context.Context) (disk.Report, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.report, nil
}

// Sweep has nothing to do.
func (d *Driver) Sweep(context.Context, []string) error { return nil }

// Create makes the first overlay, then the record: with it there is a disk.
func (d *Driver) Create(ctx context.Context, config disk.Config) (_ disk.Disk, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("create disk: %w", err)
		}
	}()
	if err := errors.Join(ctx.Err(), check(config), fault.Point(ctx, "diskfake/create")); err != nil {
		return nil, err
	}
	f := &fake{d: d, config: config}
	if _, err := os.Lstat(f.record()); err == nil {
		return nil, sandbox.Errorf(sandbox.KindExists, "there is a disk in %s", config.Dir)
	}
	data, err := json.Marshal(config)
	if err == nil {
		err = errors.Join(f.removeFiles(), f.begin(0))
	}
	if err == nil {
		err = osfs.WriteFile("diskfake", f.record(), data, 0o600)
	}
	if err != nil {
		return nil, errors.Join(err, f.removeFiles())
	}
	return f, nil
}

func check(config disk.Config) error {
	if !filepath.IsAbs(config.Dir) || !filepath.IsAbs(config.Base) {
		return sandbox.Errorf(sandbox.KindInvalid, "base %q and directory %q must be absolute paths", config.Base, config.Dir)
	}
	info, err := os.Stat(config.Base)
	if errors.Is(err, fs.ErrNotExist) {
		return sandbox.Errorf(sandbox.KindNotFound, "open base: %w", err)
	}
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || config.SizeBytes <= 0 || config.SizeBytes%disk.BlockBytes != 0 || config.SizeBytes < info.Size() {
		return sandbox.Errorf(sandbox.KindInvalid, "a disk of %d bytes over %s, with %d, is not possible", config.SizeBytes, config.Base, info.Size())
	}
	return nil
}

// Restore finds a disk by its record.
func (d *Driver) Restore(_ context.Context, config disk.Config) (disk.Disk, error) {
	f := &fake{d: d, config: config}
	data, err := os.ReadFile(f.record())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, sandbox.Errorf(sandbox.KindNotFound, "restore disk: %w", err)
	}
	var was disk.Config
	if err = errors.Join(err, check(config)); err == nil {
		err = json.Unmarshal(data, &was)
	}
	if err == nil && was != config {
		err = sandbox.Errorf(sandbox.KindConflict, "the disk in %s is %+v, not %+v", config.Dir, was, config)
	}
	if err != nil {
		return nil, fmt.Errorf("restore disk: %w", err)
	}
	return f, nil
}

// Discard removes whatever disk is in dir.
func (d *Driver) Discard(ctx context.Context, dir string) error {
	if !filepath.IsAbs(dir) {
		return sandbox.Errorf(sandbox.KindInvalid, "discard disk: directory %q must be an absolute path", dir)
	}
	return (&fake{d: d, config: disk.Config{Dir: dir}}).Remove(ctx)
}

// fake is one disk. What there is of it is in its folder.
type fake struct {
	d      *Driver
	config disk.Config
	mu     sync.Mutex // one change at a time
}

func (f *fake) record() string    { return filepath.Join(f.config.Dir, recordName) }
func (f *fake) file(n int) string { return filepath.Join(f.config.Dir, filePrefix+strconv.Itoa(n)) }

// top is the last overlay.
func (f *fake) top() (n int) {
	for {
		if _, err := os.Lstat(f.file(n + 1)); err != nil {
			return n
		}
		n++
	}
}

// begin makes an empty overlay.
func (f *fake) begin(n int) error {
	err := osfs.WriteFile("diskfake", f.file(n)+mapSuffix, make([]byte, f.config.SizeBytes/disk.BlockBytes), 0o600)
	if err != nil {
		return err
	}
	err = osfs.Replace("diskfake", f.file(n), 0o600, func(file *os.File) error { return file.Truncate(f.config.SizeBytes) })
	if err == nil && os.Geteuid() == 0 {
		err = os.Lchown(f.file(n), f.config.UID, f.config.GID)
	}
	return err
}

func (f *fake) Path() string                { return f.file(f.top()) }
func (f *fake) Format() string              { return "fake" }
func (f *fake) Close(context.Context) error { return nil }

func (f *fake) Allocated() (total int64, _ error) {
	for n := range f.top() + 1 {
		size, err := sparse.AllocatedAt(f.file(n))
		if err != nil {
			return 0, fmt.Errorf("size of disk: %w", err)
		}
		total += size
	}
	return total, nil
}

// Remove deletes the record first.
func (f *fake) Remove(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.removeFiles()
}

func (f *fake) removeFiles() error {
	entries, err := os.ReadDir(f.config.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err, osfs.Remove("diskfake", f.record())}
	for _, e := range entries {
		if strings.HasPrefix(strings.TrimPrefix(e.Name(), ".tmp-"), filePrefix) {
			errs = append(errs, os.Remove(filepath.Join(f.config.Dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// Write writes to a disk of this package as its guest would.
func Write(d disk.Disk, p []byte, off int64) error {
	f, ok := d.(*fake)
	if !ok {
		return fmt.Errorf("%T is no disk of this package", d)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	c, err := f.changes(f.top() + 1)
	if err != nil {
		return err
	}
	first, end := off/disk.BlockBytes, (off+int64(len(p))+disk.BlockBytes-1)/disk.BlockBytes
	blocks := make([]byte, (end-first)*disk.BlockBytes)
	if _, err := c.ReadAt(blocks, first*disk.BlockBytes); err != nil {
		return err
	}
	copy(blocks[off-first*disk.BlockBytes:], p)
	return errors.Join(
		writeAt(f.Path(), blocks, first*disk.BlockBytes),
		writeAt(f.Path()+mapSuffix, bytes.Repeat([]byte{1}, int(end-first)), first), c.Close())
}

func writeAt(path string, p []byte, off int64) error {
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteAt(p, off)
	return errors.Join(err, file.Close())
}

// Changed reads the maps.
func (f *fake) Changed(ctx context.Context) (disk.Changes, error) {
	if err := fault.Point(ctx, "diskfake/changed"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changes(f.top() + 1)
}

// Prepare has nothing to do: an overlay costs nothing to make.
func (f *fake) Prepare(ctx context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return fault.Point(ctx, "diskfake/prepare")
}

// Next makes another overlay, unless the last is empty.
func (f *fake) Next(ctx context.Context, switchTo func(context.Context, string) error) (_ disk.Changes, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := errors.Join(ctx.Err(), fault.Point(ctx, "diskfake/next")); err != nil {
		return nil, err
	}
	n := f.top()
	last, err := os.ReadFile(f.file(n) + mapSuffix)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(last, 1) {
		return f.changes(n)
	}
	if n+1 >= disk.MaxOverlays {
		return nil, sandbox.Errorf(sandbox.KindConflict, "the disk is made of %d overlays already", n+1)
	}
	if err := f.begin(n + 1); err != nil {
		return nil, err
	}
	if !f.d.Below {
		if err := switchTo(ctx, f.file(n+1)); err != nil {
			return nil, err
		}
	}
	return f.changes(n + 1)
}

// changes is what the first overlays hold: disk.Changes.
type changes struct {
	size  int64
	runs  []disk.BlockRun
	files []*os.File // from the base up
	maps  [][]byte   // of all but the base
}

// changes opens the base and the first n overlays.
func (f *fake) changes(n int) (_ disk.Changes, err error) {
	c := &changes{size: f.config.SizeBytes}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	set := disk.NewBlocks(c.size)
	for i := range n + 1 {
		path := f.config.Base
		if i > 0 {
			path = f.file(i - 1)
			written, err := os.ReadFile(path + mapSuffix)
			if err != nil {
				return nil, err
			}
			c.maps = append(c.maps, written)
			for at, is := range written {
				set.Add(int64(at), int64(is))
			}
		}
		file, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		c.files = append(c.files, file)
	}
	c.runs = set.Runs()
	return c, nil
}

func (c *changes) Runs() []disk.BlockRun { return c.runs }

func (c *changes) Close() error {
	var errs []error
	for _, f := range c.files {
		errs = append(errs, f.Close())
	}
	c.files = nil
	return errors.Join(errs...)
}

func (c *changes) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 || off > c.size {
		return 0, fmt.Errorf("read at byte %d of a disk that has %d", off, c.size)
	}
	if rest := c.size - off; int64(len(p)) > rest {
		p, err = p[:rest], io.EOF
	}
	for n < len(p) {
		at := off + int64(n)
		part := p[n:min(len(p), n+int(disk.BlockBytes-at%disk.BlockBytes))]
		from := len(c.maps)
		for from > 0 && c.maps[from-1][at/disk.BlockBytes] == 0 {
			from--
		}
		got, err := c.files[from].ReadAt(part, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return n, err
		}
		clear(part[got:])
		n += len(part)
	}
	return n, err
}
