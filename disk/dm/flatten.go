package dm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"unsafe"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const copyBytes = 1 << 20

// Flatten writes what the guest sees into a new raw file, sparse, whole and on
// the disk when it is there. The VM must be frozen or gone meanwhile. A disk that
// is not attached is attached for as long as it takes.
func (d *Driver) Flatten(ctx context.Context, config disk.Config, to string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("flatten disk: %w", sandbox.NoSpace(err))
		}
	}()
	if _, err := os.Lstat(to); err == nil {
		return sandbox.Errorf(sandbox.KindExists, "%s exists", to)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	before, err := d.k.Status(d.overlay(config).name)
	there := err == nil && before.active
	found, err := d.Restore(ctx, config)
	if err != nil {
		return err
	}
	err = d.copyOut(ctx, d.overlay(config), to)
	if there {
		return err
	}
	var u undo.Stack
	u.Push("attached disk", found.Close)
	if closing := u.Run(ctx); closing != nil {
		// Who gets an error looks for no file, and could not make it again.
		err = errors.Join(err, closing, osfs.Remove("disk-flatten-undo", to))
	}
	return err
}

func (d *Driver) copyOut(ctx context.Context, o *overlay, to string) (err error) {
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	var from reader
	err = d.step(ctx, "flatten/open", func() (err error) { from, err = d.k.OpenNode(o.name); return })
	if from != nil {
		defer func() { err = errors.Join(err, from.Close()) }()
	}
	if err != nil {
		return err
	}
	u.PushClose("flat file", func() error { return osfs.Remove("disk-flatten-undo", to) }) // it may be named and not durable
	return d.step(ctx, "flatten/copy", func() error {
		return osfs.Replace("disk-flatten", to, 0o444, func(f *os.File) error {
			return copyDisk(ctx, f, from, o.config.SizeBytes)
		})
	})
}

// copyDisk copies size bytes and leaves blocks of zeros as holes.
func copyDisk(ctx context.Context, to *os.File, from io.ReaderAt, size int64) error {
	if err := to.Truncate(size); err != nil {
		return err
	}
	buf := aligned(copyBytes)
	for at := int64(0); at < size; at += copyBytes {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		part := buf[:min(copyBytes, size-at)]
		if n, err := from.ReadAt(part, at); n < len(part) {
			return fmt.Errorf("read at byte %d: %w", at+int64(n), err)
		}
		if err := sparse.WriteAt(to, part, at); err != nil {
			return err
		}
	}
	return nil
}

// aligned is memory that O_DIRECT takes, whatever the device's block size.
func aligned(n int) []byte {
	buf := make([]byte, n+blockBytes)
	skip := -uintptr(unsafe.Pointer(&buf[0])) & (blockBytes - 1)
	return buf[skip:][:n:n]
}
