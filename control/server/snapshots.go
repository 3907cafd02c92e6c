package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/reconcile"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// shots are the snapshots that this process is making or deleting.
type shots struct {
	wg sync.WaitGroup

	mu     sync.Mutex
	closed bool
	names  map[string]bool
}

func (h *shots) init() { h.names = map[string]bool{} }

func (h *shots) has(name string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.names[name]
}

// take makes a name this process's own until drop.
func (h *shots) take(name string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return errStopping
	case h.names[name]:
		return sandbox.Errorf(sandbox.KindConflict, "snapshot %s is being made or deleted just now", name)
	}
	h.names[name] = true
	h.wg.Add(1)
	return nil
}

func (h *shots) drop(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.names, name)
	h.wg.Done()
}

func (h *shots) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
}

func snapshotOut(t store.Template) api.Snapshot {
	return api.Snapshot{
		Name: t.Name, State: string(t.State), Template: t.Image, Parent: t.Parent, SandboxID: string(t.Sandbox),
		VCPUs: t.VCPUs, MemMiB: t.MemMiB, DiskMiB: t.DiskMiB, Saved: savedOut(t.Saved), Metadata: t.Metadata, CreatedAt: t.CreatedAt.UTC(),
	}
}

// snapshotBusy says why a snapshot that is not ready cannot be used.
func snapshotBusy(t store.Template) error {
	switch t.State {
	case sandbox.SnapshotLost:
		return sandbox.Errorf(sandbox.KindConflict, "snapshot %s is lost: its host does not have it", t.Name)
	case sandbox.SnapshotCreating:
		return sandbox.Errorf(sandbox.KindConflict, "snapshot %s is being made", t.Name)
	}
	return sandbox.Errorf(sandbox.KindConflict, "snapshot %s is being deleted", t.Name)
}

// createSnapshot keeps the state of a sandbox under a name, and answers when that
// is durable. Once begun it is finished whether or not the client waits.
func (s *Server) createSnapshot(w http.ResponseWriter, r *http.Request) error {
	var req api.CreateSnapshot
	if err := readBody(w, r, &req); err != nil {
		return err
	}
	if err := sandbox.SafeName("snapshot", req.Name); err != nil {
		return err
	}
	id, err := sandbox.ParseID(req.SandboxID)
	if err != nil {
		return err
	}
	if err := sandbox.CheckMetadata(req.Metadata); err != nil {
		return err
	}
	if err := s.nameFree(r.Context(), req.Name); err != nil {
		return err
	}
	ctx, done, of, err := s.enterRow(r.Context(), id)
	if err != nil {
		return err
	}
	defer done()
	shot, err := s.shoot(ctx, of, req)
	if err != nil {
		return err
	}
	select {
	case <-shot.done:
	case <-ctx.Done():
		return context.Cause(ctx) // the snapshot goes on
	}
	if shot.err != nil {
		return shot.err
	}
	out := snapshotOut(shot.row)
	out.Phases, out.Report = shot.phases, shot.report
	w.Header().Set("Location", "/v1/snapshots/"+out.Name)
	writeJSON(w, http.StatusCreated, out)
	return nil
}

// nameFree refuses a name that is taken, before anything is done. What comes to be
// meanwhile the database refuses, or the host.
func (s *Server) nameFree(ctx context.Context, name string) error {
	if _, err := s.cfg.Store.Snapshot(ctx, name); !sandbox.Is(err, sandbox.KindNotFound) {
		if err == nil {
			err = sandbox.Errorf(sandbox.KindExists, "there is a snapshot %s already", name)
		}
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.CallLimit)
	defer cancel()
	t, err := s.cfg.Host.ListTemplates(ctx, connect.NewRequest(&hostv1.ListTemplatesRequest{}))
	if err != nil {
		return fmt.Errorf("ask the host: %w", hostapi.FromConnect(err))
	}
	if slices.ContainsFunc(t.Msg.GetTemplates(), func(t *hostv1.Template) bool { return t.GetName() == name }) {
		return sandbox.Errorf(sandbox.KindExists, "there is a template %s already; snapshots and templates share their names", name)
	}
	return nil
}

// shot is one snapshot that is being made.
type shot struct {
	done   chan struct{} // closed when the fields below are set
	row    store.Template
	phases []api.Phase
	report *api.SaveReport
	err    error
}

// shoot puts a snapshot on record and begins to make it.
func (s *Server) shoot(ctx context.Context, of store.Sandbox, req api.CreateSnapshot) (*shot, error) {
	if err := s.shots.take(req.Name); err != nil {
		return nil, err
	}
	now := s.cfg.Now()
	row, err := s.cfg.Store.AddSnapshot(context.WithoutCancel(ctx), store.Template{
		Name: req.Name, State: sandbox.SnapshotCreating, Work: store.Work{Owner: s.owner, Until: now.Add(s.cfg.ChangeLimit)},
		Host: of.Host, Image: of.Spec.Template, Sandbox: of.ID, VCPUs: of.Spec.VCPUs, MemMiB: of.Spec.MemMiB, DiskMiB: of.Spec.DiskMiB,
		Metadata: req.Metadata, CreatedAt: now,
	})
	if err != nil {
		s.shots.drop(req.Name)
		return nil, err
	}
	one := &shot{done: make(chan struct{})}
	go func() {
		defer close(one.done)
		defer s.shots.drop(row.Name)
		life, cancel := context.WithTimeout(s.ctx, s.cfg.ChangeLimit)
		defer cancel()
		one.err = s.make(life, row, one)
		s.meters.change("snapshot", one.err, s.cfg.Now().Sub(now))
		s.cfg.Log.Info("snapshot made", "snapshot", row.Name, "sandbox", of.ID, "host", row.Host, "op", "snapshot", "took", s.cfg.Now().Sub(now), "err", one.err)
		s.reconciler.Kick() // what could not be recorded is settled from the host's report
	}()
	return one, nil
}

// make takes a snapshot that is on record to ready, or off the record. Where
// nobody knows whether its host has it, it stays, and the reconciler asks.
func (s *Server) make(ctx context.Context, row store.Template, one *shot) error {
	if err := fault.Point(ctx, "control/snapshot/recorded"); err != nil {
		return err
	}
	resp, err := s.cfg.Host.CreateSnapshot(ctx, connect.NewRequest(
		&hostv1.CreateSnapshotRequest{Id: string(row.Sandbox), Name: row.Name, Labels: row.Metadata}))
	if err != nil {
		return s.notMade(ctx, row, err)
	}
	if err := fault.Point(ctx, "control/snapshot/made"); err != nil {
		return err
	}
	one.phases, one.report = phasesOut(resp.Msg.GetReport().GetPhases()), reportOut(resp.Msg.GetReport())
	one.row, err = s.cfg.Store.Made(ctx, row, reconcile.SnapshotOf(resp.Msg.GetSnapshot(), row.Host))
	if errors.Is(err, store.ErrStale) { // another process's reconciler has seen it first
		if one.row, err = s.cfg.Store.Snapshot(ctx, row.Name); err == nil && one.row.State != sandbox.SnapshotReady {
			err = snapshotBusy(one.row)
		}
	}
	return err
}

func (s *Server) notMade(ctx context.Context, row store.Template, err error) error {
	if s.ctx.Err() != nil {
		return errStopping
	}
	answered := hostapi.Answered(err)
	err = s.hostError(ctx, row.Sandbox, err)
	if !answered {
		return sandbox.WithKind(sandbox.KindTransient, err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.CallLimit)
	defer cancel()
	return errors.Join(err, s.cfg.Store.RemoveSnapshot(ctx, row))
}

func (s *Server) listSnapshots(w http.ResponseWriter, r *http.Request) error {
	rows, err := s.cfg.Store.Snapshots(r.Context(), "")
	if err != nil {
		return err
	}
	out := api.SnapshotList{Snapshots: []api.Snapshot{}}
	for _, row := range rows {
		out.Snapshots = append(out.Snapshots, snapshotOut(row))
	}
	return ok(w, out)
}

// pathSnapshot finds the snapshot that a request names.
func (s *Server) pathSnapshot(r *http.Request) (store.Template, error) {
	name := r.PathValue("name")
	if err := sandbox.SafeName("snapshot", name); err != nil {
		return store.Template{}, err
	}
	return s.cfg.Store.Snapshot(r.Context(), name)
}

func (s *Server) getSnapshot(w http.ResponseWriter, r *http.Request) error {
	row, err := s.pathSnapshot(r)
	if err != nil {
		return err
	}
	return ok(w, snapshotOut(row))
}

// deleteSnapshot deletes a snapshot that nothing depends on. When its host does
// not do it now the answer is 202, and the reconciler goes on.
func (s *Server) deleteSnapshot(w http.ResponseWriter, r *http.Request) error {
	row, err := s.pathSnapshot(r)
	if err != nil {
		return err
	}
	if err := s.shots.take(row.Name); err != nil {
		return err
	}
	defer s.shots.drop(row.Name)
	if row.State == sandbox.SnapshotCreating {
		return snapshotBusy(row)
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.cfg.CallLimit) // it goes on when the client leaves
	defer cancel()
	if row.State != sandbox.SnapshotDeleting {
		row, err = s.cfg.Store.DeletingSnapshot(ctx, row, store.Work{Owner: s.owner, Until: s.cfg.Now().Add(s.cfg.CallLimit)})
		if err != nil {
			return err
		}
	}
	if err := fault.Point(ctx, "control/snapshot/deleting"); err != nil {
		return err
	}
	err = s.reconciler.DeleteSnapshot(ctx, row)
	switch {
	case sandbox.Is(err, sandbox.KindConflict):
		return err
	case err != nil:
		s.cfg.Log.Warn("deletion goes on later", "snapshot", row.Name, "op", "delete snapshot", "err", err)
		writeJSON(w, http.StatusAccepted, snapshotOut(row))
		return nil
	}
	return ok(w, struct{}{})
}

// verifySnapshot has the host read a snapshot from end to end. It takes as long as
// that takes, and ends with the request.
func (s *Server) verifySnapshot(w http.ResponseWriter, r *http.Request) error {
	row, err := s.pathSnapshot(r)
	if err != nil {
		return err
	}
	if row.State != sandbox.SnapshotReady {
		return snapshotBusy(row)
	}
	ctx, done, err := s.calls.begin(r.Context(), askingKey(r.Context()).ID, "")
	if err != nil {
		return err
	}
	defer done()
	resp, err := s.cfg.Host.VerifySnapshot(ctx, connect.NewRequest(&hostv1.VerifySnapshotRequest{Name: row.Name}))
	if err != nil {
		return s.snapshotError(ctx, err)
	}
	out := api.Verified{
		Whole: len(resp.Msg.GetDamage()) == 0, Files: int(resp.Msg.GetFiles()), Bytes: figure(resp.Msg.GetBytes()), Phases: phasesOut(resp.Msg.GetPhases()),
	}
	for _, d := range resp.Msg.GetDamage() {
		out.Damage = append(out.Damage, api.Damage{File: d.GetFile(), Offset: d.GetOffset(), Message: d.GetMessage()})
	}
	return ok(w, out)
}

func (s *Server) snapshotTree(w http.ResponseWriter, r *http.Request) error {
	row, err := s.pathSnapshot(r)
	if err != nil {
		return err
	}
	if row.State != sandbox.SnapshotReady {
		return snapshotBusy(row)
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.cfg.CallLimit)
	defer cancel()
	resp, err := s.cfg.Host.GetSnapshotTree(ctx, connect.NewRequest(&hostv1.GetSnapshotTreeRequest{Name: row.Name}))
	if err != nil {
		return s.snapshotError(ctx, err)
	}
	out := api.SnapshotTree{Nodes: []api.SnapshotNode{}}
	for _, n := range resp.Msg.GetNodes() {
		node := api.SnapshotNode{
			Digest: n.GetDigest(), Parent: n.GetParent(), Kind: n.GetKind(), Name: n.GetName(), SandboxID: n.GetSandbox(),
			Generation: int(n.GetGeneration()), OwnBytes: figure(n.GetOwnBytes()), Running: n.GetRunning(),
		}
		if n.GetAt() != nil {
			node.At = optional(timeOut(n.GetAt()))
		}
		out.Nodes = append(out.Nodes, node)
	}
	return ok(w, out)
}

// snapshotError is what a client is told of a host that could not look.
func (s *Server) snapshotError(ctx context.Context, err error) error {
	if why := whyEnded(ctx); why != nil {
		return why
	}
	if s.ctx.Err() != nil {
		return errStopping
	}
	return hostapi.FromConnect(err)
}
