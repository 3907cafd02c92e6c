package dm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Prepare makes the file that the disk will move on to.
func (o *overlay) Prepare(ctx context.Context) error {
	unlock, err := o.d.busy.lock(ctx, o.name)
	if err != nil {
		return err
	}
	defer unlock()
	live, _, err := o.live()
	if err == nil && live+1 < disk.MaxOverlays {
		err = o.prepare(ctx, live+1)
	}
	if err != nil {
		return fmt.Errorf("prepare disk: %w", o.conflict(err))
	}
	return nil
}

func (o *overlay) prepare(ctx context.Context, n int) error {
	if _, err := os.Lstat(o.cow(n)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := o.d.step(ctx, "next/cow", func() error { return makeCow(o.cow(n), o.config.SizeBytes) })
	if err != nil {
		return fmt.Errorf("make copy-on-write file: %w", sandbox.NoSpace(err))
	}
	return nil
}

// Next puts an empty file over the one that is written to, below the VMM, which
// has the same device as before. What there was becomes a read-only part.
//
// While the device is suspended nothing is made and nothing is loaded: two tables
// are put in place that wait already. The part's is one over the same file as the
// overlay's has; the kernel hands over what it knows of the file, instead of
// reading it again (__handover_exceptions in dm-snap.c).
func (o *overlay) Next(ctx context.Context, _ func(context.Context, string) error) (_ disk.Changes, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("move disk on: %w", err)
		}
	}()
	unlock, err := o.d.busy.lock(ctx, o.name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	m, err := o.beginMove(ctx)
	if err != nil {
		return nil, err
	}
	if m.unused {
		return o.staysAt(ctx, m)
	}
	return o.move(ctx, m)
}

// move says where a disk is that moves on.
type move struct {
	live   int    // the file that is written to
	lower  uint64 // what that lies on
	set    *disk.Blocks
	unused bool // nothing was written to it
}

// beginMove looks at a disk with all that was written to it in its files.
func (o *overlay) beginMove(ctx context.Context) (m move, err error) {
	if err := o.d.mend(ctx, o); err != nil {
		return m, err
	}
	if m.live, m.lower, err = o.live(); err != nil {
		return m, o.conflict(err)
	}
	if err := o.d.isWhole(o); err != nil {
		return m, err
	}
	dev, err := o.openFlushed(ctx)
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	m.set = disk.NewBlocks(o.config.SizeBytes)
	n, err := o.mark(ctx, m.live, m.set)
	m.unused = n == 0
	return m, err
}

// staysAt opens what the live file lies on, which nobody writes to.
func (o *overlay) staysAt(ctx context.Context, m move) (disk.Changes, error) {
	dev, err := o.openLower(ctx, o.part(m.live), m.lower)
	if err != nil {
		return nil, err
	}
	return o.changes(dev, m.set), nil
}

func (o *overlay) move(ctx context.Context, m move) (_ disk.Changes, err error) {
	if m.live+1 >= disk.MaxOverlays {
		return nil, sandbox.Errorf(sandbox.KindConflict, "the disk is made of %d overlays already: a pause makes them one", m.live+1)
	}
	if err := o.prepare(ctx, m.live+1); err != nil {
		return nil, err
	}
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	u.Push("half a move", func(ctx context.Context) error { return o.d.mend(ctx, o) })
	part, err := o.makePart(ctx, m)
	if err != nil {
		return nil, err
	}
	dev, err := o.openLower(ctx, o.part(m.live), part)
	if err != nil {
		return nil, err
	}
	u.PushClose("part", dev.Close)
	if err := o.loadNext(ctx, m.live+1, part); err != nil {
		return nil, err
	}
	if err := o.swap(ctx, m); err != nil {
		return nil, err
	}
	o.d.log.Debug("disk moved on", "disk", o.name, "dir", o.config.Dir, "overlays", m.live+2)
	return o.changes(dev, m.set), nil
}

// makePart makes the device of the part, of zeros as yet, with the table that it
// is to have waiting.
func (o *overlay) makePart(ctx context.Context, m move) (dev uint64, err error) {
	name, sectors := o.part(m.live), uint64(o.config.SizeBytes/sector)
	if err := o.d.build(ctx, "part", name, true, []target{{length: sectors, kind: "zero"}}); err != nil {
		return 0, err
	}
	status, err := o.d.k.Status(name)
	if err != nil {
		return 0, fmt.Errorf("look at device %s: %w", name, err)
	}
	file, err := o.loopOf(o.name)
	if err != nil {
		return 0, err
	}
	table := snapshotTable(sectors, m.lower, file)
	err = o.d.step(ctx, "next/load-part", func() error { return o.d.load(ctx, name, true, table) })
	if err != nil {
		return 0, fmt.Errorf("load device %s: %w", name, err)
	}
	return status.dev, nil
}

// loopOf is the loop device in the table of a device.
func (o *overlay) loopOf(name string) (uint64, error) {
	found, err := o.d.loopsBelow(name)
	if err == nil && len(found) != 1 {
		err = fmt.Errorf("%d loop devices are below device %s", len(found), name)
	}
	if err != nil {
		return 0, err
	}
	return found[0].dev, nil
}

// openLower opens what lies below an overlay, which has no node otherwise.
func (o *overlay) openLower(ctx context.Context, node string, lower uint64) (dev reader, err error) {
	err = o.d.step(ctx, "next/node", func() error { return o.d.k.MakeNode(node, lower, 0, 0) })
	if err == nil {
		err = o.d.step(ctx, "next/open", func() (err error) { dev, err = o.d.k.OpenNode(node); return })
	}
	err = errors.Join(err, o.d.k.RemoveNode(node))
	if err != nil && dev != nil {
		err = errors.Join(err, dev.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("open device %s: %w", number(lower), err)
	}
	return dev, nil
}

// loadNext makes a table over the n-th file wait to be the overlay's.
func (o *overlay) loadNext(ctx context.Context, n int, part uint64) (err error) {
	cow, err := o.d.attach(ctx, "cow", o.cow(n), o.tag(n), false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cow.close()) }() // the table holds it
	table := snapshotTable(uint64(o.config.SizeBytes/sector), part, cow.dev)
	err = o.d.step(ctx, "next/load", func() error { return o.d.load(ctx, o.name, false, table) })
	if err != nil {
		return fmt.Errorf("load device %s: %w", o.name, err)
	}
	return nil
}

// swap puts both tables in place. Requests of the guest wait meanwhile.
func (o *overlay) swap(ctx context.Context, m move) error {
	for _, s := range []struct {
		verb string
		call func() error
	}{
		{"suspend", func() error { return o.d.k.Suspend(o.name) }},
		{"hand-over", func() error { return o.d.k.Resume(o.part(m.live)) }},
		{"resume", func() error { return o.d.k.Resume(o.name) }},
	} {
		if err := o.d.step(ctx, "next/"+s.verb, s.call); err != nil {
			return fmt.Errorf("%s %s: %w", s.verb, o.name, err)
		}
	}
	return nil
}
