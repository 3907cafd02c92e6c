package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Freezer makes user processes stand still, all or none.
type Freezer interface {
	Freeze(context.Context) error
	Thaw() error
	// Idle says that there is none.
	Idle() (bool, error)
}

// stillness is whether user processes stand still, and since which life of the
// machine.
type stillness struct {
	turn  chan struct{} // holds one token; whoever has it may change what follows
	holds bool
	idle  bool        // nothing ran that could be frozen, and so nothing was
	life  string      // at the freeze; empty if it is not known
	limit *time.Timer // lets them go on when the host is not heard of any more
	round int         // which limit it is
}

func newStillness() *stillness {
	s := &stillness{turn: make(chan struct{}, 1)}
	s.turn <- struct{}{}
	return s
}

// take waits for the turn.
func (s *stillness) take(ctx context.Context) error {
	select {
	case <-s.turn:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *stillness) give() { s.turn <- struct{}{} }

func (s *stillness) stopLimit() {
	if s.limit != nil {
		s.limit.Stop()
		s.limit = nil
	}
}

func (a *Agent) serveFreeze(w http.ResponseWriter, r *http.Request) {
	var req guestapi.Freeze
	if !a.hostOnly(w, r, &req) {
		return
	}
	within, err := span("withinMs", req.WithinMs, guestapi.FreezeWithin)
	limit, err2 := span("thawAfterMs", req.ThawAfterMs, guestapi.FreezeLimit)
	if err = errors.Join(err, err2); err == nil {
		err = a.freeze(r.Context(), within, limit)
	}
	if err != nil {
		writeControlError(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// maxSpan bounds what the host may ask for.
const maxSpan = 24 * time.Hour

// span reads a number of milliseconds; zero is the default.
func span(name string, ms int64, otherwise time.Duration) (time.Duration, error) {
	switch {
	case ms == 0:
		return otherwise, nil
	case ms < 0 || ms > maxSpan.Milliseconds():
		return 0, sandbox.Errorf(sandbox.KindInvalid, "%s is %d, must be from 0 to %d", name, ms, maxSpan.Milliseconds())
	}
	return time.Duration(ms) * time.Millisecond, nil
}

func (a *Agent) serveThaw(w http.ResponseWriter, r *http.Request) {
	var req guestapi.Thaw
	if !a.hostOnly(w, r, &req) {
		return
	}
	at, err := parseTime(req.Timestamp)
	if err == nil {
		err = a.thaw(r.Context(), at)
	}
	if err != nil {
		writeControlError(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// freeze makes user processes stand still. It does not write file systems back:
// memory and disk are saved at the same instant, with what waits in memory for
// the disk, and the time of a sync would be time that the guest stands still.
func (a *Agent) freeze(ctx context.Context, within, limit time.Duration) error {
	life := a.life() // before anything stands still: it is asked of the disk
	if err := a.still.take(ctx); err != nil {
		return err
	}
	defer a.still.give()
	if err := a.freezeLocked(ctx, within); err != nil {
		return err
	}
	a.still.life = life
	a.still.stopLimit()
	a.still.round++
	round := a.still.round
	a.still.limit = time.AfterFunc(limit, func() { a.thawForlorn(round) })
	return nil
}

// freezeLocked is for whoever has the turn. Starts are held before processes are
// frozen, and let go after they are thawed.
func (a *Agent) freezeLocked(ctx context.Context, within time.Duration) error {
	switch {
	case a.cfg.Freezer == nil:
		return sandbox.Errorf(sandbox.KindUnsupported, "user processes cannot be frozen: this guest has no cgroup v2")
	case a.still.holds:
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if err := a.cfg.Exec.Hold(ctx); err != nil {
		return fmt.Errorf("wait for the start of a command: %w", err)
	}
	idle, err := a.cfg.Freezer.Idle()
	if err != nil || !idle {
		idle, err = false, a.cfg.Freezer.Freeze(ctx)
	}
	if err != nil {
		a.cfg.Exec.Release()
		return err
	}
	a.still.holds, a.still.idle = true, idle
	return nil
}

// thawLocked is for whoever has the turn.
func (a *Agent) thawLocked() error {
	if a.cfg.Freezer == nil {
		return nil
	}
	if !a.still.idle {
		if err := a.cfg.Freezer.Thaw(); err != nil {
			return fmt.Errorf("thaw: %w", err)
		}
	}
	a.cfg.Exec.Release()
	a.still.holds, a.still.idle = false, false
	a.still.stopLimit()
	return nil
}

// thaw lets the same sandbox go on. A copy does not: it has to be told who it is.
func (a *Agent) thaw(ctx context.Context, at time.Time) error {
	if err := a.still.take(ctx); err != nil {
		return err
	}
	defer a.still.give()
	if a.still.holds && a.restored() {
		return sandbox.Errorf(sandbox.KindConflict, "this machine was restored: it goes on when /init has told it who it is")
	}
	var errs []error
	if !at.IsZero() && a.cfg.Machine != nil {
		errs = append(errs, named("set the clock", a.cfg.Machine.SetClock(at)))
	}
	return errors.Join(append(errs, a.thawLocked())...)
}

// thawForlorn lets processes go on that the host has not thawed in time: it is
// dead. In a machine that was restored meanwhile they stay as they are: they would
// run as who they are not any more. One that does not know whether it was is taken
// for restored.
func (a *Agent) thawForlorn(round int) {
	_ = a.still.take(context.Background()) // cannot end
	defer a.still.give()
	if !a.still.holds || a.still.round != round {
		return
	}
	a.still.limit = nil
	if life := a.life(); life == "" || life != a.still.life {
		a.cfg.Log.Error("nobody tells this machine who it is, so its user processes stay frozen")
		return
	}
	a.cfg.Log.Error("the host has not thawed user processes in time: they go on")
	if err := a.thawLocked(); err != nil {
		a.cfg.Log.Error("thaw user processes", "err", err)
	}
}

// restored says that the machine has been restored since the freeze, as far as that
// is known.
func (a *Agent) restored() bool {
	if a.still.life == "" {
		return false
	}
	life := a.life()
	return life != "" && life != a.still.life
}

// life names the life of the machine since it was started or restored, or is empty.
// A machine that is none has one life.
func (a *Agent) life() string {
	if a.cfg.Machine == nil {
		return "a process"
	}
	life, err := a.cfg.Machine.Life()
	if err != nil {
		a.cfg.Log.Warn("which life of the machine this is", "err", err)
		return ""
	}
	return life
}

// named says what went wrong.
func named(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
