package server

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/reconcile"
	"github.com/dormouse-sandbox/dormouse/control/store"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// pauseSandbox pauses a sandbox and answers when that is durable. One that is
// paused already is what was asked for.
func (s *Server) pauseSandbox(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	end, err := s.pause(r.Context(), id)
	if err != nil {
		return err
	}
	return answerChange(w, end)
}

func answerChange(w http.ResponseWriter, end outcome) error {
	out := sandboxOut(end.row)
	out.Phases, out.Report = end.phases, end.report
	return ok(w, out)
}

// pause brings a sandbox to rest, whatever else changes it just now.
func (s *Server) pause(ctx context.Context, id sandbox.ID) (outcome, error) {
	for {
		row, err := s.cfg.Store.Sandbox(ctx, id)
		if err != nil {
			return outcome{}, err
		}
		switch row.State {
		case sandbox.Paused:
			return outcome{row: row}, nil
		case sandbox.Pausing, sandbox.Resuming:
			if c := s.changes.find(id); c != nil && c.to == sandbox.Pausing {
				return c.wait(ctx) // it is under way, with all that its answer has
			}
			if err := s.settle(ctx, row); err != nil {
				return outcome{}, err
			}
			continue
		case sandbox.Running:
		default:
			return outcome{}, callable(row)
		}
		c, err := s.startChange(ctx, row, sandbox.Pausing, s.pauseRow)
		if errors.Is(err, errUnderWay) || errors.Is(err, store.ErrStale) {
			if err := s.pass(ctx, time.Millisecond); err != nil {
				return outcome{}, err
			}
			continue
		}
		if err != nil {
			return outcome{}, err
		}
		return c.wait(ctx)
	}
}

// pass lets whoever has changed a row, or is about to, go first.
func (s *Server) pass(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-s.ctx.Done():
		return errStopping
	}
}

// pauseRow takes a row that is pausing to paused, or back.
func (s *Server) pauseRow(ctx context.Context, row store.Sandbox) (outcome, error) {
	start := s.cfg.Now()
	if err := fault.Point(ctx, "control/pause/marked"); err != nil {
		return outcome{}, err
	}
	resp, err := s.cfg.Host.PauseSandbox(ctx, connect.NewRequest(&hostv1.PauseSandboxRequest{Id: string(row.ID)}))
	if err != nil {
		s.meters.change("pause", err, 0)
		return outcome{}, s.changeFailed(ctx, row, func(ctx context.Context, row store.Sandbox) (store.Sandbox, error) {
			return s.cfg.Store.SetState(ctx, row, sandbox.Running)
		}, err)
	}
	if err := fault.Point(ctx, "control/pause/paused"); err != nil {
		return outcome{}, err
	}
	after, err := s.cfg.Store.Paused(ctx, row, reconcile.PauseOf(resp.Msg.GetStatus()))
	if errors.Is(err, store.ErrStale) {
		after, err = s.overtaken(ctx, row.ID, sandbox.Paused)
	}
	if err != nil {
		return outcome{}, err
	}
	took := s.cfg.Now().Sub(start)
	s.meters.change("pause", nil, took)
	s.cfg.Log.Info("state changed", "sandbox", row.ID, "host", row.Host, "op", "pause", "to", after.State, "took", took)
	return outcome{after, phasesOut(resp.Msg.GetReport().GetPhases()), reportOut(resp.Msg.GetReport())}, nil
}

// resumeSandbox runs a paused sandbox again. One that runs is left as it is.
func (s *Server) resumeSandbox(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	var req api.Resume
	if err := readOptional(w, r, &req); err != nil {
		return err
	}
	wish := wish{env: req.Env}
	if req.TimeoutSeconds != nil {
		if wish.timeout, err = seconds("timeout_seconds", *req.TimeoutSeconds, sandbox.MinTimeout, sandbox.MaxTimeout); err != nil {
			return err
		}
	}
	if err := sandbox.CheckEnv(req.Env); err != nil {
		return err
	}
	end, err := s.resume(r.Context(), id, wish)
	if err != nil {
		return err
	}
	return answerChange(w, end)
}

// wish is what a resume is asked to change.
type wish struct {
	timeout time.Duration // 0: what it had
	env     map[string]string
}

// resume brings a sandbox to run, whatever else changes it just now.
func (s *Server) resume(ctx context.Context, id sandbox.ID, want wish) (outcome, error) {
	for {
		row, err := s.cfg.Store.Sandbox(ctx, id)
		if err != nil {
			return outcome{}, err
		}
		switch row.State {
		case sandbox.Running:
			held, err := s.hold(ctx, row)
			if held || err != nil {
				return outcome{row: row}, err
			}
			continue // its host had paused it by itself
		case sandbox.Pausing, sandbox.Resuming:
			if c := s.changes.find(id); c != nil && c.to == sandbox.Resuming && len(want.env) == 0 && want.timeout == 0 {
				return c.wait(ctx)
			}
			if err := s.settle(ctx, row); err != nil {
				return outcome{}, err
			}
			continue
		case sandbox.Paused:
		default:
			return outcome{}, callable(row)
		}
		env := maps.Clone(row.Spec.Env)
		maps.Copy(env, want.env)
		if err := sandbox.CheckEnv(env); err != nil {
			return outcome{}, err
		}
		c, err := s.startChange(ctx, row, sandbox.Resuming, func(ctx context.Context, row store.Sandbox) (outcome, error) {
			return s.resumeRow(ctx, row, want)
		})
		if errors.Is(err, errUnderWay) || errors.Is(err, store.ErrStale) {
			if err := s.pass(ctx, time.Millisecond); err != nil {
				return outcome{}, err
			}
			continue
		}
		if err != nil {
			return outcome{}, err
		}
		return c.wait(ctx)
	}
}

// resumeRow takes a row that is resuming to running, or back. As after a create
// its life starts when it runs: until then the host has a later deadline.
func (s *Server) resumeRow(ctx context.Context, row store.Sandbox, want wish) (outcome, error) {
	start, timeout := s.cfg.Now(), row.Timeout
	if want.timeout > 0 {
		timeout = want.timeout
	}
	if err := fault.Point(ctx, "control/resume/marked"); err != nil {
		return outcome{}, err
	}
	deadline := start.Add(min(s.cfg.ChangeLimit+timeout, sandbox.MaxTimeout))
	resp, err := s.cfg.Host.ResumeSandbox(ctx, connect.NewRequest(&hostv1.ResumeSandboxRequest{
		Id: string(row.ID), Deadline: timestamppb.New(deadline), Env: want.env,
	}))
	if err != nil {
		s.meters.change("resume", err, 0)
		return outcome{}, s.changeFailed(ctx, row, s.cfg.Store.StillPaused, err)
	}
	if err := fault.Point(ctx, "control/resume/resumed"); err != nil {
		return outcome{}, err
	}
	if at, err := s.bound(ctx, row, timeout); err == nil {
		deadline = at
	} else { // it runs: an early end of that would be worse than a late one
		s.cfg.Log.Warn("deadline after a resume is late", "sandbox", row.ID, "op", "resume", "deadline", deadline, "err", err)
	}
	if err := fault.Point(ctx, "control/resume/bounded"); err != nil {
		return outcome{}, err
	}
	after, err := s.cfg.Store.Runs(ctx, row, store.Run{Deadline: deadline, Timeout: timeout, Start: sandbox.StartResume, Env: want.env})
	if errors.Is(err, store.ErrStale) {
		after, err = s.overtaken(ctx, row.ID, sandbox.Running)
	}
	if err != nil {
		return outcome{}, err
	}
	took := s.cfg.Now().Sub(start)
	s.meters.change("resume", nil, took)
	s.cfg.Log.Info("state changed", "sandbox", row.ID, "host", row.Host, "op", "resume", "to", after.State, "took", took)
	return outcome{row: after, phases: phasesOut(resp.Msg.GetPhases())}, nil
}

// bound tells the host for how long a sandbox may run from now on, and how long
// idle.
func (s *Server) bound(ctx context.Context, row store.Sandbox, timeout time.Duration) (time.Time, error) {
	deadline, idle := s.cfg.Now().Add(timeout), int64(row.AutoPause)
	_, err := s.cfg.Host.SetDeadline(ctx, connect.NewRequest(
		&hostv1.SetDeadlineRequest{Id: string(row.ID), Deadline: timestamppb.New(deadline), AutoPauseNanos: &idle}))
	return deadline, err
}
