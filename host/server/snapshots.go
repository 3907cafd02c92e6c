package server

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// maxDamage is how much damage one answer tells of.
const maxDamage = 100

func (s *server) TouchSandbox(ctx context.Context, req *connect.Request[hostv1.TouchSandboxRequest]) (*connect.Response[hostv1.TouchSandboxResponse], error) {
	return answer(&hostv1.TouchSandboxResponse{}, s.agent.Touch(ctx, req.Msg.GetId(), time.Duration(req.Msg.GetHoldNanos())))
}

func (s *server) PauseSandbox(ctx context.Context, req *connect.Request[hostv1.PauseSandboxRequest]) (*connect.Response[hostv1.PauseSandboxResponse], error) {
	saved, err := s.agent.Pause(ctx, req.Msg.GetId())
	out := &hostv1.PauseSandboxResponse{Status: encodeStatus(saved.Status)}
	if len(saved.Phases) > 0 {
		out.Report = encodeReport(saved)
	}
	return answer(out, err)
}

func (s *server) ResumeSandbox(ctx context.Context, req *connect.Request[hostv1.ResumeSandboxRequest]) (*connect.Response[hostv1.ResumeSandboxResponse], error) {
	id, err := sandbox.ParseID(req.Msg.GetId())
	if err != nil {
		return nil, hostapi.ToConnect(err)
	}
	if req.Msg.GetDeadline() == nil || req.Msg.GetDeadline().CheckValid() != nil {
		return nil, hostapi.ToConnect(errNoDeadline)
	}
	status, phases, err := s.agent.Resume(ctx, host.ResumeRequest{ID: id, Deadline: req.Msg.GetDeadline().AsTime(), Env: req.Msg.GetEnv()})
	return answer(&hostv1.ResumeSandboxResponse{Status: encodeStatus(status), Phases: encodePhases(phases)}, err)
}

var errNoDeadline = sandbox.WithKind(sandbox.KindInvalid, errors.New("deadline is missing or not a time"))

func (s *server) ForkSandbox(ctx context.Context, req *connect.Request[hostv1.ForkSandboxRequest]) (*connect.Response[hostv1.ForkSandboxResponse], error) {
	var copies []host.CreateRequest
	for _, c := range req.Msg.GetCopies() {
		if c.GetDeadline() == nil || c.GetDeadline().CheckValid() != nil {
			return nil, hostapi.ToConnect(errNoDeadline)
		}
		copies = append(copies, host.CreateRequest{
			ID: sandbox.ID(c.GetId()), Hostname: c.GetHostname(), Deadline: c.GetDeadline().AsTime(),
			AutoPause: time.Duration(c.GetAutoPauseNanos()), Spec: sandbox.Spec{Env: c.GetEnv()},
		})
	}
	copied, saved, err := s.agent.Fork(ctx, req.Msg.GetId(), copies)
	out := &hostv1.ForkSandboxResponse{Report: encodeReport(saved)}
	for _, c := range copied {
		one := &hostv1.ForkSandboxResponse_Copy{Status: encodeStatus(c.Status)}
		if c.Err != nil {
			one.Failure = &hostv1.Failure{Kind: string(sandbox.KindOf(c.Err)), Message: c.Err.Error()}
		}
		out.Copies = append(out.Copies, one)
	}
	return answer(out, err)
}

func (s *server) CreateSnapshot(ctx context.Context, req *connect.Request[hostv1.CreateSnapshotRequest]) (*connect.Response[hostv1.CreateSnapshotResponse], error) {
	info, saved, err := s.agent.Snapshot(ctx, req.Msg.GetId(), req.Msg.GetName(), req.Msg.GetLabels())
	return answer(&hostv1.CreateSnapshotResponse{Snapshot: encodeSnapshot(info), Report: encodeReport(saved)}, err)
}

func (s *server) DeleteSnapshot(ctx context.Context, req *connect.Request[hostv1.DeleteSnapshotRequest]) (*connect.Response[hostv1.DeleteSnapshotResponse], error) {
	return answer(&hostv1.DeleteSnapshotResponse{}, s.agent.DeleteSnapshot(ctx, req.Msg.GetName()))
}

func (s *server) ListSnapshots(context.Context, *connect.Request[hostv1.ListSnapshotsRequest]) (*connect.Response[hostv1.ListSnapshotsResponse], error) {
	list, err := s.agent.Snapshots()
	out := &hostv1.ListSnapshotsResponse{}
	for _, info := range list {
		out.Snapshots = append(out.Snapshots, encodeSnapshot(info))
	}
	return answer(out, err)
}

func (s *server) VerifySnapshot(ctx context.Context, req *connect.Request[hostv1.VerifySnapshotRequest]) (*connect.Response[hostv1.VerifySnapshotResponse], error) {
	began := time.Now()
	report, err := s.agent.VerifySnapshot(ctx, req.Msg.GetName())
	out := &hostv1.VerifySnapshotResponse{
		Files: uint32(report.Manifests + report.Layers + report.Objects), Bytes: uint64(report.Bytes),
		Phases: []*hostv1.Phase{{Name: "verify", Nanos: time.Since(began).Nanoseconds()}},
	}
	for _, d := range report.Damage[:min(len(report.Damage), maxDamage)] {
		damage := &hostv1.VerifySnapshotResponse_Damage{File: d.File, Offset: -1, Message: d.Err.Error()}
		var corrupt *snapshot.CorruptError
		if errors.As(d.Err, &corrupt) {
			damage.Offset = corrupt.Offset
		}
		out.Damage = append(out.Damage, damage)
	}
	return answer(out, err)
}

func (s *server) GetSnapshotTree(_ context.Context, req *connect.Request[hostv1.GetSnapshotTreeRequest]) (*connect.Response[hostv1.GetSnapshotTreeResponse], error) {
	nodes, err := s.agent.SnapshotTree(req.Msg.GetName())
	out := &hostv1.GetSnapshotTreeResponse{}
	for _, n := range nodes {
		node := &hostv1.GetSnapshotTreeResponse_Node{
			Digest: n.Digest.String(), Kind: n.Kind, Name: n.Name, Sandbox: string(n.Sandbox), Generation: uint32(n.Generation),
			OwnBytes: uint64(n.OwnBytes), At: timestamppb.New(n.At), Running: n.Running,
		}
		if !n.Parent.IsZero() {
			node.Parent = n.Parent.String()
		}
		out.Nodes = append(out.Nodes, node)
	}
	return answer(out, err)
}

func encodePhases(phases []host.Phase) (out []*hostv1.Phase) {
	for _, p := range phases {
		out = append(out, &hostv1.Phase{Name: p.Name, Nanos: p.Took.Nanoseconds()})
	}
	return out
}

func encodeReport(s host.Saved) *hostv1.SaveReport {
	return &hostv1.SaveReport{
		Phases: encodePhases(s.Phases), StoppedNanos: s.Stopped.Nanoseconds(),
		ChangedPages: uint64(s.Memory.Put - s.Memory.Equal), ChangedBlocks: uint64(s.Disk.Put - s.Disk.Equal),
		DirtyPages: uint64(s.Memory.Put), DirtyBlocks: uint64(s.Disk.Put), BytesWritten: uint64(s.Written),
	}
}

func encodePoint(p *host.PointInfo) *hostv1.Saved {
	if p == nil {
		return nil
	}
	out := &hostv1.Saved{
		Vcpus: uint32(p.VCPUs), MemMib: uint32(p.MemMiB), DiskMib: uint32(p.DiskMiB), Compat: p.Compat, Generation: uint32(p.Generation),
		MemoryDigest: p.Memory.String(), DiskDigest: p.Disk.String(),
		MemoryBytes: uint64(p.MemoryBytes), DiskBytes: uint64(p.DiskBytes), OwnBytes: uint64(p.OwnBytes),
		Durability: string(sandbox.DurableLocal), At: timestamppb.New(p.At),
	}
	if !p.Parent.IsZero() {
		out.ParentDigest = p.Parent.String()
	}
	return out
}

func encodeSnapshot(i host.SnapshotInfo) *hostv1.Snapshot {
	return &hostv1.Snapshot{
		Name: i.Name, Saved: encodePoint(&i.Point), Sandbox: string(i.Sandbox), Template: i.Template, Parent: i.Parent, Labels: i.Labels,
	}
}
