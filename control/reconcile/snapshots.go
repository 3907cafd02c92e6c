package reconcile

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// SnapshotDo is what the record of one snapshot needs.
type SnapshotDo string

// What to do. The zero value is nothing.
const (
	LeaveSnapshot  SnapshotDo = ""
	RecordSnapshot SnapshotDo = "record" // the host has it, and as it says
	LoseSnapshot   SnapshotDo = "lose"   // the host has it no more
	ForgetSnapshot SnapshotDo = "forget" // it never came to be, or is gone as it should
	DeleteSnapshot SnapshotDo = "delete" // ask the host again
)

// DecideSnapshot compares a record with what an answering host has, nil when it
// does not name the snapshot. The record is older than the answer. It is a pure
// function.
func DecideSnapshot(row store.Template, has *hostv1.Snapshot, owned bool, now time.Time) SnapshotDo {
	switch {
	case owned:
		return LeaveSnapshot // whoever works on it writes the outcome
	case row.State == sandbox.SnapshotDeleting && has == nil:
		return ForgetSnapshot
	case row.State == sandbox.SnapshotDeleting:
		return DeleteSnapshot
	case has != nil && (row.State != sandbox.SnapshotReady || SavedOf(has.GetSaved()) != row.Saved || has.GetParent() != row.Parent):
		return RecordSnapshot
	case has != nil:
		return LeaveSnapshot
	case row.State == sandbox.SnapshotCreating && now.After(row.Until):
		return ForgetSnapshot
	case row.State == sandbox.SnapshotReady:
		return LoseSnapshot
	}
	return LeaveSnapshot
}

// settleSnapshots brings the records of snapshots and the host's together. As with
// sandboxes the records are read first.
func (r *Reconciler) settleSnapshots(ctx context.Context) error {
	rows, has, err := r.lookAtSnapshots(ctx)
	if sandbox.Is(err, sandbox.KindUnsupported) {
		return nil // a host without snapshots
	}
	if err != nil {
		return err
	}
	for _, row := range rows {
		m := has[row.Name]
		delete(has, row.Name)
		do := DecideSnapshot(row, m, r.cfg.OwnedSnapshot(row.Name), r.cfg.Now())
		r.noteSnapshot(row.Name, do, r.settleSnapshot(ctx, row, m, do))
	}
	return r.settleStrangers(ctx, has)
}

// settleStrangers records what the host has without a record. One that was made after
// the records were read may be deleted by now, and its record with it, so both are
// looked at once more.
func (r *Reconciler) settleStrangers(ctx context.Context, strangers map[string]*hostv1.Snapshot) error {
	maps.DeleteFunc(strangers, func(name string, _ *hostv1.Snapshot) bool { return r.cfg.OwnedSnapshot(name) })
	if len(strangers) == 0 {
		return nil
	}
	rows, has, err := r.lookAtSnapshots(ctx)
	if err != nil {
		return err
	}
	for _, row := range rows {
		delete(has, row.Name)
	}
	for name, m := range has {
		if strangers[name] != nil && !r.cfg.OwnedSnapshot(name) {
			r.noteSnapshot(name, RecordSnapshot, r.foundSnapshot(ctx, m))
		}
	}
	return nil
}

// lookAtSnapshots reads the records and then asks the host.
func (r *Reconciler) lookAtSnapshots(ctx context.Context) (rows []store.Template, has map[string]*hostv1.Snapshot, err error) {
	if rows, err = r.cfg.Store.Snapshots(ctx, r.cfg.HostName); err != nil {
		return nil, nil, err
	}
	if has, err = r.hostSnapshots(ctx); err != nil {
		return nil, nil, fmt.Errorf("list the host's snapshots: %w", err)
	}
	return rows, has, nil
}

func (r *Reconciler) hostSnapshots(ctx context.Context) (map[string]*hostv1.Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.CallLimit)
	defer cancel()
	resp, err := r.cfg.Host.ListSnapshots(ctx, connect.NewRequest(&hostv1.ListSnapshotsRequest{}))
	if err != nil {
		return nil, hostapi.FromConnect(err)
	}
	out := map[string]*hostv1.Snapshot{}
	for _, m := range resp.Msg.GetSnapshots() {
		out[m.GetName()] = m
	}
	return out, nil
}

func (r *Reconciler) settleSnapshot(ctx context.Context, row store.Template, has *hostv1.Snapshot, do SnapshotDo) error {
	var err error
	switch do {
	case RecordSnapshot:
		_, err = r.cfg.Store.Made(ctx, row, SnapshotOf(has, row.Host))
	case LoseSnapshot:
		_, err = r.cfg.Store.SetSnapshotState(ctx, row, sandbox.SnapshotLost)
	case ForgetSnapshot:
		err = r.cfg.Store.RemoveSnapshot(ctx, row)
	case DeleteSnapshot:
		ctx, cancel := context.WithTimeout(ctx, r.cfg.CallLimit)
		defer cancel()
		err = r.DeleteSnapshot(ctx, row)
	}
	return err
}

// foundSnapshot records one that this database does not know: it may be older
// than the snapshot. The name is taken, so nobody should wonder why.
func (r *Reconciler) foundSnapshot(ctx context.Context, m *hostv1.Snapshot) error {
	if err := sandbox.SafeName("snapshot", m.GetName()); err != nil {
		return err
	}
	_, err := r.cfg.Store.AddSnapshot(ctx, SnapshotOf(m, r.cfg.HostName))
	return err
}

// DeleteSnapshot has the host delete a snapshot that is recorded as being deleted,
// and takes it off the record. When the host refuses, because something depends on
// it that the database does not know, it is ready again. On other errors it stays
// as it is, and a later pass repeats this.
func (r *Reconciler) DeleteSnapshot(ctx context.Context, row store.Template) error {
	_, err := r.cfg.Host.DeleteSnapshot(ctx, connect.NewRequest(&hostv1.DeleteSnapshotRequest{Name: row.Name}))
	if err = hostapi.FromConnect(err); sandbox.Is(err, sandbox.KindConflict) {
		_, recordErr := r.cfg.Store.SetSnapshotState(ctx, row, sandbox.SnapshotReady)
		return errors.Join(err, recordErr)
	}
	if err != nil {
		return fmt.Errorf("delete on host: %w", err)
	}
	if err := fault.Point(ctx, "control/snapshot/deleted"); err != nil {
		return err
	}
	return r.cfg.Store.RemoveSnapshot(ctx, row)
}

func (r *Reconciler) noteSnapshot(name string, do SnapshotDo, err error) {
	switch {
	case do == LeaveSnapshot:
	case err == nil:
		r.cfg.Log.Info("snapshot settled", "snapshot", name, "host", r.cfg.HostName, "op", "reconcile", "did", do)
	case sandbox.Is(err, sandbox.KindConflict), sandbox.Is(err, sandbox.KindExists), sandbox.Is(err, sandbox.KindNotFound):
		// Somebody else was at it: the next pass looks again.
	default:
		r.cfg.Log.Error("snapshot not settled", "snapshot", name, "op", "reconcile", "err", err)
	}
}
