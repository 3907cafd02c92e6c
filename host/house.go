package host

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const (
	houseTick      = 250 * time.Millisecond // how late a deadline may fire
	consoleKept    = 24 * time.Hour         // console logs of ended sandboxes
	consolesKept   = 1000                   // how many of them, of 256 KiB at most
	maxUnacked     = 30 * 24 * time.Hour    // an end that nobody acknowledged is forgotten
	consoleSweepIn = time.Minute
)

// keepHouse fires deadlines, goes on with what failed before, and watches the
// disks. Each job has a
// goroutine of its own: a removal that hangs makes no deadline late.
func (a *Agent) keepHouse() {
	for _, job := range []struct {
		every time.Duration
		do    func(now time.Time)
	}{{houseTick, a.fireDeadlines}, {a.cfg.RetryEvery, a.retry}, {consoleSweepIn, a.sweepConsoles}, {spaceTick, a.watchSpace}, {damageTick, a.checkDisks}, {damageTick, func(now time.Time) { a.checkMemories(now).Wait() }}, {collectTick, a.collect}, {idleTick, a.pauseIdle}, {a.cfg.RetryEvery, a.flattenLong}} {
		a.wg.Go(func() { a.repeat(job.every, job.do) })
	}
}

// repeat does something until the agent closes. It hands over wall-clock times:
// a machine that slept is late for nothing.
func (a *Agent) repeat(every time.Duration, do func(now time.Time)) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for a.ctx.Err() == nil {
		do(a.cfg.Now())
		select {
		case <-a.ctx.Done():
		case <-tick.C:
		}
	}
}

func (a *Agent) fireDeadlines(now time.Time) {
	for _, b := range a.all() {
		if expired(b, now) && b.op.TryLock() { // somebody changes it just now: the next tick looks again
			a.fireDeadline(b, now)
			b.op.Unlock()
		}
	}
}

func expired(b *box, now time.Time) bool {
	e := b.now()
	return e.State == stateRunning && !now.Before(e.Deadline) && b.alive.Err() == nil
}

// fireDeadline begins the end of a sandbox; the caller holds op, so that nobody
// moves the deadline that has passed.
func (a *Agent) fireDeadline(b *box, now time.Time) {
	if !expired(b, now) {
		return
	}
	a.log.Info("deadline passed", "sandbox", b.id, "deadline", b.now().Deadline)
	b.die(errEnding(b.id, sandbox.CauseTTL, ""))
	a.wg.Go(func() {
		if err := a.end(a.ctx, b, sandbox.CauseTTL, ""); err != nil {
			a.log.Error("sandbox not removed yet", "sandbox", b.id, "err", err)
		}
	})
}

// retry goes on with sandboxes that could not be removed or adopted.
func (a *Agent) retry(now time.Time) {
	stranded := false
	for _, b := range a.all() {
		e := b.now()
		switch {
		case e.State == stateDestroying, e.State == stateRunning && b.alive.Err() != nil:
			a.goOnEnding(b, e)
		case e.State == statePaused:
			a.goOnClearing(b)
		case (e.State == stateRunning || e.State == statePausing) && b.unattended():
			a.takeOver(a.ctx, b)
			stranded = stranded || b.unattended()
		case e.State == stateEnded && (e.Build || now.Sub(e.EndedAt) > maxUnacked):
			if err := a.forget(b); err != nil {
				a.log.Warn("ended sandbox not forgotten", "sandbox", b.id, "err", err)
			}
		}
	}
	if err := a.sweepAtLast(a.ctx, stranded); err != nil {
		a.log.Error("sweep, will try again", "err", err)
	}
}

// goOnEnding tries again to remove a sandbox, unless somebody is at it.
func (a *Agent) goOnEnding(b *box, e entry) {
	if !b.op.TryLock() {
		return
	}
	b.op.Unlock()
	cause, detail := e.Cause, e.Detail
	if cause == "" { // its intent could not be written down: the context still knows
		cause, detail = causeOf(b)
	}
	if err := a.end(a.ctx, b, cause, detail); err != nil {
		a.log.Error("sandbox not removed yet", "sandbox", b.id, "err", err)
	}
}

// goOnClearing tries again to remove the machine of a paused sandbox, unless
// somebody is at it.
func (a *Agent) goOnClearing(b *box) {
	if !b.op.TryLock() {
		return
	}
	defer b.op.Unlock()
	if e := b.now(); e.State != statePaused || e.cleared() || a.isClosed() {
		return
	}
	if err := a.clear(a.ctx, b); err != nil {
		a.log.Error("paused sandbox not cleared yet", "sandbox", b.id, "err", err)
	}
}

// sweepAtLast does a sweep that failed, or that stranded sandboxes held back.
func (a *Agent) sweepAtLast(ctx context.Context, stranded bool) error {
	a.sweeping.Lock()
	defer a.sweeping.Unlock()
	a.mu.Lock()
	due := a.unswept && !stranded
	if due {
		a.unswept = false
	}
	a.mu.Unlock()
	if !due {
		return nil
	}
	err := a.sweep(ctx)
	if err != nil {
		a.setUnswept()
	}
	return err
}

// unattended says that the agent has no handle on a running sandbox.
func (b *box) unattended() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return (b.entry.State == stateRunning || b.entry.State == statePausing) && b.guest == nil
}

// sweepConsoles removes console logs that are too old, and of the others all but
// the newest.
func (a *Agent) sweepConsoles(now time.Time) {
	dir := filepath.Join(a.cfg.Dir, "consoles")
	entries, err := os.ReadDir(dir)
	if err != nil {
		a.log.Warn("console logs not swept", "err", err)
		return
	}
	var kept []fs.FileInfo
	for _, e := range entries {
		if info, err := e.Info(); err == nil { // else it is gone
			kept = append(kept, info)
		}
	}
	slices.SortFunc(kept, func(x, y fs.FileInfo) int { return y.ModTime().Compare(x.ModTime()) })
	for i, info := range kept {
		if i >= consolesKept || now.Sub(info.ModTime()) > consoleKept {
			_ = os.Remove(filepath.Join(dir, info.Name())) // the next sweep tries again
		}
	}
}
