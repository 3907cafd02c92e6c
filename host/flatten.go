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

const flattenTick = time.Second

// flattenLong looks for lines that have grown too long.
func (a *Agent) flattenLong(time.Time) {
	if a.cfg.Snapshots == nil || !a.grown.CompareAndSwap(true, false) {
		return
	}
	for _, b := range a.all() {
		e := b.now()
		if e.Last == nil || e.State != statePaused && e.State != stateRunning || a.ctx.Err() != nil {
			continue
		}
		if err := a.flattenLine(a.ctx, b, e.Last); err != nil && a.ctx.Err() == nil {
			a.log.Warn("a line of points not flattened, will try again", "sandbox", b.id, "err", err)
			a.unflattened.Store(true)
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
