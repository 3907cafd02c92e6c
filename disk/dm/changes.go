package dm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// changes is what a disk was at one point: a device that is read, and what the
// files below it hold.
type changes struct {
	size  int64
	runs  []disk.BlockRun
	dev   reader
	close func() error // once
}

func (o *overlay) changes(dev reader, set *disk.Blocks) *changes {
	return &changes{size: o.config.SizeBytes, runs: set.Runs(), dev: dev, close: sync.OnceValue(dev.Close)}
}

// Runs lists what the copy-on-write files hold.
func (c *changes) Runs() []disk.BlockRun { return c.runs }

// Close closes the device.
func (c *changes) Close() error { return c.close() }

var copyBuffers = sync.Pool{New: func() any { b := aligned(copyBytes); return &b }}

// ReadAt reads whole blocks past the page cache, and gives out what is wanted.
func (c *changes) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 || off > c.size {
		return 0, fmt.Errorf("read at byte %d of a disk that has %d", off, c.size)
	}
	if rest := c.size - off; int64(len(p)) > rest {
		p, err = p[:rest], io.EOF
	}
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	for n < len(p) {
		at := off + int64(n)
		skip := int(at % blockBytes)
		want := min(copyBytes, (skip+len(p)-n+blockBytes-1)/blockBytes*blockBytes)
		if got, err := c.dev.ReadAt((*buf)[:want], at-int64(skip)); got < want {
			return n, fmt.Errorf("read at byte %d: %w", at, noEnd(err))
		}
		n += copy(p[n:], (*buf)[skip:want])
	}
	return n, err
}

// Changed reads the files of the disk, which must be attached.
func (o *overlay) Changed(ctx context.Context) (_ disk.Changes, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("changes of disk: %w", err)
		}
	}()
	unlock, err := o.d.busy.lock(ctx, o.name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	live, _, err := o.live()
	if err != nil {
		return nil, o.conflict(err)
	}
	dev, err := o.openFlushed(ctx)
	if err != nil {
		return nil, err
	}
	set := disk.NewBlocks(o.config.SizeBytes)
	if _, err := o.mark(ctx, live, set); err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return o.changes(dev, set), nil
}

// conflict gives errDetached its kind.
func (o *overlay) conflict(err error) error {
	if errors.Is(err, errDetached) {
		return sandbox.Errorf(sandbox.KindConflict, "the disk in %s: %w", o.config.Dir, err)
	}
	return err
}

// openFlushed opens the disk when all that was written to it is in its files.
func (o *overlay) openFlushed(ctx context.Context) (dev reader, err error) {
	err = o.d.step(ctx, "changes/open", func() (err error) { dev, err = o.d.k.OpenNode(o.name); return })
	if err == nil {
		err = o.d.step(ctx, "changes/flush", dev.Sync)
	}
	if err != nil && dev != nil {
		err = errors.Join(err, dev.Close())
	}
	return dev, err
}

// mark adds what the files up to the live one hold to a set, and says how much
// that one does.
func (o *overlay) mark(ctx context.Context, live int, set *disk.Blocks) (inLive int64, err error) {
	for n := range live + 1 {
		if inLive, err = readCow(ctx, o.cow(n), o.config.SizeBytes, set); err != nil {
			return 0, err
		}
	}
	return inLive, nil
}
