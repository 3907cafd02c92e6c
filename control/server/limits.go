package server

import (
	"context"
	"errors"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// autoPause turns a number from outside into how long a sandbox may be idle.
func autoPause(n float64) (time.Duration, error) {
	if n == 0 {
		return 0, nil
	}
	if n < sandbox.MinAutoPause.Seconds() || n > sandbox.MaxAutoPause.Seconds() || n != n {
		return 0, sandbox.Errorf(sandbox.KindInvalid, "auto_pause_seconds is %v, must be from %v to %v, or 0 for never",
			n, sandbox.MinAutoPause.Seconds(), sandbox.MaxAutoPause.Seconds())
	}
	return time.Duration(n * float64(time.Second)), nil
}

// setTimeout changes how long a sandbox may run and idle: on the host, which
// enforces it, and then in the database. If we die in between, the reconciler
// copies the deadline. A paused sandbox has none: it gets its time when it is
// resumed, and this resumes nothing.
func (s *Server) setTimeout(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	limits, err := readLimits(w, r)
	if err != nil {
		return err
	}
	ctx, done, _, err := s.enterIf(r.Context(), id, s.there)
	if err != nil {
		return err
	}
	defer done()
	for {
		row, err := s.cfg.Store.Sandbox(ctx, id)
		if err != nil {
			return err
		}
		after, again, err := s.limit(ctx, row, limits)
		switch {
		case err != nil:
			return err
		case !again:
			return ok(w, sandboxOut(after))
		}
	}
}

// readLimits reads what is to change. A timeout that is given as zero is out of
// bounds; only one that is left out stays as it is.
func readLimits(w http.ResponseWriter, r *http.Request) (store.Limits, error) {
	var body struct {
		api.Timeout
		TimeoutSeconds *float64 `json:"timeout_seconds"` // hides the field of the same name
	}
	if err := readBody(w, r, &body); err != nil {
		return store.Limits{}, err
	}
	out := store.Limits{AutoResume: body.AutoResume}
	if body.TimeoutSeconds != nil {
		d, err := seconds("timeout_seconds", *body.TimeoutSeconds, sandbox.MinTimeout, sandbox.MaxTimeout)
		if err != nil {
			return out, err
		}
		out.Timeout = &d
	}
	if body.AutoPauseSeconds != nil {
		d, err := autoPause(*body.AutoPauseSeconds)
		if err != nil {
			return out, err
		}
		out.AutoPause = &d
	}
	if out == (store.Limits{}) {
		return out, sandbox.Errorf(sandbox.KindInvalid, "nothing is given: timeout_seconds, auto_pause_seconds or auto_resume")
	}
	return out, nil
}

// limit applies limits to a sandbox as its row says it is; again says that it is
// something else by now.
func (s *Server) limit(ctx context.Context, row store.Sandbox, l store.Limits) (_ store.Sandbox, again bool, _ error) {
	switch row.State {
	case sandbox.Running:
		deadline, err := s.limitOnHost(ctx, row, l)
		if sandbox.Is(hostapi.FromConnect(err), sandbox.KindPaused) { // by itself
			if err := s.reconciler.Check(ctx); err != nil {
				return row, false, err
			}
			return row, true, s.pass(ctx, 20*time.Millisecond)
		}
		if err != nil {
			return row, false, s.hostError(ctx, row.ID, err)
		}
		l.Deadline = deadline
	case sandbox.Paused:
	case sandbox.Pausing, sandbox.Resuming:
		return row, true, s.settle(ctx, row)
	default:
		return row, false, callable(row)
	}
	after, err := s.cfg.Store.SetLimits(ctx, row, l)
	if errors.Is(err, store.ErrStale) {
		return row, true, nil
	}
	return after, false, err
}

// limitOnHost returns the deadline that the host keeps from now on; nil if it is
// the one before.
func (s *Server) limitOnHost(ctx context.Context, row store.Sandbox, l store.Limits) (*time.Time, error) {
	if l.Timeout == nil && l.AutoPause == nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.CallLimit)
	defer cancel()
	req := &hostv1.SetDeadlineRequest{Id: string(row.ID)}
	var deadline *time.Time
	if l.Timeout != nil {
		at := s.cfg.Now().Add(*l.Timeout)
		deadline, req.Deadline = &at, timestamppb.New(at)
	}
	if l.AutoPause != nil {
		idle := int64(*l.AutoPause)
		req.AutoPauseNanos = &idle
	}
	_, err := s.cfg.Host.SetDeadline(ctx, connect.NewRequest(req))
	return deadline, err
}
