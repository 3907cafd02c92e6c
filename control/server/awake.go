package server

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// holdFor is for how long a host must not pause a sandbox by itself that a call is
// on its way to.
const holdFor = 15 * time.Second

// awake brings a sandbox to where it can be called: it resumes a paused one whose
// policy allows that, and waits for a pause or a resume that is under way.
func (s *Server) awake(ctx context.Context, id sandbox.ID) (store.Sandbox, error) {
	for {
		row, err := s.cfg.Store.Sandbox(ctx, id)
		if err != nil {
			return row, err
		}
		switch row.State {
		case sandbox.Running:
			held, err := s.hold(ctx, row)
			if held || err != nil {
				return row, err
			}
		case sandbox.Pausing, sandbox.Resuming:
			if err := s.settle(ctx, row); err != nil {
				return row, err
			}
		case sandbox.Paused:
			if !row.AutoResume {
				return row, pausedError(row)
			}
			if _, err := s.resume(ctx, id, wish{}); err != nil {
				return row, fmt.Errorf("resume sandbox %s for this call: %w", id, err)
			}
		default:
			return row, callable(row)
		}
	}
}

// hold says whether a sandbox that is on record as running can be called. One that
// pauses by itself may have done so, or be about to: its host is told that a call
// is coming. If it is paused, the record says so afterwards.
func (s *Server) hold(ctx context.Context, row store.Sandbox) (held bool, _ error) {
	if row.AutoPause == 0 {
		return true, nil
	}
	call, cancel := context.WithTimeout(ctx, s.cfg.CallLimit)
	defer cancel()
	_, err := s.cfg.Host.TouchSandbox(call, connect.NewRequest(
		&hostv1.TouchSandboxRequest{Id: string(row.ID), HoldNanos: int64(holdFor)}))
	switch kind := sandbox.KindOf(hostapi.FromConnect(err)); {
	case err == nil, kind == sandbox.KindUnsupported:
		return true, nil
	case kind == sandbox.KindPaused:
		if err := s.reconciler.Check(call); err != nil {
			return false, err
		}
		return false, s.pass(ctx, 20*time.Millisecond) // it may be at it still
	}
	return false, s.hostError(ctx, row.ID, err)
}

func pausedError(row store.Sandbox) error {
	return sandbox.Errorf(sandbox.KindPaused, "sandbox %s is paused: resume it with POST /v1/sandboxes/%s/resume (dormouse resume %s)",
		row.ID, row.ID, row.ID)
}
