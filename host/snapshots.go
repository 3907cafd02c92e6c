package host

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// ownPrefix begins the names of references that are nobody's but the host's.
const ownPrefix = "dormouse."

// SnapshotInfo is what the host says of a named snapshot.
type SnapshotInfo struct {
	Name      string
	Point     PointInfo
	Sandbox   sandbox.ID // which it was taken of
	Template  string     // the image at the beginning of its line
	Parent    string     // the nearest snapshot above it that has a name
	Labels    map[string]string
	CreatedAt time.Time
}

// PointInfo is what the host says of a memory and a disk that are kept.
type PointInfo struct {
	VCPUs, MemMiB, DiskMiB int // locked
	Compat                 string
	Generation             int
	Memory, Disk, Parent   snapshot.Digest
	MemoryBytes, DiskBytes int64 // allocated, of all that it consists of
	OwnBytes               int64 // that were written for it
	At                     time.Time
}

func (p *point) info() *PointInfo {
	if p == nil {
		return nil
	}
	return &PointInfo{
		VCPUs: p.VCPUs, MemMiB: p.MemMiB, DiskMiB: p.DiskMiB, Compat: p.Compat, Generation: p.Generation,
		Memory: p.Memory, Disk: p.Disk, Parent: p.Parent, MemoryBytes: p.MemoryBytes, DiskBytes: p.DiskBytes, OwnBytes: p.Written, At: p.At,
	}
}

// checkSnapshotName says whether a snapshot may have a name.
func checkSnapshotName(name string) error {
	if err := sandbox.SafeName("snapshot", name); err != nil {
		return err
	}
	if strings.HasPrefix(name, ownPrefix) {
		return sandbox.Errorf(sandbox.KindInvalid, "snapshot name %q begins with %q, which is the host's own", name, ownPrefix)
	}
	return nil
}

// Snapshot gives the present moment of a sandbox a name. One that runs runs on;
// one that is paused stays so.
func (a *Agent) Snapshot(ctx context.Context, id, name string, labels map[string]string) (SnapshotInfo, Saved, error) {
	none := func(err error) (SnapshotInfo, Saved, error) { return SnapshotInfo{}, Saved{}, err }
	if err := checkSnapshotName(name); err != nil {
		return none(err)
	}
	b, err := a.box(id)
	if err != nil {
		return none(err)
	}
	b.op.Lock()
	defer b.op.Unlock()
	if err := a.nameIsFree(name); err != nil {
		return none(err)
	}
	watch := newStopwatch(a.cfg.Now)
	// What has begun ends by itself, one way or the other.
	ctx = context.WithoutCancel(ctx)
	p, release, err := a.pointOfNow(ctx, b, watch)
	if err != nil {
		return none(fmt.Errorf("snapshot of %s: %w", b.id, err))
	}
	defer release()
	ref, err := a.name(ctx, p, name, labels)
	if err != nil {
		return none(fmt.Errorf("snapshot of %s: %w", b.id, err))
	}
	watch.phase(sandbox.PhasePublish)
	a.log.Info("snapshot made", "sandbox", b.id, "snapshot", name, "generation", p.Generation, "written", p.Written, "took", total(watch.phases))
	refs, err := a.cfg.Snapshots.Refs()
	if err != nil {
		a.log.Error("snapshots not all read", "err", err)
	}
	info, err := describe(ref, namesOf(refs))
	return info, watch.saved(b, p), err
}

// rescue gives the last point of a sandbox that failed a name, which is the
// sandbox's ID: what was paused or kept once is not lost with a VM.
func (a *Agent) rescue(e entry) error {
	switch e.Cause {
	case sandbox.CauseUser, sandbox.CauseTTL, sandbox.CauseShutdown:
		return nil
	}
	p := e.Last
	if p == nil || p.Warm || p.Guest != e.ID || a.cfg.Snapshots == nil {
		return nil
	}
	if err := fault.Point(context.Background(), "host/snapshot/rescue"); err != nil {
		return err
	}
	kept := *p
	kept.Labels = map[string]string{"rescued": string(e.Cause)}
	ref, err := kept.ref(string(e.ID))
	if err != nil {
		return err
	}
	if err := a.cfg.Snapshots.SetRef(ref); err != nil {
		return err
	}
	a.log.Info("the last point of a failed sandbox is kept as a snapshot", "snapshot", e.ID, "cause", e.Cause)
	return nil
}

// nameIsFree says whether neither a snapshot nor a template has a name.
func (a *Agent) nameIsFree(name string) error {
	if a.cfg.Snapshots == nil {
		return errNoStore
	}
	if _, err := a.cfg.Snapshots.Ref(name); !sandbox.Is(err, sandbox.KindNotFound) {
		return errors.Join(sandbox.Errorf(sandbox.KindExists, "there is a snapshot %q already", name), err)
	}
	if _, err := a.cfg.Templates.Get(name); !sandbox.Is(err, sandbox.KindNotFound) {
		return errors.Join(sandbox.Errorf(sandbox.KindExists, "there is a template %q already", name), err)
	}
	return nil
}

// name publishes a point that is pinned.
func (a *Agent) name(ctx context.Context, p *point, name string, labels map[string]string) (snapshot.Ref, error) {
	if err := fault.Point(ctx, "host/snapshot/name"); err != nil {
		return snapshot.Ref{}, err
	}
	a.naming.Lock() // two sandboxes may be given one name at the same time
	defer a.naming.Unlock()
	if err := a.nameIsFree(name); err != nil {
		return snapshot.Ref{}, err
	}
	labelled := *p
	labelled.Labels = labels
	ref, err := labelled.ref(name)
	if err != nil {
		return snapshot.Ref{}, err
	}
	return ref, a.cfg.Snapshots.SetRef(ref)
}

// pointOfNow is where a sandbox is, as a point that is pinned; the caller holds op.
func (a *Agent) pointOfNow(ctx context.Context, b *box, watch *stopwatch) (*point, func(), error) {
	if e := b.now(); e.State == statePaused && b.alive.Err() == nil && !a.isClosed() {
		release, err := a.pin(e.Last)
		return e.Last, release, err
	}
	if err := a.pausable(b); err != nil {
		return nil, nil, err
	}
	return a.captureLive(ctx, b, watch)
}

// captureLive makes a point of a sandbox that runs on.
func (a *Agent) captureLive(ctx context.Context, b *box, watch *stopwatch) (_ *point, _ func(), err error) {
	if err := b.machine.disk.Prepare(ctx); err != nil {
		return nil, nil, fmt.Errorf("prepare the disk: %w", err)
	}
	now, err := a.glance(ctx, b, watch)
	defer func() { err = errors.Join(err, now.Close()) }()
	if err != nil {
		return nil, nil, err
	}
	p, release, err := a.keep(ctx, b.now(), now, watch)
	if err != nil {
		return nil, nil, err
	}
	// The next point is a diff to this one.
	if err := a.move(ctx, b, "snapshot-done", "host/snapshot/note", func(e *entry) { e.Last = p }); err != nil {
		release()
		return nil, nil, err
	}
	a.collectSoon() // the point before is nobody's any more
	return p, release, nil
}

// glance freezes a sandbox for as long as it takes to look at it and to copy what
// has changed of its memory.
func (a *Agent) glance(ctx context.Context, b *box, watch *stopwatch) (now moment, err error) {
	var u undo.Stack
	copied := false // the disk, too
	now, err = a.still(ctx, b, &u, watch, func(ctx context.Context) (disk.Changes, error) {
		changes, err := b.machine.disk.Next(ctx, b.machine.vm.SwitchDisk)
		if !sandbox.Is(err, sandbox.KindConflict) {
			return changes, err
		}
		copied = true // it has moved on too often
		return b.machine.disk.Changed(ctx)
	})
	if err == nil {
		err = a.room(now)
	}
	if err == nil {
		err = a.spool(ctx, &now, &now.memory)
	}
	if err == nil && copied {
		err = a.spool(ctx, &now, &now.disk)
	}
	watch.phase(sandbox.PhaseCopy)
	err = errors.Join(err, u.Run(ctx)) // the same on every way out: it runs on
	watch.phase(sandbox.PhaseThaw)
	watch.stopped = a.cfg.Now().Sub(watch.stoodAt)
	return now, err
}

// pin keeps a point until release.
func (a *Agent) pin(p *point) (release func(), err error) {
	var pins []*snapshot.Pin
	release = func() {
		for _, pin := range pins {
			pin.Release()
		}
	}
	for _, d := range p.roots() {
		pin, err := a.cfg.Snapshots.Pin(d)
		if err != nil {
			release()
			return nil, err
		}
		pins = append(pins, pin)
	}
	return release, nil
}

// pointNamed finds a snapshot and pins it.
func (a *Agent) pointNamed(name string) (*point, func(), error) {
	if a.cfg.Snapshots == nil || strings.HasPrefix(name, ownPrefix) {
		return nil, nil, sandbox.Errorf(sandbox.KindNotFound, "there is no snapshot %q", name)
	}
	ref, err := a.cfg.Snapshots.Ref(name)
	if err != nil {
		return nil, nil, err
	}
	p, err := pointOf(ref)
	if err != nil {
		return nil, nil, err
	}
	release, err := a.pin(p)
	return p, release, err
}

// Snapshots lists the named ones. What cannot be read is in the log.
func (a *Agent) Snapshots() ([]SnapshotInfo, error) {
	if a.cfg.Snapshots == nil {
		return nil, nil
	}
	refs, err := a.cfg.Snapshots.Refs()
	if err != nil {
		a.log.Error("snapshots not all read", "err", err)
	}
	names := namesOf(refs)
	var out []SnapshotInfo
	for _, r := range refs {
		if strings.HasPrefix(r.Name, ownPrefix) {
			continue
		}
		info, err := describe(r, names)
		if err != nil {
			a.log.Error("snapshot not read", "snapshot", r.Name, "err", err)
			continue
		}
		out = append(out, info)
	}
	return out, nil
}

// namesOf are the snapshots' names, by their memories. Of two names of one moment it
// is the first.
func namesOf(refs []snapshot.Ref) map[snapshot.Digest]string {
	names := map[snapshot.Digest]string{}
	for _, r := range refs {
		memory := r.Manifests["memory"]
		if had, ok := names[memory]; !memory.IsZero() && !strings.HasPrefix(r.Name, ownPrefix) && (!ok || r.Name < had) {
			names[memory] = r.Name
		}
	}
	return names
}

func describe(r snapshot.Ref, names map[snapshot.Digest]string) (SnapshotInfo, error) {
	p, err := pointOf(r)
	if err != nil {
		return SnapshotInfo{}, err
	}
	info := SnapshotInfo{
		Name: r.Name, Point: *p.info(), Sandbox: p.Guest, Template: p.Template, Labels: p.Labels, CreatedAt: r.CreatedAt,
	}
	for _, d := range p.above() {
		if info.Parent = names[d]; info.Parent != "" {
			break
		}
	}
	return info, nil
}

// DeleteSnapshot takes a name away; what only that has kept goes with it. It is
// refused while sandboxes live that were made from it. Deleting what is gone is
// success.
func (a *Agent) DeleteSnapshot(ctx context.Context, name string) error {
	if err := checkSnapshotName(name); err != nil {
		return err
	}
	if a.cfg.Snapshots == nil {
		return errNoStore
	}
	if users := a.usersOf(name); len(users) > 0 {
		return sandbox.Errorf(sandbox.KindConflict, "snapshot %q is what %s is made from", name, strings.Join(users, ", "))
	}
	if err := fault.Point(ctx, "host/snapshot/delete"); err != nil {
		return err
	}
	if err := a.cfg.Snapshots.RemoveRef(name); err != nil {
		return err
	}
	a.collectSoon()
	a.log.Info("snapshot deleted", "snapshot", name)
	return nil
}

// usersOf names sandboxes that were made from a snapshot, ten at most.
func (a *Agent) usersOf(name string) []string {
	var users []string
	for _, b := range a.all() {
		if e := b.now(); e.State != stateEnded && e.Spec.Template == name {
			users = append(users, "sandbox "+string(b.id))
		}
		if len(users) == 10 {
			return append(users, "and others")
		}
	}
	return users
}

// VerifySnapshot reads all of a snapshot and says what is damaged.
func (a *Agent) VerifySnapshot(ctx context.Context, name string) (snapshot.Report, error) {
	if err := checkSnapshotName(name); err != nil {
		return snapshot.Report{}, err
	}
	if a.cfg.Snapshots == nil {
		return snapshot.Report{}, errNoStore
	}
	return a.cfg.Snapshots.Verify(ctx, name)
}
