package host

import (
	"os"
	"path/filepath"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const (
	houseTick      = 250 * time.Millisecond // how late a deadline may fire
	consoleKept    = 24 * time.Hour         // console logs of ended sandboxes
	maxUnacked     = 30 * 24 * time.Hour    // an end that nobody acknowledged is forgotten
	consoleSweepIn = 10 * time.Minute
)

// keepHouse fires deadlines, and goes on with what failed before. It compares
// wall-clock times each tick: a machine that slept is late for nothing.
func (a *Agent) keepHouse() {
	tick := time.NewTicker(houseTick)
	defer tick.Stop()
	var retried, consoles time.Time
	for {
		select {
		case <-a.ctx.Done():
			return
		case <-tick.C:
		}
		now := a.cfg.Now()
		a.fireDeadlines(now)
		if now.Sub(retried) >= a.cfg.RetryEvery {
			retried = now
			a.retry(now)
		}
		if now.Sub(consoles) >= consoleSweepIn {
			consoles = now
			a.sweepConsoles(now)
		}
	}
}

func (a *Agent) fireDeadlines(now time.Time) {
	for _, b := range a.all() {
		e := b.now()
		if e.State != stateRunning || now.Before(e.Deadline) || b.alive.Err() != nil {
			continue
		}
		a.log.Info("deadline passed", "sandbox", b.id, "deadline", e.Deadline)
		b.die(errEnding(b.id, sandbox.CauseTTL, ""))
		a.wg.Go(func() {
			if err := a.end(a.ctx, b, sandbox.CauseTTL, ""); err != nil {
				a.log.Error("sandbox not removed yet", "sandbox", b.id, "err", err)
			}
		})
	}
}

// retry goes on with sandboxes that could not be removed or adopted.
func (a *Agent) retry(now time.Time) {
	stranded := false
	for _, b := range a.all() {
		e := b.now()
		switch {
		case e.State == stateDestroying, e.State == stateRunning && b.alive.Err() != nil:
			a.goOnEnding(b, e)
		case e.State == stateRunning && b.unattended():
			a.takeOver(a.ctx, b)
			stranded = stranded || b.unattended()
		case e.State == stateEnded && now.Sub(e.EndedAt) > maxUnacked:
			if err := a.forget(b); err != nil {
				a.log.Warn("ended sandbox not forgotten", "sandbox", b.id, "err", err)
			}
		}
	}
	a.sweepAtLast(stranded)
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

// sweepAtLast does the sweep that stranded sandboxes held back.
func (a *Agent) sweepAtLast(stranded bool) {
	a.mu.Lock()
	due := a.unswept && !stranded
	if due {
		a.unswept = false
	}
	a.mu.Unlock()
	if !due {
		return
	}
	if err := a.sweep(a.ctx); err != nil {
		a.log.Error("sweep", "err", err)
		a.setUnswept()
	}
}

// unattended says that the agent has no handle on a running sandbox.
func (b *box) unattended() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.entry.State == stateRunning && b.guest == nil
}

func (a *Agent) sweepConsoles(now time.Time) {
	dir := filepath.Join(a.cfg.Dir, "consoles")
	entries, err := os.ReadDir(dir)
	if err != nil {
		a.log.Warn("console logs not swept", "err", err)
		return
	}
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && now.Sub(info.ModTime()) > consoleKept {
			_ = os.Remove(filepath.Join(dir, e.Name())) // the next sweep tries again
		}
	}
}
