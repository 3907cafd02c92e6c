package dm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Restore finds a disk: its device as it is, perhaps with a VMM that has it
// open, or, after the machine was restarted, a new one over the same file.
func (d *Driver) Restore(ctx context.Context, config disk.Config) (_ disk.Disk, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("restore disk: %w", sandbox.NoSpace(err))
		}
	}()
	r, err := readRecord(config.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, sandbox.Errorf(sandbox.KindNotFound, "%w", err)
	}
	if err != nil {
		return nil, err
	}
	if r.Base != config.Base || r.Layout != config.Layout || r.SizeBytes != config.SizeBytes {
		return nil, sandbox.Errorf(sandbox.KindConflict, "the disk in %s has %d bytes over %s, not %d over %s",
			config.Dir, r.SizeBytes, r.Base+r.Layout, config.SizeBytes, config.Base+config.Layout)
	}
	b, err := d.check(ctx, config)
	if err != nil {
		return nil, err
	}
	if r.ID != b.id {
		return nil, sandbox.Errorf(sandbox.KindConflict, "the disk in %s was made over another content of %s", config.Dir, r.Base+r.Layout)
	}
	o := d.overlay(config)
	unlock, err := d.busy.lock(ctx, o.name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := d.find(ctx, o, b); err != nil {
		return nil, err
	}
	return o, nil
}

// find makes sure that the overlay's device is there and is the right one.
func (d *Driver) find(ctx context.Context, o *overlay, b base) error {
	if err := o.lookAtCows(); err != nil {
		return err
	}
	if err := d.mend(ctx, o); err != nil {
		return err
	}
	found, err := d.isConnected(o, b)
	if err != nil {
		return err
	}
	if found {
		return errors.Join(d.makeNode(ctx, o), d.isWhole(o))
	}
	// What is there is half made, or over a file that is no longer this one.
	if err := d.detach(ctx, o); err != nil {
		return err
	}
	return d.connect(ctx, o, b)
}

// lookAtCows refuses copy-on-write files that cannot be the disk's.
func (o *overlay) lookAtCows() error {
	last, err := o.last()
	for n := 0; err == nil && n <= last; n++ {
		err = lookAtCow(o.cow(n), o.config.SizeBytes)
	}
	return err
}

func lookAtCow(path string, diskBytes int64) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return sandbox.Errorf(sandbox.KindNotFound, "the disk has lost its content: %w", err)
	}
	if err != nil {
		return err
	}
	if want := cowBytes(diskBytes); !info.Mode().IsRegular() || info.Size() < want {
		return sandbox.Errorf(sandbox.KindConflict, "the disk has lost its content: %s has mode %v and %d bytes, not %d", path, info.Mode(), info.Size(), want)
	}
	return lookAtHeader(path)
}

// lookAtHeader says what the kernel would only call an invalid argument. A file
// of zeros is a new one.
func lookAtHeader(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // read only
	magic := make([]byte, 4)
	if _, err := f.ReadAt(magic, 0); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	if word := string(magic); word != cowMagic && word != "\x00\x00\x00\x00" {
		return sandbox.Errorf(sandbox.KindConflict, "the disk has lost its content: %s begins with %q", path, magic)
	}
	return nil
}

// isWhole refuses an overlay that the kernel has given up.
func (d *Driver) isWhole(o *overlay) error {
	fill, err := d.fill(o.name)
	if err != nil {
		return sandbox.Errorf(sandbox.KindConflict, "%s: %w", o.config.Dir, err)
	}
	d.log.Debug("disk attached", "disk", o.name, "dir", o.config.Dir, "used", fill.Used)
	return nil
}

// isConnected reports whether the overlay's device is whole, over this base and
// these files.
func (d *Driver) isConnected(o *overlay, b base) (bool, error) {
	origin, err := d.k.Status(d.baseName(b.id))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for device %s: %w", d.baseName(b.id), err)
	}
	return o.isOver(origin.dev)
}
