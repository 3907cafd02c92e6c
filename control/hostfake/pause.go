package hostfake

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Compat is what the fake's VMs need to be run again.
const Compat = "fake 1"

// apart runs a verb that goes on when its caller goes away.
func apart[T any](ctx context.Context, verb func(context.Context) (T, error)) (T, error) {
	type outcome struct {
		value T
		err   error
	}
	ended := make(chan outcome, 1)
	go func() {
		value, err := verb(context.WithoutCancel(ctx))
		ended <- outcome{value, err}
	}()
	select {
	case o := <-ended:
		return o.value, hostapi.ToConnect(o.err)
	case <-ctx.Done():
		var none T
		return none, hostapi.ToConnect(sandbox.WithKind(sandbox.KindTransient, ctx.Err()))
	}
}

// own takes a sandbox for one verb.
func (h *Host) own(id string) (*box, func(), error) {
	h.mu.Lock()
	b, err := h.find(id)
	h.mu.Unlock()
	if err != nil {
		return nil, nil, err
	}
	b.op <- struct{}{}
	return b, func() { <-b.op }, nil
}

// at asks the hook in the middle of a verb, which is not counted as a call.
func (h *Host) at(ctx context.Context, step, id string) error {
	h.mu.Lock()
	hook := h.hook
	h.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(ctx, step, id)
}

// save makes the next pause point of a box; the caller holds mu.
func (b *box) save() (*hostv1.Saved, *hostv1.SaveReport) {
	spec, before := b.status.GetSpec(), b.status.GetSaved()
	generation := before.GetGeneration() + 1
	name := fmt.Sprintf("%s-%d", spec.GetId(), generation)
	return &hostv1.Saved{
		Vcpus: spec.GetVcpus(), MemMib: spec.GetMemMib(), DiskMib: spec.GetDiskMib(), Compat: Compat, Generation: generation,
		MemoryDigest: "memory-" + name, DiskDigest: "disk-" + name, ParentDigest: before.GetMemoryDigest(),
		MemoryBytes: 40 << 20, DiskBytes: 8 << 20, OwnBytes: 2<<20 + uint64(len(b.files))<<12, Durability: string(sandbox.DurableLocal),
		At: timestamppb.Now(),
	}, &hostv1.SaveReport{StoppedNanos: int64(20 * time.Millisecond), ChangedPages: 300, ChangedBlocks: 40, DirtyPages: 500, DirtyBlocks: 50, BytesWritten: 2 << 20}
}

// timed is what a verb took, step by step.
func timed(steps ...sandbox.SavePhase) (phases []*hostv1.Phase) {
	for i, step := range steps {
		phases = append(phases, &hostv1.Phase{Name: string(step), Nanos: int64(i+1) * int64(time.Millisecond)})
	}
	return phases
}

var (
	pauseSteps = []sandbox.SavePhase{
		sandbox.PhaseFreeze, sandbox.PhaseDeviceState, sandbox.PhaseDirtyScan, sandbox.PhaseCompare, sandbox.PhasePublish,
	}
	liveSteps = sandbox.SavePhases()
)

// TouchSandbox implements the contract.
func (h *Host) TouchSandbox(ctx context.Context, req *connect.Request[hostv1.TouchSandboxRequest]) (*connect.Response[hostv1.TouchSandboxResponse], error) {
	if err := h.enter(ctx, "TouchSandbox", req.Msg.GetId()); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	b, err := h.find(req.Msg.GetId())
	if err == nil {
		err = b.callable()
	}
	if err != nil {
		return nil, hostapi.ToConnect(err)
	}
	b.held = time.Now().Add(time.Duration(req.Msg.GetHoldNanos()))
	return connect.NewResponse(&hostv1.TouchSandboxResponse{}), nil
}

// PauseSandbox implements the contract. The hook is asked as "PauseSandbox.save"
// while the sandbox is STATE_PAUSING, and its error is the pause's.
func (h *Host) PauseSandbox(ctx context.Context, req *connect.Request[hostv1.PauseSandboxRequest]) (*connect.Response[hostv1.PauseSandboxResponse], error) {
	id := req.Msg.GetId()
	if err := h.enter(ctx, "PauseSandbox", id); err != nil {
		return nil, err
	}
	out, err := apart(ctx, func(ctx context.Context) (*hostv1.PauseSandboxResponse, error) {
		return h.pause(ctx, id, sandbox.PauseUser)
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

// PauseIdle does what a host does when a sandbox has been idle for long enough,
// if it is idle and may be paused, and says whether it is paused now.
func (h *Host) PauseIdle(ctx context.Context, id string) bool {
	h.mu.Lock()
	b, err := h.find(id)
	idle := err == nil && b.callable() == nil && b.active == 0 && !time.Now().Before(b.held) && b.status.GetSpec().GetAutoPauseNanos() > 0
	h.mu.Unlock()
	if !idle {
		return false
	}
	_, err = h.pause(ctx, id, sandbox.PauseIdle)
	if err != nil {
		h.mu.Lock()
		defer h.mu.Unlock()
		b.status.AutoPauseError = err.Error()
	}
	return err == nil
}

func (h *Host) pause(ctx context.Context, id string, reason sandbox.PauseReason) (*hostv1.PauseSandboxResponse, error) {
	b, release, err := h.own(id)
	if err != nil {
		return nil, err
	}
	defer release()
	h.mu.Lock()
	if b.status.State == hostv1.State_STATE_PAUSED {
		defer h.mu.Unlock()
		return &hostv1.PauseSandboxResponse{Status: clone(b.status)}, nil
	}
	if err := b.callable(); err != nil {
		h.mu.Unlock()
		return nil, err
	}
	if reason == sandbox.PauseIdle && (b.active > 0 || time.Now().Before(b.held)) {
		h.mu.Unlock()
		return nil, sandbox.Errorf(sandbox.KindConflict, "sandbox %s is not idle any more", id)
	}
	b.status.State = hostv1.State_STATE_PAUSING
	b.cut(sandbox.Errorf(sandbox.KindConflict, "sandbox %s was paused", id))
	h.mu.Unlock()

	err = h.at(ctx, "PauseSandbox.save", id)
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case b.status.State == hostv1.State_STATE_ENDED:
		return nil, b.callable()
	case err == nil:
		err = h.refuse
	}
	if err != nil {
		b.status.State = hostv1.State_STATE_RUNNING
		b.wake()
		return nil, err
	}
	saved, report := b.save()
	report.Phases, report.StoppedNanos = timed(pauseSteps...), 0
	b.status.State, b.status.Saved, b.status.PausedAt, b.status.PauseReason = hostv1.State_STATE_PAUSED, saved, timestamppb.Now(), string(reason)
	b.status.Spec.Deadline, b.status.AutoPauseError = nil, ""
	return &hostv1.PauseSandboxResponse{Status: clone(b.status), Report: report}, nil
}

// ResumeSandbox implements the contract. The hook is asked as
// "ResumeSandbox.restore" while the sandbox is STATE_RESUMING.
func (h *Host) ResumeSandbox(ctx context.Context, req *connect.Request[hostv1.ResumeSandboxRequest]) (*connect.Response[hostv1.ResumeSandboxResponse], error) {
	if err := h.enter(ctx, "ResumeSandbox", req.Msg.GetId()); err != nil {
		return nil, err
	}
	out, err := apart(ctx, func(ctx context.Context) (*hostv1.ResumeSandboxResponse, error) { return h.resume(ctx, req.Msg) })
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

func (h *Host) resume(ctx context.Context, req *hostv1.ResumeSandboxRequest) (*hostv1.ResumeSandboxResponse, error) {
	b, release, err := h.own(req.GetId())
	if err != nil {
		return nil, err
	}
	defer release()
	h.mu.Lock()
	switch b.status.State {
	case hostv1.State_STATE_RUNNING:
		defer h.mu.Unlock()
		return &hostv1.ResumeSandboxResponse{Status: clone(b.status)}, nil
	case hostv1.State_STATE_PAUSED:
	default:
		defer h.mu.Unlock()
		return nil, b.callable()
	}
	b.status.State = hostv1.State_STATE_RESUMING
	h.mu.Unlock()

	err = h.at(ctx, "ResumeSandbox.restore", req.GetId())
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case b.status.State == hostv1.State_STATE_ENDED:
		return nil, b.callable()
	case err == nil:
		err = h.refuse
	}
	if err != nil {
		b.status.State = hostv1.State_STATE_PAUSED
		return nil, err
	}
	b.status.State, b.status.Start = hostv1.State_STATE_RUNNING, string(sandbox.StartResume)
	b.status.PausedAt, b.status.PauseReason = nil, ""
	b.status.Spec.Deadline = req.GetDeadline()
	b.status.Spec.Env = over(b.status.Spec.GetEnv(), req.GetEnv())
	b.wake()
	return &hostv1.ResumeSandboxResponse{Status: clone(b.status), Phases: []*hostv1.Phase{
		{Name: "restore", Nanos: int64(time.Millisecond)}, {Name: "identity", Nanos: int64(time.Millisecond)},
	}}, nil
}

// over is an environment with another one on top.
func over(under, top map[string]string) map[string]string {
	out := map[string]string{}
	for _, env := range []map[string]string{under, top} {
		for name, value := range env {
			out[name] = value
		}
	}
	return out
}

// Refuse makes every pause, resume, fork and snapshot fail at its last step; nil
// ends that.
func (h *Host) Refuse(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refuse = err
}
