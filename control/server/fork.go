package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// forking is one fork under way: a creation for each copy, and what the original's
// share took.
type forking struct {
	of     sandbox.ID
	copies []*creation
	rows   []store.Sandbox

	// Valid once every copy is done.
	phases []api.Phase
	report *api.SaveReport
}

// forkSandbox makes copies of a sandbox, which runs on, or finds those that the
// same idempotency key made, and answers when all have come to an end.
func (s *Server) forkSandbox(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	var req api.Fork
	if err := readOptional(w, r, &req); err != nil {
		return err
	}
	idem, err := idempotency(r, struct {
		Of   sandbox.ID
		Fork api.Fork
	}{id, req})
	if err != nil {
		return err
	}
	if idem != nil {
		earlier, found, err := s.cfg.Store.RepeatedFork(r.Context(), *idem, s.cfg.Now())
		if err != nil {
			return err
		}
		if found {
			return s.answerFork(w, r, earlier, nil, http.StatusOK)
		}
	}
	if err := checkFork(req); err != nil {
		return err
	}
	ctx, done, of, err := s.enterRow(r.Context(), id)
	if err != nil {
		return err
	}
	defer done()
	copies, err := s.copiesOf(of, req)
	if err != nil {
		return err
	}
	f, rows, err := s.beginFork(ctx, of, copies, idem)
	if err != nil {
		return err
	}
	status := http.StatusCreated
	if f == nil {
		status = http.StatusOK
	}
	return s.answerFork(w, r, rows, f, status)
}

func checkFork(req api.Fork) error {
	if n := count(req); n < 1 || n > sandbox.MaxForks {
		return sandbox.Errorf(sandbox.KindInvalid, "count is %d, must be from 1 to %d", n, sandbox.MaxForks)
	}
	return sandbox.CheckMetadata(req.Metadata)
}

func count(req api.Fork) int {
	if req.Count == nil {
		return 1
	}
	return *req.Count
}

// copiesOf makes the rows of copies. What the request leaves out they have from
// the original.
func (s *Server) copiesOf(of store.Sandbox, req api.Fork) ([]store.Sandbox, error) {
	one := store.Sandbox{
		State: sandbox.Creating, Host: of.Host, Spec: of.Spec, Metadata: of.Metadata, CreatedAt: s.cfg.Now(),
		Timeout: of.Timeout, AutoPause: of.AutoPause, AutoResume: of.AutoResume, ForkedFrom: of.ID,
	}
	one.Work = store.Work{Owner: s.owner, Until: one.CreatedAt.Add(s.cfg.CreateLimit)}
	if req.Metadata != nil {
		one.Metadata = req.Metadata
	}
	var err error
	if req.TimeoutSeconds != nil {
		if one.Timeout, err = seconds("timeout_seconds", *req.TimeoutSeconds, sandbox.MinTimeout, sandbox.MaxTimeout); err != nil {
			return nil, err
		}
	}
	if req.AutoPauseSeconds != nil {
		if one.AutoPause, err = autoPause(*req.AutoPauseSeconds); err != nil {
			return nil, err
		}
	}
	if req.AutoResume != nil {
		one.AutoResume = *req.AutoResume
	}
	one.Spec.Env = maps.Clone(of.Spec.Env)
	maps.Copy(one.Spec.Env, req.Env)
	if err := sandbox.CheckEnv(one.Spec.Env); err != nil {
		return nil, err
	}
	out := make([]store.Sandbox, count(req))
	for i := range out {
		out[i] = one
		out[i].ID = sandbox.NewID()
	}
	return out, nil
}

// beginFork puts the copies on record and begins to make them. From here on it
// does not depend on the request. When the idempotency key turns out to be in use
// it begins nothing and returns the copies of that time, with a nil fork.
func (s *Server) beginFork(ctx context.Context, of store.Sandbox, copies []store.Sandbox, idem *store.Idempotency) (*forking, []store.Sandbox, error) {
	life, cancel := context.WithCancelCause(s.ctx)
	f := &forking{of: of.ID}
	s.creates.mu.Lock()
	if s.creates.closed {
		s.creates.mu.Unlock()
		cancel(nil)
		return nil, nil, errStopping
	}
	for _, row := range copies {
		one := &creation{cancel: func(error) {}, done: make(chan struct{})}
		f.copies = append(f.copies, one)
		s.creates.byID[row.ID] = one
	}
	s.wg.Add(1)
	s.creates.mu.Unlock()

	rows, made, err := s.cfg.Store.CreateCopies(context.WithoutCancel(ctx), copies, idem)
	if err != nil || !made {
		for _, row := range copies {
			s.creates.remove(row.ID)
		}
		cancel(nil)
		s.wg.Done()
		return nil, rows, err
	}
	f.rows = rows
	go func() {
		defer s.wg.Done()
		defer cancel(nil)
		s.fork(life, f)
		s.reconciler.Kick() // the host's records of failures can be acknowledged
	}()
	return f, rows, nil
}

// fork has the host make the copies, and takes each to running or to failed.
func (s *Server) fork(ctx context.Context, f *forking) {
	start := s.cfg.Now()
	ctx, cancel := context.WithTimeout(ctx, s.cfg.CreateLimit)
	defer cancel()
	resp, err := s.askFork(ctx, f)
	s.meters.change("fork", err, s.cfg.Now().Sub(start))
	if err == nil {
		f.phases, f.report = phasesOut(resp.GetReport().GetPhases()), reportOut(resp.GetReport())
	}
	for i, one := range f.copies {
		row := f.rows[i]
		if err != nil {
			one.row, one.err = s.createFailed(ctx, row, err)
		} else {
			one.row, one.phases, one.err = s.copied(ctx, row, resp.GetCopies()[i])
		}
	}
	s.cfg.Log.Info("forked", "sandbox", f.of, "op", "fork", "copies", len(f.copies), "took", s.cfg.Now().Sub(start), "err", err)
	for i, one := range f.copies { // all at once: an answer needs every one
		s.creates.remove(f.rows[i].ID)
		close(one.done)
	}
}

func (s *Server) askFork(ctx context.Context, f *forking) (*hostv1.ForkSandboxResponse, error) {
	if err := fault.Point(ctx, "control/fork/recorded"); err != nil {
		return nil, err
	}
	req := &hostv1.ForkSandboxRequest{Id: string(f.of)}
	for _, row := range f.rows {
		until := s.cfg.Now().Add(min(s.cfg.CreateLimit+row.Timeout, sandbox.MaxTimeout))
		req.Copies = append(req.Copies, &hostv1.ForkSandboxRequest_Copy{
			Id: string(row.ID), Hostname: string(row.ID), Deadline: timestamppb.New(until), Env: row.Spec.Env, AutoPauseNanos: int64(row.AutoPause),
		})
	}
	resp, err := s.cfg.Host.ForkSandbox(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, hostapi.FromConnect(err)
	}
	if got := len(resp.Msg.GetCopies()); got != len(f.rows) {
		return nil, fmt.Errorf("fork: the host answered for %d of %d copies", got, len(f.rows))
	}
	return resp.Msg, fault.Point(ctx, "control/fork/forked")
}

// copied takes one copy that the host has answered for to its end.
func (s *Server) copied(ctx context.Context, row store.Sandbox, c *hostv1.ForkSandboxResponse_Copy) (store.Sandbox, []api.Phase, error) {
	var err error
	after := row
	switch failed := c.GetFailure(); {
	case failed != nil:
		err = sandbox.WithKind(knownKind(failed.GetKind()), errors.New(failed.GetMessage()))
	case c.GetStatus().GetState() == hostv1.State_STATE_ENDED:
		err = sandbox.Errorf(sandbox.KindConflict, "it ended during its fork")
	default:
		after, err = s.created(ctx, row, c.GetStatus())
	}
	if err != nil {
		after, err = s.createFailed(ctx, row, err)
	}
	if err != nil {
		return after, nil, err
	}
	s.meters.creates.WithLabelValues("running").Inc()
	return after, phasesOut(c.GetStatus().GetPhases()), nil
}

// knownKind is a kind that came over the wire as text.
func knownKind(text string) sandbox.Kind {
	for _, kind := range sandbox.Kinds() {
		if string(kind) == text {
			return kind
		}
	}
	return sandbox.KindInternal
}

// answerFork waits for the copies, whoever makes them, and answers with each one's
// end. f is nil when another request or another process forks. When no copy came
// to run the answer is the first one's error.
func (s *Server) answerFork(w http.ResponseWriter, r *http.Request, rows []store.Sandbox, f *forking, status int) error {
	out := api.Forked{Copies: []api.Copy{}}
	var first error
	running := 0
	for i, row := range rows {
		c := s.creates.find(row.ID)
		if f != nil {
			c = f.copies[i]
		}
		after, phases, err := s.outcome(r.Context(), c, row.ID)
		if r.Context().Err() != nil {
			return r.Context().Err()
		}
		if err != nil {
			d := detail(err, requestID(r))
			out.Copies = append(out.Copies, api.Copy{Error: &d})
			first = errors.Join(first, err)
			continue
		}
		running++
		one := sandboxOut(after)
		one.Phases = phases
		out.Copies = append(out.Copies, api.Copy{Sandbox: &one})
	}
	if running == 0 {
		return noCopies(len(rows), first)
	}
	if f != nil {
		out.Phases, out.Report = f.phases, f.report
	}
	writeJSON(w, status, out)
	return nil
}

// noCopies is the error of a fork that made nothing; all is of all its copies.
func noCopies(n int, all error) error {
	var one *aboutSandbox
	if !errors.As(all, &one) {
		return all
	}
	return &aboutSandbox{one.id, &told{sandbox.Errorf(sandbox.KindOf(one.err), "none of %d copies could be made; of the first: %w", n, one.err)}}
}
