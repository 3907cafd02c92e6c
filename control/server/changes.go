package server

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// change is one pause or resume under way. It belongs to the server, not to the
// request that asked for it.
type change struct {
	to   sandbox.State // Pausing or Resuming
	done chan struct{} // closed when the fields below are set
	end  outcome
	err  error
}

// outcome is what whoever waits for a change is answered.
type outcome struct {
	row    store.Sandbox
	phases []api.Phase
	report *api.SaveReport
}

// wait waits for the end of a change, or for whoever waits to leave.
func (c *change) wait(ctx context.Context) (outcome, error) {
	select {
	case <-c.done:
		return c.end, c.err
	case <-ctx.Done():
		return outcome{}, ctx.Err() // nobody reads this answer; the change goes on
	}
}

// changes are those of this process that are under way: one for each sandbox.
type changes struct {
	mu     sync.Mutex
	closed bool
	byID   map[sandbox.ID]*change
}

func (c *changes) init() { c.byID = map[sandbox.ID]*change{} }

func (c *changes) find(id sandbox.ID) *change {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byID[id]
}

func (c *changes) remove(id sandbox.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.byID, id)
}

func (c *changes) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
}

// errUnderWay says that a sandbox is being changed: whoever wants it otherwise
// looks again afterwards.
var errUnderWay = errors.New("a change of the sandbox is under way")

// startChange puts a change on record and begins it. The registration comes first:
// a row that is pausing or resuming and that nobody owns is the reconciler's.
func (s *Server) startChange(ctx context.Context, row store.Sandbox, to sandbox.State, work func(context.Context, store.Sandbox) (outcome, error)) (*change, error) {
	c := &change{to: to, done: make(chan struct{})}
	s.changes.mu.Lock()
	switch {
	case s.changes.closed:
		s.changes.mu.Unlock()
		return nil, errStopping
	case s.changes.byID[row.ID] != nil:
		s.changes.mu.Unlock()
		return nil, errUnderWay
	}
	s.changes.byID[row.ID] = c
	s.wg.Add(1)
	s.changes.mu.Unlock()

	limit := s.cfg.ChangeLimit
	err := fault.Point(ctx, "control/change/begin")
	var begun store.Sandbox
	if err == nil {
		begun, err = s.cfg.Store.Begin(context.WithoutCancel(ctx), row, to, store.Work{Owner: s.owner, Until: s.cfg.Now().Add(limit)})
	}
	if err != nil {
		s.changes.remove(row.ID)
		s.wg.Done()
		return nil, err
	}
	go func() {
		defer s.wg.Done()
		life, cancel := context.WithTimeout(s.ctx, limit)
		defer cancel()
		c.end, c.err = work(life, begun)
		s.changes.remove(row.ID)
		close(c.done)
		s.reconciler.Kick() // what could not be recorded is settled from the host's report
	}()
	return c, nil
}

// settle waits until a change that is under way, here or in another process, is
// over. One whose process died is ended by the reconciler.
func (s *Server) settle(ctx context.Context, row store.Sandbox) error {
	if c := s.changes.find(row.ID); c != nil {
		_, err := c.wait(ctx)
		if ctx.Err() != nil {
			return err
		}
		return nil // how it ended is in the row
	}
	_, err := s.afterwards(ctx, row.ID, row.State)
	return err
}

// afterwards waits until a sandbox has left a state.
func (s *Server) afterwards(ctx context.Context, id sandbox.ID, state sandbox.State) (store.Sandbox, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		row, err := s.cfg.Store.Sandbox(ctx, id)
		if err != nil || row.State != state {
			return row, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return row, ctx.Err()
		case <-s.ctx.Done():
			return row, errStopping
		}
	}
}

// changeFailed sees to a sandbox whose pause or resume came to nothing. Where the
// host has said so, the sandbox is what it was, or has ended; where nobody knows,
// it stays on record as it is and the reconciler asks the host.
func (s *Server) changeFailed(ctx context.Context, row store.Sandbox, back func(context.Context, store.Sandbox) (store.Sandbox, error), err error) error {
	if s.ctx.Err() != nil {
		return errStopping
	}
	answered := hostapi.Answered(err)
	err = hostapi.FromConnect(err)
	s.cfg.Log.Warn("change failed", "sandbox", row.ID, "host", row.Host, "op", row.State, "answered", answered, "err", err)
	if !answered {
		return sandbox.WithKind(sandbox.KindTransient, err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.CallLimit)
	defer cancel()
	if _, recordErr := back(ctx, row); recordErr != nil && !errors.Is(recordErr, store.ErrStale) {
		return errors.Join(err, recordErr)
	}
	if sandbox.Is(err, sandbox.KindConflict) || sandbox.Is(err, sandbox.KindNotFound) {
		_ = s.reconciler.Check(ctx) // best effort: whether it has ended; the next pass sees it otherwise
		if now, rowErr := s.cfg.Store.Sandbox(ctx, row.ID); rowErr == nil && now.State.Ended() {
			return endedError(now)
		}
	}
	return err
}

// overtaken tells what became of a sandbox that somebody else changed while the
// host did what it was asked to.
func (s *Server) overtaken(ctx context.Context, id sandbox.ID, want sandbox.State) (store.Sandbox, error) {
	_ = s.reconciler.Check(ctx) // best effort: the row is looked at as it is
	row, err := s.cfg.Store.Sandbox(ctx, id)
	switch {
	case err != nil:
		return row, err
	case row.State == want:
		return row, nil
	case row.State.Ended():
		return row, endedError(row)
	}
	return row, sandbox.Errorf(sandbox.KindConflict, "sandbox %s is %s now: somebody else has changed it meanwhile", id, row.State)
}

// reportOut is what saving cost; nil when nothing was saved.
func reportOut(m *hostv1.SaveReport) *api.SaveReport {
	if m == nil {
		return nil
	}
	return &api.SaveReport{
		StoppedMillis: millis(time.Duration(m.GetStoppedNanos())),
		ChangedPages:  figure(m.GetChangedPages()), ChangedBlocks: figure(m.GetChangedBlocks()),
		DirtyPages: figure(m.GetDirtyPages()), DirtyBlocks: figure(m.GetDirtyBlocks()), BytesWritten: figure(m.GetBytesWritten()),
	}
}

// figure keeps a number from wrapping round.
func figure(n uint64) int64 { return int64(min(n, 1<<62)) }

func savedOut(s store.Saved) *api.Saved {
	if !s.Kept() {
		return nil
	}
	return &api.Saved{
		At: s.At, Generation: s.Generation, MemoryBytes: s.MemoryBytes, DiskBytes: s.DiskBytes, OwnBytes: s.OwnBytes,
		Durability: string(s.Durability), MemoryDigest: s.MemoryDigest, DiskDigest: s.DiskDigest, ParentDigest: s.ParentDigest, Compat: s.Compat,
	}
}
