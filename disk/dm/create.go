package dm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// record says what an overlay was made over. Without one there is no disk.
type record struct {
	Format    int    `json:"format"` // 1
	Base      string `json:"base,omitempty"`
	Layout    string `json:"layout,omitempty"`
	SizeBytes int64  `json:"size_bytes"`
	ID        string `json:"id"` // of the content below: an overlay is nothing over another one
}

func parseRecord(data []byte) (record, error) {
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, err
	}
	if r.Format != 1 {
		return record{}, fmt.Errorf("format %d is not known", r.Format)
	}
	return r, nil
}

func readRecord(dir string) (record, error) {
	path := filepath.Join(dir, recordFile)
	data, err := osfs.ReadFileLimit(path, maxDiskRecord)
	if err != nil {
		return record{}, err
	}
	r, err := parseRecord(data)
	if err != nil {
		return record{}, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// Create makes an overlay and its device. On error nothing of it is left.
func (d *Driver) Create(ctx context.Context, config disk.Config) (_ disk.Disk, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("create disk: %w", sandbox.NoSpace(err))
		}
	}()
	b, err := d.check(ctx, config)
	if err != nil {
		return nil, err
	}
	for _, l := range b.layers {
		if err := d.isSealed(ctx, l); err != nil {
			return nil, err
		}
	}
	o := d.overlay(config)
	unlock, err := d.busy.lock(ctx, o.name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := d.vacant(ctx, o); err != nil {
		return nil, err
	}
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	u.PushClose("overlay", o.removeFiles)
	if err := d.step(ctx, "cow/make", func() error { return makeCow(o.cow(0), config.SizeBytes) }); err != nil {
		return nil, fmt.Errorf("make copy-on-write file: %w", err)
	}
	// The record comes before the device: whoever finds the device after a crash
	// finds what it is, too.
	if err := d.step(ctx, "record/write", func() error { return o.writeRecord(b) }); err != nil {
		return nil, fmt.Errorf("write record: %w", err)
	}
	if err := d.connect(ctx, o, b); err != nil {
		return nil, err
	}
	return o, nil
}

// check looks at a config and finds its base.
func (d *Driver) check(ctx context.Context, config disk.Config) (base, error) {
	if !filepath.IsAbs(config.Dir) {
		return base{}, sandbox.Errorf(sandbox.KindInvalid, "directory %q must be an absolute path", config.Dir)
	}
	if (config.Base == "") == (config.Layout == "") {
		return base{}, sandbox.Errorf(sandbox.KindInvalid, "a disk has a base %q or a layout %q, and not both", config.Base, config.Layout)
	}
	if !filepath.IsAbs(config.Base + config.Layout) {
		return base{}, sandbox.Errorf(sandbox.KindInvalid, "base %q must be an absolute path", config.Base+config.Layout)
	}
	// dm-verity's blocks are what the disk above has too: the kernel would refuse half of one.
	if config.SizeBytes <= 0 || config.SizeBytes > maxBaseBytes || config.SizeBytes%blockBytes != 0 {
		return base{}, sandbox.Errorf(sandbox.KindInvalid, "disk of %d bytes is not possible: a multiple of %d, at most %d", config.SizeBytes, blockBytes, int64(maxBaseBytes))
	}
	if err := ctx.Err(); err != nil {
		return base{}, context.Cause(ctx)
	}
	return d.baseOf(ctx, config.Base, config.Layout, config.SizeBytes)
}

// vacant says that there is no disk in the directory; what a crash left of one
// that was not finished is taken away.
func (d *Driver) vacant(ctx context.Context, o *overlay) error {
	if _, err := os.Lstat(filepath.Join(o.config.Dir, recordFile)); err == nil {
		return sandbox.Errorf(sandbox.KindExists, "there is a disk in %s", o.config.Dir)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return errors.Join(d.detach(ctx, o), o.removeFiles())
}

func (o *overlay) writeRecord(b base) error {
	data, err := json.MarshalIndent(record{Format: 1, Base: o.config.Base, Layout: o.config.Layout, SizeBytes: o.config.SizeBytes, ID: b.id}, "", "  ")
	if err != nil {
		return err
	}
	return osfs.WriteFile("disk-record", filepath.Join(o.config.Dir, recordFile), append(data, '\n'), 0o600)
}

// connect makes the overlay's device and its node. On error neither is left.
func (d *Driver) connect(ctx context.Context, o *overlay, b base) (err error) {
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	u.Push("shared devices", d.tidy)
	origin, unpin, err := d.pinBase(ctx, b)
	if err != nil {
		return fmt.Errorf("set up base: %w", err)
	}
	defer unpin()
	u.Push("devices", func(ctx context.Context) error {
		parts, err := o.parts()
		return errors.Join(d.drop(ctx, "overlay", o.name), err, d.dropParts(ctx, o, parts))
	})
	if err := d.mapLine(ctx, o, origin); err != nil {
		return err
	}
	u.PushClose("node", func() error { return d.k.RemoveNode(o.name) })
	if err := d.makeNode(ctx, o); err != nil {
		return err
	}
	return d.isWhole(o)
}

// mapLine puts the copy-on-write files over the origin, each on the one before.
func (d *Driver) mapLine(ctx context.Context, o *overlay, origin uint64) error {
	last, err := o.last()
	if err != nil {
		return err
	}
	for n := range last {
		if err := d.mapCow(ctx, o, n, "part", o.part(n), true, origin); err != nil {
			return err
		}
		dev, err := d.k.Status(o.part(n))
		if err != nil {
			return fmt.Errorf("look at device %s: %w", o.part(n), err)
		}
		origin = dev.dev
	}
	return d.mapCow(ctx, o, last, "overlay", o.name, false, origin)
}

// mapCow puts a copy-on-write file over an origin. The kernel reads the exceptions
// in the file when the table is loaded.
func (d *Driver) mapCow(ctx context.Context, o *overlay, n int, what, name string, readOnly bool, origin uint64) (err error) {
	cow, err := d.attach(ctx, "cow", o.cow(n), o.tag(n), false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cow.close()) }() // the table holds it
	return d.build(ctx, what, name, readOnly, snapshotTable(uint64(o.config.SizeBytes/sector), origin, cow.dev))
}

func (d *Driver) makeNode(ctx context.Context, o *overlay) error {
	dev, err := d.k.Status(o.name)
	if err != nil {
		return fmt.Errorf("look at device %s: %w", o.name, err)
	}
	err = d.step(ctx, "node/make", func() error { return d.k.MakeNode(o.name, dev.dev, o.config.UID, o.config.GID) })
	if err != nil {
		return fmt.Errorf("make node: %w", err)
	}
	return nil
}

// errNoTable is a device that is not whole yet.
var errNoTable = errors.New("it has no table")

// fill asks dm-snapshot how full an overlay is.
func (d *Driver) fill(name string) (Fill, error) {
	info, err := d.k.Info(name)
	if err != nil {
		return Fill{}, fmt.Errorf("ask device %s: %w", name, err)
	}
	if len(info) == 0 {
		return Fill{}, fmt.Errorf("device %s: %w", name, errNoTable)
	}
	if len(info) != 1 || info[0].kind != "snapshot" {
		return Fill{}, fmt.Errorf("device %s is no snapshot: %+v", name, info)
	}
	return parseFill(info[0].params)
}
