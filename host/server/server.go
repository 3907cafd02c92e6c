// Package server offers a host agent as the HostService of hostapi: it decodes,
// checks, calls and encodes. It decides nothing itself.
package server

import (
	"context"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1/hostv1connect"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// maxMessage bounds one message from control.
const maxMessage = 4 << 20

// New makes the handler of one agent and the path it belongs at.
func New(agent *host.Agent) (path string, handler http.Handler) {
	return hostv1connect.NewHostServiceHandler(&server{agent}, connect.WithReadMaxBytes(maxMessage))
}

type server struct{ agent *host.Agent }

// answer ends a unary call.
func answer[T any](msg *T, err error) (*connect.Response[T], error) {
	if err != nil {
		return nil, hostapi.ToConnect(err)
	}
	return connect.NewResponse(msg), nil
}

func (s *server) GetHost(context.Context, *connect.Request[hostv1.GetHostRequest]) (*connect.Response[hostv1.GetHostResponse], error) {
	d := s.agent.Describe()
	return answer(&hostv1.GetHostResponse{
		Name: d.Name, Version: d.Version, Instance: d.Instance,
		Vmm: d.VMM.Driver, Accelerator: d.VMM.Accelerator, AcceleratorReason: d.VMM.Reason, Cpus: uint32(d.CPUs),
		MemTotalMib: uint64(d.MemTotalMiB), MemAvailableMib: uint64(d.MemFreeMiB), MemCommittedMib: uint64(d.MemPromisedMiB),
		DiskFreeMib: uint64(d.DiskFreeMiB), Sandboxes: uint32(d.Sandboxes), MaxSandboxes: uint32(d.MaxSandboxes),
		DiskDriver: d.Disks, DiskReason: d.DiskReason, Cgroup: d.Groups, CgroupReason: d.GroupsReason, Damage: d.Damage,
	}, nil)
}

func (s *server) CreateSandbox(ctx context.Context, req *connect.Request[hostv1.CreateSandboxRequest]) (*connect.Response[hostv1.CreateSandboxResponse], error) {
	create, err := createRequest(req.Msg.GetSpec())
	if err != nil {
		return nil, hostapi.ToConnect(err)
	}
	create.NoStart = req.Msg.GetNoStart()
	status, err := s.agent.Create(ctx, create)
	return answer(&hostv1.CreateSandboxResponse{Status: encodeStatus(status)}, err)
}

func createRequest(m *hostv1.SandboxSpec) (host.CreateRequest, error) {
	id, err := sandbox.ParseID(m.GetId())
	if err != nil {
		return host.CreateRequest{}, err
	}
	if m.GetDeadline() == nil || m.GetDeadline().CheckValid() != nil {
		return host.CreateRequest{}, errNoDeadline
	}
	return host.CreateRequest{
		ID: id, Hostname: m.GetHostname(), Deadline: m.GetDeadline().AsTime(), AutoPause: time.Duration(m.GetAutoPauseNanos()),
		Spec: sandbox.Spec{
			Template: m.GetTemplate(), VCPUs: bounded(m.GetVcpus()), MemMiB: bounded(m.GetMemMib()), DiskMiB: bounded(m.GetDiskMib()),
			Env: m.GetEnv(), Network: sandbox.Network{Internet: m.GetNetwork().GetInternet()},
		},
	}, nil
}

// bounded keeps a figure from wrapping round; its real bounds are checked later.
func bounded(n uint32) int { return int(min(n, 1<<30)) }

func (s *server) DestroySandbox(ctx context.Context, req *connect.Request[hostv1.DestroySandboxRequest]) (*connect.Response[hostv1.DestroySandboxResponse], error) {
	status, err := s.agent.Destroy(ctx, req.Msg.GetId(), sandbox.Cause(req.Msg.GetCause()))
	return answer(&hostv1.DestroySandboxResponse{Status: encodeStatus(status)}, err)
}

func (s *server) ListSandboxes(context.Context, *connect.Request[hostv1.ListSandboxesRequest]) (*connect.Response[hostv1.ListSandboxesResponse], error) {
	out := &hostv1.ListSandboxesResponse{}
	for _, status := range s.agent.List() {
		out.Sandboxes = append(out.Sandboxes, encodeStatus(status))
	}
	return answer(out, nil)
}

func (s *server) AcknowledgeEnded(_ context.Context, req *connect.Request[hostv1.AcknowledgeEndedRequest]) (*connect.Response[hostv1.AcknowledgeEndedResponse], error) {
	return answer(&hostv1.AcknowledgeEndedResponse{}, s.agent.Acknowledge(req.Msg.GetIds()))
}

func (s *server) SetDeadline(_ context.Context, req *connect.Request[hostv1.SetDeadlineRequest]) (*connect.Response[hostv1.SetDeadlineResponse], error) {
	change := host.Limits{}
	if t := req.Msg.GetDeadline(); t != nil {
		if t.CheckValid() != nil {
			return nil, hostapi.ToConnect(errNoDeadline)
		}
		change.Deadline = t.AsTime()
	}
	if req.Msg.AutoPauseNanos != nil {
		after := time.Duration(req.Msg.GetAutoPauseNanos())
		change.AutoPause = &after
	}
	return answer(&hostv1.SetDeadlineResponse{}, s.agent.SetLimits(req.Msg.GetId(), change))
}

func (s *server) PingSandbox(ctx context.Context, req *connect.Request[hostv1.PingSandboxRequest]) (*connect.Response[hostv1.PingSandboxResponse], error) {
	took, err := s.agent.Ping(ctx, req.Msg.GetId())
	return answer(&hostv1.PingSandboxResponse{RoundTripNanos: took.Nanoseconds()}, err)
}

func (s *server) ReadConsole(_ context.Context, req *connect.Request[hostv1.ReadConsoleRequest]) (*connect.Response[hostv1.ReadConsoleResponse], error) {
	const most = 1 << 62 // keeps the figures from wrapping round
	data, next, err := s.agent.Console(req.Msg.GetId(), int64(min(req.Msg.GetTailBytes(), most)), int64(min(req.Msg.GetFromOffset(), most)))
	return answer(&hostv1.ReadConsoleResponse{Data: data, NextOffset: uint64(max(next, 0))}, err)
}

func (s *server) GetMetrics(ctx context.Context, req *connect.Request[hostv1.GetMetricsRequest]) (*connect.Response[hostv1.GetMetricsResponse], error) {
	u, err := s.agent.Metrics(ctx, req.Msg.GetId())
	return answer(&hostv1.GetMetricsResponse{
		At: timestamppb.New(time.Unix(u.Guest.Timestamp, 0)), CpuCount: uint32(u.Guest.CPUCount), CpuUsedPct: u.Guest.CPUUsedPct,
		MemTotalBytes: u.Guest.MemTotal, MemUsedBytes: u.Guest.MemUsed, MemCacheBytes: u.Guest.MemCache,
		DiskUsedBytes: u.Guest.DiskUsed, DiskTotalBytes: u.Guest.DiskTotal,
		HostRssBytes: u.RSSBytes, HostOverlayBytes: uint64(max(u.OverlayBytes, 0)),
	}, err)
}

func (s *server) ListTemplates(context.Context, *connect.Request[hostv1.ListTemplatesRequest]) (*connect.Response[hostv1.ListTemplatesResponse], error) {
	templates, err := s.agent.Templates()
	out := &hostv1.ListTemplatesResponse{}
	for _, t := range templates {
		out.Templates = append(out.Templates, encodeTemplate(t))
	}
	return answer(out, err)
}

var states = map[string]hostv1.State{
	"creating": hostv1.State_STATE_CREATING, "running": hostv1.State_STATE_RUNNING,
	"pausing": hostv1.State_STATE_PAUSING, "paused": hostv1.State_STATE_PAUSED, "resuming": hostv1.State_STATE_RESUMING,
	"destroying": hostv1.State_STATE_DESTROYING, "ended": hostv1.State_STATE_ENDED,
}

func encodeStatus(s host.Status) *hostv1.SandboxStatus {
	if s.ID == "" {
		return nil
	}
	out := &hostv1.SandboxStatus{
		State: states[s.State], Cause: string(s.Cause), CauseDetail: s.Detail, CreatedAt: timestamppb.New(s.CreatedAt),
		Frozen: string(s.Frozen),
		Spec: &hostv1.SandboxSpec{
			Id: string(s.ID), Template: s.Spec.Template, Vcpus: uint32(s.Spec.VCPUs), MemMib: uint32(s.Spec.MemMiB),
			DiskMib: uint32(s.Spec.DiskMiB), Network: &hostv1.NetworkPolicy{Internet: s.Spec.Network.Internet},
			Deadline: timestamppb.New(s.Deadline), Hostname: s.Hostname, AutoPauseNanos: s.AutoPause.Nanoseconds(),
		},
		Saved: encodePoint(s.Point), PauseReason: string(s.PausedBy), AutoPauseError: s.AutoPauseError, Start: string(s.Start),
	}
	for _, at := range []struct {
		when time.Time
		to   **timestamppb.Timestamp
	}{{s.EndedAt, &out.EndedAt}, {s.PausedAt, &out.PausedAt}, {s.IdleSince, &out.IdleSince}} {
		if !at.when.IsZero() {
			*at.to = timestamppb.New(at.when)
		}
	}
	out.Phases = encodePhases(s.Phases)
	return out
}
