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
// their sandbox or the server does, whatever the host does.
type calls struct {
	wg sync.WaitGroup

	mu      sync.Mutex
	stopped error
	cancels map[sandbox.ID]map[*context.CancelCauseFunc]struct{}
}

func (c *calls) init() { c.cancels = map[sandbox.ID]map[*context.CancelCauseFunc]struct{}{} }

// begin ties a call to its sandbox. The caller must call done.
func (c *calls) begin(parent context.Context, id sandbox.ID) (ctx context.Context, done func(), err error) {
	ctx, cancel := context.WithCancelCause(parent)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped != nil {
		cancel(c.stopped)
		return nil, nil, c.stopped
	}
	if c.cancels[id] == nil {
		c.cancels[id] = map[*context.CancelCauseFunc]struct{}{}
	}
	c.cancels[id][&cancel] = struct{}{}
	c.wg.Add(1)
	return ctx, func() {
		cancel(nil)
		c.mu.Lock()
		delete(c.cancels[id], &cancel)
		if len(c.cancels[id]) == 0 {
			delete(c.cancels, id)
		}
		c.mu.Unlock()
		c.wg.Done()
	}, nil
}

// end cancels every call into a sandbox, with the reason.
func (c *calls) end(id sandbox.ID, why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for cancel := range c.cancels[id] {
		(*cancel)(why)
	}
}

// close cancels every call and lets no new one begin.
func (c *calls) close(why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = why
	for _, all := range c.cancels {
		for cancel := range all {
			(*cancel)(why)
		}
	}
}

func (c *calls) wait() { c.wg.Wait() }

// enter checks that a sandbox can be called and ties the call to it. The row is
// read after the call is on the list, so that an end in between is not missed.
func (s *Server) enter(parent context.Context, id sandbox.ID) (context.Context, func(), error) {
	ctx, done, err := s.calls.begin(parent, id)
	if err != nil {
		return nil, nil, err
	}
	row, err := s.cfg.Store.Sandbox(ctx, id)
	if err == nil {
		err = callable(row)
	}
	if err != nil {
		done()
		return nil, nil, err
	}
	return ctx, done, nil
}

// callable says why a sandbox cannot be called now.
func callable(row store.Sandbox) error {
	switch {
	case row.State == sandbox.Running:
		return nil
	case row.State.Ended():
		return endedError(row)
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
	case sandbox.KindNotFound, sandbox.KindConflict, sandbox.KindTransient, sandbox.KindInternal:
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
	if row, rowErr := s.cfg.Store.Sandbox(look, id); rowErr == nil && row.State.Ended() {
		return endedError(row)
	}
	return err
}

// whyEnded is the reason for which a call was ended from here, if it was.
func whyEnded(ctx context.Context) error {
	if cause := context.Cause(ctx); cause != nil && sandbox.Is(cause, sandbox.KindConflict) {
		return cause
	}
	return nil
}
