package host_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// disks are plain files. What they take and what is wrong with them, the test says.
type disks struct {
	mu     sync.Mutex
	sizes  map[string]int64 // by path
	report disk.Report
	name   string // "fake" if empty
	kept   []string
	bases  map[string]string // by path
	copies string            // a folder
}

// fakeDisk is a sparse file: what the guest has written is not a hole.
type fakeDisk struct {
	path, base string
	all        *disks
}

// fakeChanges are runs of the sparse file as it was.
type fakeChanges struct {
	*os.File
	runs []disk.BlockRun
}

func (c fakeChanges) Runs() []disk.BlockRun { return c.runs }

func (d *fakeDisk) Prepare(ctx context.Context) error { return fault.Point(ctx, "fakedisk/prepare") }

// Changed lists what is no hole.
func (d *fakeDisk) Changed(ctx context.Context) (disk.Changes, error) {
	if err := fault.Point(ctx, "fakedisk/changed"); err != nil {
		return nil, err
	}
	f, err := os.Open(d.path)
	if err != nil {
		return nil, err
	}
	runs, err := d.runs(f)
	return fakeChanges{f, runs}, err
}

func (d *fakeDisk) runs(f *os.File) (runs []disk.BlockRun, err error) {
	for part, err := range sparse.Data(f) {
		if err != nil {
			return nil, err
		}
		start := part.Offset / disk.BlockBytes
		runs = append(runs, disk.BlockRun{Start: start, Blocks: (part.Offset+part.Bytes+disk.BlockBytes-1)/disk.BlockBytes - start})
	}
	return runs, nil
}

// Next copies the sparse file: there is no second one beneath it.
func (d *fakeDisk) Next(ctx context.Context, _ func(context.Context, string) error) (disk.Changes, error) {
	if err := fault.Point(ctx, "fakedisk/next"); err != nil {
		return nil, err
	}
	from, err := os.Open(d.path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = from.Close() }()
	f, err := os.CreateTemp(d.all.copies, "")
	if err != nil {
		return nil, err
	}
	if err := sparse.CopyFile(f, from); err != nil {
		return nil, err
	}
	runs, err := d.runs(f)
	return fakeChanges{f, runs}, err
}

func (d *disks) Create(_ context.Context, c disk.Config) (disk.Disk, error) {
	path := filepath.Join(c.Dir, "disk")
	d.mu.Lock()
	if d.bases == nil {
		d.bases = map[string]string{}
	}
	d.bases[path] = c.Base
	d.mu.Unlock()
	err := os.WriteFile(path, nil, 0o600)
	return &fakeDisk{path, c.Base, d}, errors.Join(err, os.Truncate(path, c.SizeBytes))
}

func (d *disks) Restore(_ context.Context, c disk.Config) (disk.Disk, error) {
	path := filepath.Join(c.Dir, "disk")
	if _, err := os.Stat(path); err != nil {
		return nil, sandbox.WithKind(sandbox.KindNotFound, err)
	}
	return &fakeDisk{path, c.Base, d}, nil
}

func (d *disks) Name() string {
	if d.name == "" {
		return "fake"
	}
	return d.name
}

func (d *disks) Sweep(_ context.Context, keep []string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kept = keep
	return nil
}

func (d *disks) Check(context.Context) (disk.Report, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.report, nil
}

// find makes a report the next answer of Check.
func (d *disks) find(r disk.Report) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.report = r
}

// grow makes every disk of a sandbox's folder larger.
func (d *disks) grow(dir string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sizes[filepath.Join(dir, "disk")] += 1 << 20
}

func (*disks) Discard(_ context.Context, dir string) error {
	return ignoreMissing(os.Remove(filepath.Join(dir, "disk")))
}

func (d *fakeDisk) Path() string                { return d.path }
func (d *fakeDisk) Format() string              { return "raw" }
func (d *fakeDisk) Close(context.Context) error { return nil }

func (d *fakeDisk) Allocated() (int64, error) {
	d.all.mu.Lock()
	defer d.all.mu.Unlock()
	return 4096 + d.all.sizes[d.path], nil
}

func (d *fakeDisk) Remove(context.Context) error {
	return errors.Join(ignoreMissing(os.Remove(d.path)))
}

func ignoreMissing(err error) error {
	if os.IsNotExist(err) {
		return nil
	}
	return err
}
