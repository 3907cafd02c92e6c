package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// An adopted guest that does not answer is asked to go on after wakeAgain, and then
// ever more seldom.
const (
	wakeAgain  = 100 * time.Millisecond
	wakeSeldom = 30 * time.Second
)

// ResumeRequest says what to resume.
type ResumeRequest struct {
	ID       sandbox.ID
	Deadline time.Time         // the new one
	Env      map[string]string // added to what it has
}

// Resume runs a paused sandbox on from where it stopped. After an error it is
// still paused, as it was: nothing that it goes on from is ever changed. Resuming
// one that runs is success, and changes nothing.
func (a *Agent) Resume(ctx context.Context, req ResumeRequest) (Status, []Phase, error) {
	b, err := a.box(string(req.ID))
	if err != nil {
		return Status{}, nil, err
	}
	b.op.Lock()
	defer b.op.Unlock()
	if b.now().State == stateRunning && b.alive.Err() == nil && !a.isClosed() {
		return b.status(), nil, nil
	}
	if err := a.resumable(b, req); err != nil {
		return Status{}, nil, err
	}
	if err := a.resume(ctx, b, req); err != nil {
		return Status{}, nil, fmt.Errorf("resume %s: %w", b.id, err)
	}
	return b.status(), b.now().Phases, nil
}

// resumable says whether a paused sandbox can run on; the caller holds op.
func (a *Agent) resumable(b *box, req ResumeRequest) error {
	e := b.now()
	switch {
	case a.isClosed():
		return errClosing
	case b.alive.Err() != nil:
		return context.Cause(b.alive)
	case e.State != statePaused:
		return errNotRunning(e)
	case a.cfg.Snapshots == nil:
		return errNoStore
	}
	if err := sandbox.CheckTimeout(req.Deadline.Sub(a.cfg.Now()).Round(time.Second)); err != nil {
		return fmt.Errorf("deadline: %w", err)
	}
	if free := a.freeMiB(); free < a.cfg.MinFreeMiB {
		return sandbox.Errorf(sandbox.KindNoSpace, "the host has %d MiB of free disk, resumes need %d", free, a.cfg.MinFreeMiB)
	}
	return a.fits(e.Last)
}

// resume takes a paused sandbox to running, or back to paused.
func (a *Agent) resume(ctx context.Context, b *box, req ResumeRequest) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(b.alive, func() { cancel(context.Cause(b.alive)) })()
	defer context.AfterFunc(a.ctx, func() { cancel(errClosing) })()

	watch := newStopwatch(a.cfg.Now)
	if !b.now().cleared() { // its pause could not clear up
		if err := a.clear(ctx, b); err != nil {
			return fmt.Errorf("clear up after the pause: %w", err)
		}
	}
	if err := a.admit(b, stateResuming); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.resumeFailed(ctx, b))
		}
	}()
	if err := a.move(ctx, b, "resume-intent", "host/resume/intent", func(e *entry) {
		e.State, e.Token, e.Deadline = stateResuming, newToken(), req.Deadline
		e.Spec.Env = mergeEnv(e.Spec.Env, req.Env)
	}); err != nil {
		return err
	}
	watch.lap("journal")
	e := b.now()
	m, g, err := a.bootInTurn(ctx, plan{entry: e, from: e.Last, start: sandbox.StartResume}, watch)
	b.machine = m
	if err != nil {
		return err
	}
	if err := a.publish(ctx, b, g, e.Last, sandbox.StartResume, watch); err != nil {
		rollback := errors.Join(g.close(), m.remove(ctx))
		if rollback == nil {
			b.machine = nil
		}
		return errors.Join(err, rollback)
	}
	a.attend(b, m)
	a.log.Info("sandbox resumed", "sandbox", b.id, "generation", e.Last.Generation, "took", total(watch.phases))
	return nil
}

// resumeFailed takes a sandbox back to paused. What could not be rolled back is
// left to the house-keeping.
func (a *Agent) resumeFailed(ctx context.Context, b *box) error {
	back := func(e *entry) {
		if e.State = statePaused; b.machine == nil {
			e.Token = "" // it was all rolled back
		}
	}
	if b.now().State != stateResuming { // its intent was not even written
		b.set(back)
	}
	ctx = context.WithoutCancel(ctx)
	if err := a.move(ctx, b, "resume-undone", "host/resume/undone", back); err != nil {
		b.set(back) // after a crash resuming is paused all the same
		return fmt.Errorf("note that it is paused again: %w", err)
	}
	return nil
}

// admit gives a sandbox its place among those that run, if there is one. It sets
// the state in memory alone.
func (a *Agent) admit(b *box, next state) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return errClosing
	}
	if err := a.hasRoom(b.now().Spec); err != nil {
		return err
	}
	b.set(func(e *entry) { e.State = next })
	return nil
}

// attend looks after a VM that has begun to run.
func (a *Agent) attend(b *box, m *machine) {
	awake := b.awakened()
	a.wg.Go(func() { a.watch(b, m.vm, awake) })
}

// wakeGuest lets the processes of an adopted guest run, in case that an earlier
// agent died while it had them frozen. It tries until the guest answers: one whose
// VM stands still for want of space does so when there is some. A pause ends that
// first (see still): it freezes them itself.
func (a *Agent) wakeGuest(b *box, g *guest) {
	ctx, cancel := a.while(context.Background(), b.awakened())
	over := make(chan struct{})
	b.mu.Lock()
	b.endWaking = func() { cancel(); <-over }
	b.mu.Unlock()
	a.wg.Go(func() {
		defer close(over)
		defer cancel()
		for wait := wakeAgain; ; wait = min(2*wait, wakeSeldom) {
			err := a.wakeOnce(ctx, b, g)
			if err == nil || ctx.Err() != nil {
				return
			}
			a.log.Warn("adopted guest not woken, will try again", "sandbox", b.id, "err", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
		}
	})
}

func (a *Agent) wakeOnce(ctx context.Context, b *box, g *guest) error {
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	return errors.Join(fault.Point(ctx, "host/adopt/wake"), g.thaw(ctx, a.key, b.id, a.cfg.Now()))
}
