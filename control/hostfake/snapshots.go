package hostfake

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// snapshot is one, with the files that its sandbox had.
type snapshot struct {
	message *hostv1.Snapshot
	files   map[string]file
}

// begin gives a new box what its template has; the caller holds mu.
func (h *Host) begin(b *box) error {
	spec := b.status.GetSpec()
	snap, ok := h.snapshots[spec.GetTemplate()]
	if !ok {
		b.status.Start = string(sandbox.StartBoot)
		return nil
	}
	saved := snap.message.GetSaved()
	if spec.GetVcpus() != saved.GetVcpus() || spec.GetMemMib() != saved.GetMemMib() {
		return sandbox.Errorf(sandbox.KindInvalid, "snapshot %s has %d vCPUs and %d MiB, asked for are %d and %d",
			snap.message.GetName(), saved.GetVcpus(), saved.GetMemMib(), spec.GetVcpus(), spec.GetMemMib())
	}
	b.status.Start, b.status.Saved = string(sandbox.StartSnapshot), saved
	b.files, b.line = maps.Clone(snap.files), snap.message.GetName()
	return nil
}

// CreateSnapshot implements the contract. The hook is asked as
// "CreateSnapshot.save" before there is anything.
func (h *Host) CreateSnapshot(ctx context.Context, req *connect.Request[hostv1.CreateSnapshotRequest]) (*connect.Response[hostv1.CreateSnapshotResponse], error) {
	if err := h.enter(ctx, "CreateSnapshot", req.Msg.GetId()); err != nil {
		return nil, err
	}
	out, err := apart(ctx, func(ctx context.Context) (*hostv1.CreateSnapshotResponse, error) { return h.shoot(ctx, req.Msg) })
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

func (h *Host) shoot(ctx context.Context, req *hostv1.CreateSnapshotRequest) (*hostv1.CreateSnapshotResponse, error) {
	if err := sandbox.SafeName("snapshot", req.GetName()); err != nil {
		return nil, err
	}
	b, release, err := h.own(req.GetId())
	if err != nil {
		return nil, err
	}
	defer release()
	if err := h.at(ctx, "CreateSnapshot.save", req.GetId()); err != nil {
		return nil, err
	}
	if err := h.nameTaken(req.GetName()); err != nil {
		return nil, err
	}
	point, files, report, err := h.point(b)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	made := &hostv1.Snapshot{
		Name: req.GetName(), Saved: point.GetSaved(), Sandbox: req.GetId(), Template: h.image(b), Parent: b.line, Labels: req.GetLabels(),
	}
	h.snapshots[req.GetName()] = &snapshot{made, files}
	b.line = req.GetName()
	return &hostv1.CreateSnapshotResponse{Snapshot: made, Report: report}, nil
}

func (h *Host) nameTaken(name string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	taken := h.snapshots[name] != nil || slices.ContainsFunc(h.templates, func(t *hostv1.Template) bool { return t.GetName() == name })
	if taken {
		return sandbox.Errorf(sandbox.KindExists, "the host has something of the name %s already", name)
	}
	return nil
}

// image is the image at the beginning of a box's line; the caller holds mu.
func (h *Host) image(b *box) string {
	name := b.status.GetSpec().GetTemplate()
	if snap, ok := h.snapshots[name]; ok {
		return snap.message.GetTemplate()
	}
	return name
}

// DeleteSnapshot implements the contract.
func (h *Host) DeleteSnapshot(ctx context.Context, req *connect.Request[hostv1.DeleteSnapshotRequest]) (*connect.Response[hostv1.DeleteSnapshotResponse], error) {
	name := req.Msg.GetName()
	if err := h.enter(ctx, "DeleteSnapshot", name); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	var users []string
	for id, b := range h.boxes {
		if b.status.State != hostv1.State_STATE_ENDED && b.status.GetSpec().GetTemplate() == name {
			users = append(users, id)
		}
	}
	if len(users) > 0 {
		slices.Sort(users)
		return nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindConflict, "snapshot %s is needed by %s", name, strings.Join(users, ", ")))
	}
	delete(h.snapshots, name)
	return connect.NewResponse(&hostv1.DeleteSnapshotResponse{}), nil
}

// ListSnapshots implements the contract.
func (h *Host) ListSnapshots(ctx context.Context, _ *connect.Request[hostv1.ListSnapshotsRequest]) (*connect.Response[hostv1.ListSnapshotsResponse], error) {
	if err := h.enter(ctx, "ListSnapshots", ""); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	out := &hostv1.ListSnapshotsResponse{}
	for _, name := range slices.Sorted(maps.Keys(h.snapshots)) {
		out.Snapshots = append(out.Snapshots, h.snapshots[name].message)
	}
	return connect.NewResponse(out), nil
}

// VerifySnapshot implements the contract, with the damage that Damage has told.
func (h *Host) VerifySnapshot(ctx context.Context, req *connect.Request[hostv1.VerifySnapshotRequest]) (*connect.Response[hostv1.VerifySnapshotResponse], error) {
	name := req.Msg.GetName()
	if err := h.enter(ctx, "VerifySnapshot", name); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	snap, ok := h.snapshots[name]
	if !ok {
		return nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindNotFound, "the host has no snapshot %s", name))
	}
	return connect.NewResponse(&hostv1.VerifySnapshotResponse{
		Files: 5, Bytes: snap.message.GetSaved().GetMemoryBytes() + snap.message.GetSaved().GetDiskBytes(), Damage: h.damage[name],
		Phases: []*hostv1.Phase{{Name: "memory", Nanos: int64(time.Millisecond)}, {Name: "disk", Nanos: int64(time.Millisecond)}},
	}), nil
}

// Damage makes a snapshot one that is not what it was.
func (h *Host) Damage(name, file string, offset int64, message string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.damage[name] = append(h.damage[name], &hostv1.VerifySnapshotResponse_Damage{File: file, Offset: offset, Message: message})
}

// LoseSnapshot makes the host forget a snapshot; KeepSnapshot gives it one that
// nobody asked for.
func (h *Host) LoseSnapshot(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.snapshots, name)
}

// KeepSnapshot gives the host a snapshot that nobody asked for.
func (h *Host) KeepSnapshot(s *hostv1.Snapshot) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.snapshots[s.GetName()] = &snapshot{message: s, files: map[string]file{}}
}

// Snapshots lists the names of what the host has.
func (h *Host) Snapshots() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Sorted(maps.Keys(h.snapshots))
}

// GetSnapshotTree implements the contract: the whole line of the image.
func (h *Host) GetSnapshotTree(ctx context.Context, req *connect.Request[hostv1.GetSnapshotTreeRequest]) (*connect.Response[hostv1.GetSnapshotTreeResponse], error) {
	name := req.Msg.GetName()
	if err := h.enter(ctx, "GetSnapshotTree", name); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	top, ok := h.snapshots[name]
	if !ok {
		return nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindNotFound, "the host has no snapshot %s", name))
	}
	image := top.message.GetTemplate()
	out := &hostv1.GetSnapshotTreeResponse{Nodes: []*hostv1.GetSnapshotTreeResponse_Node{{Digest: "image-" + image, Kind: "template", Name: image}}}
	h.below(out, image, "", "image-"+image)
	return connect.NewResponse(out), nil
}

// below adds the snapshots of an image whose parent is named, what runs and is
// paused on them, and what is below these; the caller holds mu.
func (h *Host) below(out *hostv1.GetSnapshotTreeResponse, image, parent, digest string) {
	for _, name := range slices.Sorted(maps.Keys(h.snapshots)) {
		m := h.snapshots[name].message
		if m.GetTemplate() != image || m.GetParent() != parent {
			continue
		}
		node := &hostv1.GetSnapshotTreeResponse_Node{
			Digest: m.GetSaved().GetMemoryDigest(), Parent: digest, Kind: "snapshot", Name: name, Sandbox: m.GetSandbox(),
			Generation: m.GetSaved().GetGeneration(), OwnBytes: m.GetSaved().GetOwnBytes(), At: m.GetSaved().GetAt(),
		}
		out.Nodes = append(out.Nodes, node)
		for _, id := range slices.Sorted(maps.Keys(h.boxes)) {
			b := h.boxes[id]
			switch {
			case b.line != name:
			case b.status.State == hostv1.State_STATE_RUNNING:
				node.Running = append(node.Running, id)
			case b.status.State == hostv1.State_STATE_PAUSED:
				saved := b.status.GetSaved()
				out.Nodes = append(out.Nodes, &hostv1.GetSnapshotTreeResponse_Node{
					Digest: saved.GetMemoryDigest(), Parent: node.Digest, Kind: "pause", Sandbox: id,
					Generation: saved.GetGeneration(), OwnBytes: saved.GetOwnBytes(), At: saved.GetAt(),
				})
			}
		}
		h.below(out, image, name, node.Digest)
	}
}
