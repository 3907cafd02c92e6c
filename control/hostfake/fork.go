package hostfake

import (
	"context"
	"maps"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// ForkSandbox implements the contract. The hook is asked as "ForkSandbox.copy"
// for each copy, with its ID; its error is that copy's.
func (h *Host) ForkSandbox(ctx context.Context, req *connect.Request[hostv1.ForkSandboxRequest]) (*connect.Response[hostv1.ForkSandboxResponse], error) {
	if err := h.enter(ctx, "ForkSandbox", req.Msg.GetId()); err != nil {
		return nil, err
	}
	out, err := apart(ctx, func(ctx context.Context) (*hostv1.ForkSandboxResponse, error) { return h.fork(ctx, req.Msg) })
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

func (h *Host) fork(ctx context.Context, req *hostv1.ForkSandboxRequest) (*hostv1.ForkSandboxResponse, error) {
	if n := len(req.GetCopies()); n < 1 || n > sandbox.MaxForks {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "there are %d copies, must be from 1 to %d", n, sandbox.MaxForks)
	}
	b, release, err := h.own(req.GetId())
	if err != nil {
		return nil, err
	}
	defer release()
	point, files, report, err := h.point(b)
	if err != nil {
		return nil, err
	}
	out := &hostv1.ForkSandboxResponse{Report: report}
	for _, c := range req.GetCopies() {
		out.Copies = append(out.Copies, h.copy(ctx, point, files, b.line, c))
	}
	return out, nil
}

// point keeps the current state of a running box, which runs on.
func (h *Host) point(b *box) (*hostv1.SandboxStatus, map[string]file, *hostv1.SaveReport, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := b.callable(); err != nil {
		return nil, nil, nil, err
	}
	if h.refuse != nil {
		return nil, nil, nil, h.refuse
	}
	saved, report := b.save()
	report.Phases = timed(liveSteps...)
	point := clone(b.status)
	point.Saved = saved
	b.status.Saved = saved // what changes from now on is told from here
	return point, maps.Clone(b.files), report, nil
}

// copy makes one copy from a point.
func (h *Host) copy(ctx context.Context, point *hostv1.SandboxStatus, files map[string]file, line string, c *hostv1.ForkSandboxRequest_Copy) *hostv1.ForkSandboxResponse_Copy {
	if _, err := sandbox.ParseID(c.GetId()); err != nil {
		return &hostv1.ForkSandboxResponse_Copy{Failure: failure(err)}
	}
	status := clone(point)
	status.State, status.CreatedAt, status.Start = hostv1.State_STATE_CREATING, timestamppb.Now(), string(sandbox.StartFork)
	status.Spec.Id, status.Spec.Hostname, status.Spec.Deadline = c.GetId(), c.GetHostname(), c.GetDeadline()
	status.Spec.AutoPauseNanos, status.Spec.Env = c.GetAutoPauseNanos(), over(status.Spec.GetEnv(), c.GetEnv())
	h.mu.Lock()
	if there, ok := h.boxes[c.GetId()]; ok {
		defer h.mu.Unlock()
		return &hostv1.ForkSandboxResponse_Copy{Status: clone(there.status)}
	}
	b := newBox(status)
	b.files, b.line = maps.Clone(files), line
	h.boxes[c.GetId()] = b
	h.mu.Unlock()

	err := h.at(ctx, "ForkSandbox.copy", c.GetId())
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil && b.life.Err() != nil {
		err = sandbox.Errorf(sandbox.KindConflict, "sandbox %s ended during its fork", c.GetId())
	}
	if err != nil {
		b.finish(sandbox.CauseCreateFailed, err.Error())
		return &hostv1.ForkSandboxResponse_Copy{Status: clone(b.status), Failure: failure(err)}
	}
	b.status.State = hostv1.State_STATE_RUNNING
	b.status.Phases = []*hostv1.Phase{{Name: "restore", Nanos: int64(time.Millisecond)}}
	return &hostv1.ForkSandboxResponse_Copy{Status: clone(b.status)}
}

func failure(err error) *hostv1.Failure {
	return &hostv1.Failure{Kind: string(sandbox.KindOf(err)), Message: err.Error()}
}
