package host

import (
	"context"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Idle is a running sandbox into which nobody has a call, a stream or a
// connection. Who asked for it has it paused after some time of that.

const (
	idleTick = 250 * time.Millisecond // how late an automatic pause may begin
	// An automatic pause that failed is tried again, later each time.
	idleRetryFirst, idleRetryMost = 5 * time.Second, 5 * time.Minute
	// maxHold bounds how long a call may be on its way.
	maxHold = time.Minute
)

// activity is what a sandbox is used for; guarded by its box's mu.
type activity struct {
	calls  int       // into the guest, that are under way
	last   time.Time // when the last one ended
	held   time.Time // no automatic pause before: somebody is on his way
	again  time.Time // when an automatic pause that failed is tried again
	failed int       // how often it has, one after the other
	why    string    // the last one
}

// enter counts a call until leave.
func (a *Agent) enter(b *box) (leave func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.use.calls++
	left := false
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if !left {
			left = true
			b.use.calls--
			b.use.last = a.cfg.Now()
		}
	}
}

// idleSince is when a running sandbox fell idle; zero while it is not. The caller
// holds b.mu.
func (b *box) idleSince() time.Time {
	if b.entry.State != stateRunning || b.guest == nil || b.use.calls > 0 {
		return time.Time{}
	}
	return b.use.last
}

// rests says that a sandbox is to be paused; the caller holds b.mu.
func (b *box) rests(now time.Time) bool {
	since := b.idleSince()
	return b.entry.AutoPause > 0 && !since.IsZero() && b.frozen == "" &&
		now.Sub(since) >= b.entry.AutoPause && !now.Before(b.use.held) && !now.Before(b.use.again)
}

// pauseIdle pauses what nobody has used for as long as was asked for. Whoever
// changes a sandbox just now is left alone.
func (a *Agent) pauseIdle(now time.Time) {
	if a.cfg.Snapshots == nil {
		return
	}
	for _, b := range a.all() {
		b.mu.Lock()
		due := b.rests(now)
		b.mu.Unlock()
		if due && b.op.TryLock() {
			a.wg.Go(func() {
				defer b.op.Unlock()
				a.autoPause(b)
			})
		}
	}
}

// autoPause pauses an idle sandbox; the caller holds op. That it fails ends
// nothing.
func (a *Agent) autoPause(b *box) {
	b.mu.Lock()
	due := b.rests(a.cfg.Now())
	b.mu.Unlock()
	if !due || a.isClosed() || b.alive.Err() != nil {
		return
	}
	_, err := a.pause(a.ctx, b, sandbox.PauseIdle)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil {
		b.use.failed, b.use.why = 0, ""
		return
	}
	wait := min(idleRetryFirst<<min(b.use.failed, 10), idleRetryMost)
	b.use.again = a.cfg.Now().Add(wait)
	b.use.failed++
	b.use.why = printable(err.Error())
	a.log.Warn("idle sandbox not paused, it runs on", "sandbox", b.id, "again_in", wait, "err", err)
}

// usedMeanwhile is why an automatic pause that has begun is given up.
func (a *Agent) usedMeanwhile(b *box, why sandbox.PauseReason) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if why == sandbox.PauseIdle && (b.use.calls > 0 || a.cfg.Now().Before(b.use.held)) {
		return sandbox.Errorf(sandbox.KindBusy, "it is in use again")
	}
	return nil
}

// Touch says that a call is on its way: for as long as it is held, a sandbox is not
// paused automatically.
func (a *Agent) Touch(ctx context.Context, id string, hold time.Duration) error {
	if hold < 0 || hold > maxHold {
		return sandbox.Errorf(sandbox.KindInvalid, "hold is %v, must be from 0 to %v", hold, maxHold)
	}
	b, err := a.box(id)
	if err != nil {
		return err
	}
	_, _, cancel, err := a.guestOf(ctx, b)
	if err != nil {
		return err
	}
	defer cancel()
	b.mu.Lock()
	defer b.mu.Unlock()
	if until := a.cfg.Now().Add(hold); until.After(b.use.held) {
		b.use.held = until
	}
	return nil
}
