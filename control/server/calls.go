package server

import (
	"context"
	"sync"
	"time"

	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// calls are the calls into sandboxes that are under way, so that they end when
// their sandbox, their API key or the server does, whatever the host does.
type calls struct {
	wg sync.WaitGroup

	mu      sync.Mutex
	stopped error
	open    map[*call]struct{}
}

// call is one of them.
type call struct {
	id     sandbox.ID
	key    string // the ID of the API key; empty: a connection that several calls share
	cancel context.CancelCauseFunc
}

func (c *calls) init() { c.open = map[*call]struct{}{} }

// begin ties a call to its sandbox and its key. The caller must call done.
func (c *calls) begin(parent context.Context, key string, id sandbox.ID) (ctx context.Context, done func(), err error) {
	ctx, cancel := context.WithCancelCause(parent)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped != nil {
		cancel(c.stopped)
		return nil, nil, c.stopped
	}
	one := &call{id, key, cancel}
	c.open[one] = struct{}{}
	c.wg.Add(1)
	return ctx, func() {
		cancel(nil)
		c.mu.Lock()
		delete(c.open, one)
		c.mu.Unlock()
		c.wg.Done()
	}, nil
}

// end cancels every call that matches, with the reason.
func (c *calls) end(why error, matches func(*call) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for one := range c.open {
		if matches(one) {
			one.cancel(why)
		}
	}
}

// close cancels every call and lets no new one begin.
func (c *calls) close(why error) {
	c.mu.Lock()
	c.stopped = why
	c.mu.Unlock()
	c.end(why, func(*call) bool { return true })
}

func (c *calls) wait() { c.wg.Wait() }

func (c *calls) any() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.open) > 0
}

// enter sees to it that a sandbox can be called, resuming it if need be, and ties
// the call to it, and to the key in the context. The row is read after the call is
// on the list, so that an end in between is not missed.
func (s *Server) enter(parent context.Context, id sandbox.ID) (context.Context, func(), error) {
	ctx, done, _, err := s.enterRow(parent, id)
	return ctx, done, err
}

// enterRow is enter, for those who want to know more of the sandbox.
func (s *Server) enterRow(parent context.Context, id sandbox.ID) (context.Context, func(), store.Sandbox, error) {
	return s.enterIf(parent, id, s.awake)
}

// enterIf is enterRow with a condition of the caller's own.
func (s *Server) enterIf(parent context.Context, id sandbox.ID, may func(context.Context, sandbox.ID) (store.Sandbox, error)) (context.Context, func(), store.Sandbox, error) {
	ctx, done, err := s.calls.begin(parent, askingKey(parent).ID, id)
	if err != nil {
		return nil, nil, store.Sandbox{}, err
	}
	row, err := may(ctx, id)
	if err != nil {
		if why := whyEnded(ctx); why != nil {
			err = why
		}
		done()
		return nil, nil, row, err
	}
	return ctx, done, row, nil
}

// running is the condition of calls that only look: they wake nobody.
func (s *Server) running(ctx context.Context, id sandbox.ID) (store.Sandbox, error) {
	row, err := s.cfg.Store.Sandbox(ctx, id)
	if err == nil {
		err = callable(row)
	}
	return row, err
}

// there is the condition of calls that do not reach into the sandbox.
func (s *Server) there(ctx context.Context, id sandbox.ID) (store.Sandbox, error) {
	row, err := s.cfg.Store.Sandbox(ctx, id)
	if err == nil && !asleep(row.State) {
		err = callable(row)
	}
	return row, err
}

// asleep says of a state that a call brings the sandbox back from it.
func asleep(s sandbox.State) bool {
	return s == sandbox.Pausing || s == sandbox.Paused || s == sandbox.Resuming
}

// callable says why a sandbox cannot be called now.
func callable(row store.Sandbox) error {
	switch {
	case row.State == sandbox.Running:
		return nil
	case row.State.Ended():
		return endedError(row)
	case row.State == sandbox.Paused:
		return pausedError(row)
	case row.State == sandbox.Unreachable:
		return sandbox.Errorf(sandbox.KindTransient, "sandbox %s is unreachable: its host does not answer", row.ID)
	}
	return sandbox.Errorf(sandbox.KindConflict, "sandbox %s is %s, it must be running", row.ID, row.State)
}

func endedError(row store.Sandbox) error {
	return sandbox.Errorf(sandbox.KindConflict, "sandbox %s is %s: it ended with cause %s", row.ID, row.State, row.Cause)
}

// hostError makes an error of the host one for the client. Where the host may
// mean that the sandbox has ended, the database learns that first: the client
// then gets the cause instead of what the loss looked like.
func (s *Server) hostError(ctx context.Context, id sandbox.ID, err error) error {
	if why := whyEnded(ctx); why != nil {
		return why
	}
	if s.ctx.Err() != nil {
		return errStopping
	}
	err = hostapi.FromConnect(err)
	switch sandbox.KindOf(err) {
	case sandbox.KindNotFound, sandbox.KindConflict, sandbox.KindPaused, sandbox.KindTransient, sandbox.KindInternal:
	default:
		return err
	}
	if ctx.Err() != nil {
		return err // the client is gone; nobody waits for a better reason
	}
	// Not with ctx: the end of the sandbox, which is looked for, ends that too.
	look, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if s.reconciler.Check(look) != nil {
		return err // the host does not answer, which is what err says already
	}
	switch row, rowErr := s.cfg.Store.Sandbox(look, id); {
	case rowErr == nil && row.State.Ended():
		return endedError(row)
	case rowErr == nil && sandbox.Is(err, sandbox.KindPaused):
		return pausedError(row)
	}
	return err
}

// whyEnded is the reason for which a call was ended from here, if it was.
func whyEnded(ctx context.Context) error {
	cause := context.Cause(ctx)
	if sandbox.Is(cause, sandbox.KindConflict) || sandbox.Is(cause, sandbox.KindUnauthorized) {
		return cause
	}
	return nil
}
