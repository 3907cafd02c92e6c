package host

import (
	"context"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// Each point adds a layer to its line, and reading goes through all of them. Past
// a limit the layers of the diffs are made one, in the background: the same bytes
// under another digest. What a VM runs from stays what it was.

// flattenLong looks at the points that sandboxes have made since it looked last. A
// copy begins with another one's: that is not its own to flatten, its next one is.
func (a *Agent) flattenLong(time.Time) {
	if a.cfg.Snapshots == nil {
		return
	}
	for _, b := range a.all() {
		b.mu.Lock()
		e, short := b.entry, b.short
		b.mu.Unlock()
		last := e.Last
		if last == nil || last == short || last.Guest != b.id || e.State != statePaused && e.State != stateRunning || a.ctx.Err() != nil {
			continue
		}
		err := a.flattenLine(a.ctx, b, last)
		if err == nil {
			b.mu.Lock()
			b.short = last
			b.mu.Unlock()
		} else if a.ctx.Err() == nil {
			a.log.Warn("a line of points not flattened, will try again", "sandbox", b.id, "err", err)
		}
	}
}

// flattenLine flattens the newest point of a sandbox, if it has too many layers.
func (a *Agent) flattenLine(ctx context.Context, b *box, old *point) error {
	next := *old
	var pins []*snapshot.Pin
	defer func() {
		for _, p := range pins {
			p.Release()
		}
	}()
	for _, d := range []*snapshot.Digest{&next.Memory, &next.Disk} {
		m, err := a.cfg.Snapshots.Manifest(*d)
		if sandbox.Is(err, sandbox.KindNotFound) {
			return nil // it has moved on
		}
		if err != nil {
			return err
		}
		if len(m.Layers) <= a.cfg.MaxLayers {
			continue
		}
		if err := fault.Point(ctx, "host/flatten/image"); err != nil {
			return err
		}
		pin, err := a.cfg.Snapshots.Flatten(ctx, *d)
		if err != nil {
			return err
		}
		pins = append(pins, pin)
		*d = pin.Digest
	}
	if len(pins) == 0 {
		return nil
	}
	next.Above = a.descend(old)
	if err := a.measure(&next); err != nil {
		return err
	}
	return a.replace(ctx, b, old, &next)
}

// replace notes that a sandbox's newest point is another one of the same bytes. If
// it has moved on meanwhile, the work was for nothing.
func (a *Agent) replace(ctx context.Context, b *box, old, next *point) error {
	b.op.Lock()
	defer b.op.Unlock()
	if e := b.now(); e.Last != old || e.State != statePaused && e.State != stateRunning || a.isClosed() || b.alive.Err() != nil {
		return nil
	}
	err := a.move(ctx, b, "flatten-done", "host/flatten/done", func(e *entry) { e.Last = next })
	if err == nil {
		a.log.Info("a line of points is flattened", "sandbox", b.id, "generation", next.Generation)
		a.collectSoon()
	}
	return err
}
