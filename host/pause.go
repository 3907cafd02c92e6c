package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// Saved is what a pause, a snapshot or a fork has made durable, and what it cost.
type Saved struct {
	Status
	Phases  []Phase
	Stopped time.Duration // how long the guest stood still, where it runs on
	Memory  snapshot.Stats
	Disk    snapshot.Stats
	Written int64 // bytes that were added to the store
}

func (s *stopwatch) saved(b *box, p *point) Saved {
	return Saved{Status: b.status(), Phases: s.phases, Stopped: s.stopped, Memory: s.memory, Disk: s.disk, Written: p.Written}
}

// errPaused is what callers into the guest are told whose call a pause ends.
func errPaused(id sandbox.ID) error {
	return sandbox.Errorf(sandbox.KindPaused, "sandbox %s is paused", id)
}

// Pause stops a sandbox and keeps it on disk. When it returns without an error,
// all of it is durable and nothing of it is left but that; after an error the
// sandbox runs on. Pausing a paused one is success.
func (a *Agent) Pause(ctx context.Context, id string) (Saved, error) {
	b, err := a.box(id)
	if err != nil {
		return Saved{}, err
	}
	b.op.Lock()
	defer b.op.Unlock()
	return a.pause(ctx, b, sandbox.PauseUser)
}

// pause is Pause with op held.
func (a *Agent) pause(ctx context.Context, b *box, why sandbox.PauseReason) (Saved, error) {
	if b.now().State == statePaused {
		return Saved{Status: b.status()}, nil
	}
	if err := a.pausable(b); err != nil {
		return Saved{}, err
	}
	watch := newStopwatch(a.cfg.Now)
	// A pause that has begun ends by itself, one way or the other.
	ctx = context.WithoutCancel(ctx)
	release, err := a.toDisk(ctx, b, why, watch)
	if err != nil {
		return Saved{}, fmt.Errorf("pause %s: %w", b.id, err)
	}
	defer release()
	saved := watch.saved(b, b.now().Last)
	a.log.Info("sandbox paused", "sandbox", b.id, "by", why, "generation", b.now().Last.Generation, "written", saved.Written, "took", total(watch.phases))
	if err := a.clear(ctx, b); err != nil { // the pause stands: the house-keeping goes on
		a.log.Error("paused sandbox not cleared yet", "sandbox", b.id, "err", err)
	}
	return saved, nil
}

// pausable says whether a sandbox can be saved; the caller holds op.
func (a *Agent) pausable(b *box) error {
	e, frozen := b.now(), b.standsStill()
	switch {
	case a.isClosed():
		return errClosing
	case a.cfg.Snapshots == nil:
		return errNoStore
	case a.cfg.VMM.Capabilities().Compat == "":
		return sandbox.Errorf(sandbox.KindUnsupported, "this host's VMs (%s, %s) cannot be saved", a.cfg.VMM.Capabilities().Driver, a.cfg.VMM.Capabilities().Accelerator)
	case b.alive.Err() != nil:
		return context.Cause(b.alive)
	case e.State != stateRunning:
		return errNotRunning(e)
	case b.machine == nil:
		return sandbox.Errorf(sandbox.KindTransient, "sandbox %s is being taken over after a restart; try again", b.id)
	case b.machine.base.IsZero():
		return sandbox.Errorf(sandbox.KindUnsupported, "sandbox %s was made before this host kept snapshots", b.id)
	case frozen != "":
		return a.errFrozen(b.id, frozen)
	}
	return nil
}

// toDisk takes a running sandbox to paused; its machine is still there
// afterwards, frozen. After an error it runs on.
func (a *Agent) toDisk(ctx context.Context, b *box, why sandbox.PauseReason, watch *stopwatch) (release func(), err error) {
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	u.Push("pause", func(ctx context.Context) error { return a.unpause(ctx, b) })
	if err := a.move(ctx, b, "pause-intent", "host/pause/intent", func(e *entry) { e.State = statePausing }); err != nil {
		return nil, err
	}
	if err := a.usedMeanwhile(b, why); err != nil {
		return nil, err
	}
	watch.phase(sandbox.PhaseFreeze)
	now, err := a.still(ctx, b, &u, watch, b.machine.disk.Changed)
	defer func() { err = errors.Join(err, now.Close()) }()
	if err != nil {
		return nil, err
	}
	if err := a.room(now); err != nil {
		return nil, err
	}
	p, release, err := a.keep(ctx, b.now(), now, watch)
	if err != nil {
		return nil, err
	}
	if err := a.move(ctx, b, "pause-done", "host/pause/done", func(e *entry) {
		e.State, e.Last, e.PausedAt, e.PausedBy = statePaused, p, a.cfg.Now(), why
	}); err != nil {
		release()
		return nil, err
	}
	u.Take()
	return release, nil
}

// still freezes the guest's processes and then the VM, and looks at it. What has
// to be undone so that it runs on is pushed.
func (a *Agent) still(ctx context.Context, b *box, u *undo.Stack, watch *stopwatch, diskNow func(context.Context) (disk.Changes, error)) (moment, error) {
	m := b.machine
	if err := fault.Point(ctx, "host/capture/quiesce"); err != nil {
		return moment{}, err
	}
	b.mu.Lock()
	g, endWaking := b.guest, b.endWaking
	b.mu.Unlock()
	endWaking()
	watch.stoodAt = a.cfg.Now()
	u.Push("standstill", func(ctx context.Context) error { return a.goOn(ctx, b, m.vm, g) })
	if err := g.freeze(ctx, a.key, b.id, a.cfg.Now(), guestapi.Freeze{}); err != nil {
		return moment{}, fmt.Errorf("freeze the guest's processes: %w", err)
	}
	watch.phase(sandbox.PhaseFreeze)
	if err := fault.Point(ctx, "host/capture/freeze"); err != nil {
		return moment{}, err
	}
	if err := m.vm.Freeze(ctx); err != nil {
		return moment{}, fmt.Errorf("freeze vm: %w", err)
	}
	watch.phase(sandbox.PhaseFreeze)
	now, err := m.look(ctx, watch, diskNow)
	now.guest = b.id
	return now, err
}

// goOn lets a VM run on, and its guest's processes. One that does not counts as
// frozen, and watchSpace tries again.
func (a *Agent) goOn(ctx context.Context, b *box, vm vmm.Machine, g *guest) error {
	ctx, cancel := context.WithTimeout(ctx, freezeLimit)
	defer cancel()
	err := vm.Thaw(ctx)
	if err == nil {
		err = g.thaw(ctx, a.key, b.id, a.cfg.Now())
	}
	if err != nil {
		b.setFrozen(sandbox.FreezeSave)
	}
	return err
}

// unpause writes down that a sandbox runs on.
func (a *Agent) unpause(ctx context.Context, b *box) error {
	return a.move(ctx, b, "pause-undone", "host/pause/undone", func(e *entry) { e.State = stateRunning })
}

// move changes an entry in the journal, and then in memory. What is in memory
// follows only what is durable, but on the way back to running.
func (a *Agent) move(ctx context.Context, b *box, op, point string, change func(*entry)) error {
	err := fault.Point(ctx, point)
	e := b.now()
	change(&e)
	if err == nil {
		err = a.journal.write(op, e)
	}
	if err == nil || e.State == stateRunning {
		b.set(change)
	}
	return err
}

// clear removes the machine of a paused sandbox; the caller holds op.
func (a *Agent) clear(ctx context.Context, b *box) error {
	b.sleep(errPaused(b.id))
	m := b.machine
	if m == nil {
		var err error
		if m, err = a.remains(ctx, b); err != nil {
			return err
		}
	}
	if err := m.remove(ctx); err != nil {
		return err
	}
	b.machine, b.network = nil, nil
	a.collectSoon() // of the point before, and of what it has begun with
	return a.move(ctx, b, "pause-cleared", "host/pause/cleared", func(e *entry) {
		e.VMM, e.Disk, e.Slot, e.Began, e.Base, e.Token = nil, nil, -1, nil, snapshot.Digest{}, ""
	})
}
