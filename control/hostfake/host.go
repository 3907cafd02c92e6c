// Package hostfake is a host in memory for the tests of control: it speaks the
// whole of hostapi, runs a few made-up commands, and breaks on request. Where it
// serves an empty disk and no VM it does what the contract says: a create is
// idempotent by ID, an end is reported until it was acknowledged, a stream whose
// caller goes away kills its command, an upload that breaks off leaves no file, a
// pause interrupts what is under way and keeps the files, a copy has those that the
// original had at that moment.
package hostfake

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1/hostv1connect"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Hook is called at the beginning of every call with the method's name. Its
// error is the call's; it may wait for ctx or for the test.
type Hook func(ctx context.Context, method, id string) error

// Host is the fake. The zero value is not ready; use New.
type Host struct {
	mu        sync.Mutex
	hook      Hook
	boxes     map[string]*box
	info      *hostv1.GetHostResponse
	templates []*hostv1.Template
	snapshots map[string]*snapshot
	damage    map[string][]*hostv1.VerifySnapshotResponse_Damage
	refuse    error // of what makes or needs a pause point
	counts    map[string]int
	processes int
	pids      uint32
	started   *hostv1.ExecStreamRequest_Start
	dial      Dial
	watch     Watch
	conns     int
}

// box is one sandbox.
type box struct {
	status *hostv1.SandboxStatus
	files  map[string]file

	terminals map[uint32]*terminal

	life context.Context // ends with the sandbox
	end  func()

	op    chan struct{}   // held by the verb that saves or runs it: one at a time
	awake context.Context // ends with the sandbox and with its pause, which is the cause
	cut   context.CancelCauseFunc

	active int       // calls under way
	held   time.Time // until then it is not paused for being idle
	line   string    // the nearest snapshot above it
}

var _ hostv1connect.HostServiceHandler = (*Host)(nil)

// New makes a host with 8 GiB for sandboxes and the template "base".
func New() *Host {
	return &Host{
		boxes:  map[string]*box{},
		counts: map[string]int{}, snapshots: map[string]*snapshot{}, damage: map[string][]*hostv1.VerifySnapshotResponse_Damage{},
		pids: 100,
		info: &hostv1.GetHostResponse{
			Name: "fake", Version: "test", Vmm: "fake", Accelerator: "tcg", AcceleratorReason: "it is a fake",
			Cpus: 2, MemTotalMib: 8192, MemAvailableMib: 8192, DiskFreeMib: 1 << 20, MaxSandboxes: 100, Instance: "fake1", DiskDriver: "qcow",
		},
		templates: []*hostv1.Template{{
			Name: "base", Digest: "d", SizeBytes: 1 << 20, MinDiskMib: 512, DefaultUser: "user", BuiltAt: timestamppb.Now(),
		}},
	}
}

// Serve serves the host on loopback over HTTP/2 until the test ends, and returns
// its client.
func (h *Host) Serve(t testing.TB) hostv1connect.HostServiceClient {
	t.Helper()
	mux := http.NewServeMux()
	mux.Handle(hostv1connect.NewHostServiceHandler(h))
	srv := httptest.NewUnstartedServer(mux)
	srv.EnableHTTP2 = true
	srv.StartTLS()
	client := srv.Client()
	t.Cleanup(func() {
		client.CloseIdleConnections()
		srv.CloseClientConnections()
		srv.Close()
	})
	// Compressing what stays on the machine costs more than it saves.
	return hostv1connect.NewHostServiceClient(client, srv.URL, connect.WithAcceptCompression("gzip", nil, nil))
}

// SetHook breaks the host; nil mends it.
func (h *Host) SetHook(hook Hook) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hook = hook
}

// Count says how often a method was called.
func (h *Host) Count(method string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.counts[method]
}

// Processes says how many commands run now.
func (h *Host) Processes() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.processes
}

// SetMemory changes how much memory the host has, and how much is promised.
func (h *Host) SetMemory(total, committed int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.info.MemTotalMib, h.info.MemCommittedMib = uint64(total), uint64(committed)
}

// Status is what the host would report of a sandbox; nil if it has no record.
func (h *Host) Status(id string) *hostv1.SandboxStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	if b, ok := h.boxes[id]; ok {
		return clone(b.status)
	}
	return nil
}

// Running lists the IDs of what is not ended.
func (h *Host) Running() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for id, b := range h.boxes {
		if b.status.State != hostv1.State_STATE_ENDED {
			out = append(out, id)
		}
	}
	return out
}

// Crash ends a sandbox by itself.
func (h *Host) Crash(id string, cause sandbox.Cause, detail string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if b, ok := h.boxes[id]; ok {
		b.finish(cause, detail)
	}
}

// Freeze makes a sandbox stand still, or go on.
func (h *Host) Freeze(id string, why sandbox.Freeze) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if b, ok := h.boxes[id]; ok {
		b.status.Frozen = string(why)
	}
}

// Forget makes the host lose every record, as if its disk had been wiped.
func (h *Host) Forget() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, b := range h.boxes {
		b.end()
		delete(h.boxes, id)
	}
}

// Plant puts a sandbox there that nobody asked for.
func (h *Host) Plant(status *hostv1.SandboxStatus) {
	h.mu.Lock()
	defer h.mu.Unlock()
	b := newBox(status)
	h.boxes[status.GetSpec().GetId()] = b
	if status.State == hostv1.State_STATE_ENDED {
		b.end()
	}
}

func newBox(status *hostv1.SandboxStatus) *box {
	b := &box{status: status, files: map[string]file{}, op: make(chan struct{}, 1)}
	life, end := context.WithCancelCause(context.Background())
	b.life, b.end = life, func() { end(sandbox.Errorf(sandbox.KindConflict, "sandbox %s has ended", status.GetSpec().GetId())) }
	b.wake()
	return b
}

// wake lets calls in; the caller holds mu.
func (b *box) wake() { b.awake, b.cut = context.WithCancelCause(b.life) }

// finish ends a box; the caller holds mu. The first cause stays.
func (b *box) finish(cause sandbox.Cause, detail string) {
	if b.status.State == hostv1.State_STATE_ENDED {
		return
	}
	b.status.State, b.status.Cause, b.status.CauseDetail = hostv1.State_STATE_ENDED, string(cause), detail
	b.status.EndedAt = timestamppb.Now()
	b.status.Saved, b.status.PausedAt, b.status.PauseReason = nil, nil, ""
	b.end()
}

func clone(s *hostv1.SandboxStatus) *hostv1.SandboxStatus {
	out, ok := proto.Clone(s).(*hostv1.SandboxStatus)
	if !ok {
		panic("a clone of another type")
	}
	return out
}

// enter counts a call and lets the hook break it.
func (h *Host) enter(ctx context.Context, method, id string) error {
	h.mu.Lock()
	h.counts[method]++
	hook := h.hook
	h.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hostapi.ToConnect(hook(ctx, method, id))
}

// running finds a running sandbox.
func (h *Host) running(id string) (*box, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	b, err := h.find(id)
	if err == nil {
		err = b.callable()
	}
	return b, hostapi.ToConnect(err)
}

// find finds a box; the caller holds mu.
func (h *Host) find(id string) (*box, error) {
	b, ok := h.boxes[id]
	if !ok {
		return nil, sandbox.Errorf(sandbox.KindNotFound, "the host has no sandbox %s", id)
	}
	return b, nil
}

// callable says why a box cannot be called; the caller holds mu.
func (b *box) callable() error {
	id := b.status.GetSpec().GetId()
	switch b.status.State {
	case hostv1.State_STATE_RUNNING:
		return nil
	case hostv1.State_STATE_PAUSING, hostv1.State_STATE_PAUSED, hostv1.State_STATE_RESUMING:
		return sandbox.Errorf(sandbox.KindPaused, "sandbox %s is paused", id)
	case hostv1.State_STATE_ENDED:
		return sandbox.Errorf(sandbox.KindConflict, "sandbox %s has ended (%s)", id, b.status.Cause)
	}
	return sandbox.Errorf(sandbox.KindConflict, "sandbox %s is not running", id)
}

// visit begins a call into a running sandbox: it is activity until done, and its
// context ends with the caller's, with the sandbox and with its pause.
func (h *Host) visit(ctx context.Context, id string) (_ *box, _ context.Context, done func(), _ error) {
	h.mu.Lock()
	b, err := h.find(id)
	if err == nil {
		err = b.callable()
	}
	if err != nil {
		h.mu.Unlock()
		return nil, nil, nil, hostapi.ToConnect(err)
	}
	b.active++
	awake := b.awake
	h.mu.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(awake, func() { cancel(context.Cause(awake)) })
	return b, ctx, func() {
		stop()
		cancel(nil)
		h.mu.Lock()
		defer h.mu.Unlock()
		b.active--
	}, nil
}

// GetHost implements the contract.
func (h *Host) GetHost(ctx context.Context, _ *connect.Request[hostv1.GetHostRequest]) (*connect.Response[hostv1.GetHostResponse], error) {
	if err := h.enter(ctx, "GetHost", ""); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	out, ok := proto.Clone(h.info).(*hostv1.GetHostResponse)
	if !ok {
		return nil, errors.New("a clone of another type")
	}
	return connect.NewResponse(out), nil
}

// CreateSandbox implements the contract.
func (h *Host) CreateSandbox(ctx context.Context, req *connect.Request[hostv1.CreateSandboxRequest]) (*connect.Response[hostv1.CreateSandboxResponse], error) {
	spec := req.Msg.GetSpec()
	id := spec.GetId()
	if _, err := sandbox.ParseID(id); err != nil {
		return nil, hostapi.ToConnect(err)
	}
	if req.Msg.GetNoStart() {
		h.count("unstarted", 1)
	}
	b := h.reserve(spec)
	if err := h.enter(ctx, "CreateSandbox", id); err != nil {
		h.Crash(id, sandbox.CauseCreateFailed, "")
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := b.life.Err(); err != nil || ctx.Err() != nil {
		b.finish(sandbox.CauseCreateFailed, "cancelled")
		return nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindConflict, "sandbox %s ended during its create", id))
	}
	if err := h.begin(b); err != nil {
		b.finish(sandbox.CauseCreateFailed, err.Error())
		return nil, hostapi.ToConnect(err)
	}
	b.status.State = hostv1.State_STATE_RUNNING
	b.status.Phases = []*hostv1.Phase{{Name: "boot", Nanos: int64(time.Millisecond)}}
	return connect.NewResponse(&hostv1.CreateSandboxResponse{Status: clone(b.status)}), nil
}

func (h *Host) reserve(spec *hostv1.SandboxSpec) *box {
	h.mu.Lock()
	defer h.mu.Unlock()
	if b, ok := h.boxes[spec.GetId()]; ok {
		return b
	}
	b := newBox(&hostv1.SandboxStatus{Spec: spec, State: hostv1.State_STATE_CREATING, CreatedAt: timestamppb.Now()})
	h.boxes[spec.GetId()] = b
	return b
}

// DestroySandbox implements the contract.
func (h *Host) DestroySandbox(ctx context.Context, req *connect.Request[hostv1.DestroySandboxRequest]) (*connect.Response[hostv1.DestroySandboxResponse], error) {
	if err := h.enter(ctx, "DestroySandbox", req.Msg.GetId()); err != nil {
		return nil, err
	}
	cause := sandbox.Cause(req.Msg.GetCause())
	if cause == "" {
		cause = sandbox.CauseUser
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	b, ok := h.boxes[req.Msg.GetId()]
	if !ok {
		return connect.NewResponse(&hostv1.DestroySandboxResponse{}), nil
	}
	b.finish(cause, "")
	return connect.NewResponse(&hostv1.DestroySandboxResponse{Status: clone(b.status)}), nil
}

// ListSandboxes implements the contract.
func (h *Host) ListSandboxes(ctx context.Context, _ *connect.Request[hostv1.ListSandboxesRequest]) (*connect.Response[hostv1.ListSandboxesResponse], error) {
	if err := h.enter(ctx, "ListSandboxes", ""); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	out := &hostv1.ListSandboxesResponse{}
	for _, b := range h.boxes {
		out.Sandboxes = append(out.Sandboxes, clone(b.status))
	}
	return connect.NewResponse(out), nil
}

// AcknowledgeEnded implements the contract.
func (h *Host) AcknowledgeEnded(ctx context.Context, req *connect.Request[hostv1.AcknowledgeEndedRequest]) (*connect.Response[hostv1.AcknowledgeEndedResponse], error) {
	if err := h.enter(ctx, "AcknowledgeEnded", ""); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, id := range req.Msg.GetIds() {
		b, ok := h.boxes[id]
		if !ok {
			continue
		}
		if b.status.State != hostv1.State_STATE_ENDED {
			return nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindConflict, "sandbox %s has not ended", id))
		}
		delete(h.boxes, id)
	}
	return connect.NewResponse(&hostv1.AcknowledgeEndedResponse{}), nil
}

// SetDeadline implements the contract, but for enforcing it; PauseIdle heeds what
// it says of that.
func (h *Host) SetDeadline(ctx context.Context, req *connect.Request[hostv1.SetDeadlineRequest]) (*connect.Response[hostv1.SetDeadlineResponse], error) {
	if err := h.enter(ctx, "SetDeadline", req.Msg.GetId()); err != nil {
		return nil, err
	}
	b, err := h.running(req.Msg.GetId())
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := b.callable(); err != nil {
		return nil, hostapi.ToConnect(err)
	}
	if req.Msg.Deadline != nil {
		b.status.Spec.Deadline = req.Msg.GetDeadline()
	}
	if req.Msg.AutoPauseNanos != nil {
		b.status.Spec.AutoPauseNanos = req.Msg.GetAutoPauseNanos()
	}
	return connect.NewResponse(&hostv1.SetDeadlineResponse{}), nil
}

// PingSandbox implements the contract.
func (h *Host) PingSandbox(ctx context.Context, req *connect.Request[hostv1.PingSandboxRequest]) (*connect.Response[hostv1.PingSandboxResponse], error) {
	if err := h.enter(ctx, "PingSandbox", req.Msg.GetId()); err != nil {
		return nil, err
	}
	if _, err := h.running(req.Msg.GetId()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&hostv1.PingSandboxResponse{RoundTripNanos: int64(time.Millisecond)}), nil
}

// ReadConsole implements the contract.
func (h *Host) ReadConsole(ctx context.Context, req *connect.Request[hostv1.ReadConsoleRequest]) (*connect.Response[hostv1.ReadConsoleResponse], error) {
	if err := h.enter(ctx, "ReadConsole", req.Msg.GetId()); err != nil {
		return nil, err
	}
	log := []byte("Linux version 6\nready\n")
	next := uint64(len(log))
	if n := req.Msg.GetTailBytes(); n > 0 && n < uint64(len(log)) {
		log = log[uint64(len(log))-n:]
	}
	if from := min(req.Msg.GetFromOffset(), uint64(len(log))); from > 0 {
		log = log[from:]
	}
	return connect.NewResponse(&hostv1.ReadConsoleResponse{Data: log, NextOffset: next}), nil
}

// GetMetrics implements the contract.
func (h *Host) GetMetrics(ctx context.Context, req *connect.Request[hostv1.GetMetricsRequest]) (*connect.Response[hostv1.GetMetricsResponse], error) {
	if err := h.enter(ctx, "GetMetrics", req.Msg.GetId()); err != nil {
		return nil, err
	}
	if _, err := h.running(req.Msg.GetId()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&hostv1.GetMetricsResponse{At: timestamppb.Now(), CpuCount: 1, MemTotalBytes: 512 << 20}), nil
}

// ListTemplates implements the contract.
func (h *Host) ListTemplates(ctx context.Context, _ *connect.Request[hostv1.ListTemplatesRequest]) (*connect.Response[hostv1.ListTemplatesResponse], error) {
	if err := h.enter(ctx, "ListTemplates", ""); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return connect.NewResponse(&hostv1.ListTemplatesResponse{Templates: h.templates}), nil
}
