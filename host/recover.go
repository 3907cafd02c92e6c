package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// recover brings the host and the journal together after a start.
//
// Running sandboxes are adopted. What was being made or removed is removed. At
// last everything that carries our instance and that nobody owns is swept. A
// running VM that cannot be adopted right now (rather than: is gone) is kept and
// tried again; until then nothing is swept.
func (a *Agent) recover(ctx context.Context) error {
	entries, err := a.journal.load()
	if err != nil {
		return err
	}
	for _, e := range entries {
		b := newBox(e)
		a.boxes[e.ID] = b
		switch e.State {
		case stateRunning, statePausing:
			if e.Build { // its build has died with the agent
				a.abandon(b)
				continue
			}
			a.takeOver(ctx, b)
		case stateCreating:
			a.abandon(b)
		case stateResuming:
			if err := a.resumeAbandoned(ctx, b); err != nil {
				return err
			}
		case stateEnded:
			b.die(errNotRunning(e))
		}
	}
	if err := a.sweep(ctx); err != nil { // what runs has to be looked after all the same
		a.log.Error("sweep, will try again", "err", err)
		a.setUnswept()
	}
	for _, b := range a.all() {
		a.finishLeft(ctx, b)
		a.forgetBuild(b)
	}
	return nil
}

// finishLeft removes what is left of a sandbox that an earlier agent was making
// or removing, or that ended while there was none. House-keeping goes on with
// what fails.
func (a *Agent) finishLeft(ctx context.Context, b *box) {
	b.op.Lock()
	defer b.op.Unlock()
	switch e := b.now(); {
	case e.State == stateDestroying:
		if err := a.finish(ctx, b); err != nil {
			a.log.Error("sandbox not removed yet", "sandbox", b.id, "err", err)
		}
	case e.State == statePaused && !e.cleared():
		if err := a.clear(ctx, b); err != nil {
			a.log.Error("paused sandbox not cleared yet", "sandbox", b.id, "err", err)
		}
	}
}

// abandon marks a create that the previous agent did not live to finish.
func (a *Agent) abandon(b *box) {
	b.set(func(e *entry) {
		e.State, e.Cause, e.Detail = stateDestroying, sandbox.CauseAgentCrash, "the host agent died during its create"
	})
}

// resumeAbandoned takes a sandbox back to paused whose resume the previous agent
// did not live to finish. Nothing that it goes on from has changed; its VM may run
// and is not in the journal.
func (a *Agent) resumeAbandoned(ctx context.Context, b *box) error {
	b.set(func(e *entry) { e.State = statePaused })
	return wrap("end a VM whose resume was not finished", a.cfg.VMM.Sweep(ctx, a.runDir(b.id)))
}

// takeOver adopts a running sandbox, or finds out how it ended.
func (a *Agent) takeOver(ctx context.Context, b *box) {
	b.op.Lock()
	defer b.op.Unlock()
	e := b.now()
	if e.State != stateRunning && e.State != statePausing || b.machine != nil || a.isClosed() {
		return
	}
	if e.VMM.BootID != a.cfg.BootID {
		a.lost(b, sandbox.CauseHostReboot, "the machine was started anew")
		return
	}
	m, err := a.adopt(ctx, b, e)
	switch {
	case sandbox.Is(err, sandbox.KindNotFound):
		cause := sandbox.CauseVMMCrash
		if a.oomKilled(b.id) {
			cause = sandbox.CauseOOMHost
		}
		a.lost(b, cause, fmt.Sprintf("gone when the host agent started: %v", err))
	case err != nil:
		a.log.Error("running vm not adopted, will try again", "sandbox", b.id, "err", err)
		a.setUnswept()
	default:
		b.machine, b.network = m, nil
		g := a.newGuest(m.network, e.Token)
		b.mu.Lock()
		b.entry.State = stateRunning // an interrupted pause is undone
		b.use.last = a.cfg.Now()
		b.guest, b.vm, b.disk = g, m.vm, m.disk
		b.mu.Unlock()
		a.wake(ctx, b, m.vm)
		a.wakeGuest(b, g)
		a.attend(b, m)
		a.log.Info("sandbox adopted", "sandbox", b.id, "pid", e.VMM.PID)
	}
}

// lost marks a sandbox whose VM is gone; recover removes the rest.
func (a *Agent) lost(b *box, cause sandbox.Cause, detail string) {
	detail = printable(detail) // the end of the console may be in it
	b.set(func(e *entry) { e.State, e.Cause, e.Detail = stateDestroying, cause, detail })
	b.die(errEnding(b.id, cause, detail))
}

// adopt finds every part of a running machine again; the caller holds op.
func (a *Agent) adopt(ctx context.Context, b *box, e entry) (_ *machine, err error) {
	m := &machine{a: a, id: e.ID, config: *e.Disk, base: e.Base, network: b.network, group: a.cfg.Groups.Find(string(e.ID))}
	if m.vm, err = a.cfg.VMM.Adopt(ctx, *e.VMM); err != nil {
		return nil, fmt.Errorf("adopt vm: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.vm.Release())
		}
	}()
	if m.disk, err = a.restoreDisk(ctx, e); err != nil {
		return nil, fmt.Errorf("restore disk: %w", err)
	}
	if m.network == nil {
		if m.network, err = a.cfg.Networks.Adopt(ctx, e.Slot); err != nil {
			return nil, fmt.Errorf("adopt network: %w", err)
		}
		b.network = m.network // it can be adopted once only
	}
	if err = m.network.SetInternet(ctx, e.Spec.Network.Internet); err != nil {
		return nil, fmt.Errorf("open network: %w", err)
	}
	return m, nil
}

func (a *Agent) setUnswept() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.unswept = true
}

// sweep removes VMM processes, control groups, disks, networks and folders that
// no sandbox owns. While
// a running one is not adopted yet it does nothing.
func (a *Agent) sweep(ctx context.Context) error {
	a.mu.Lock()
	hold := a.unswept
	a.mu.Unlock()
	if hold {
		return nil
	}
	return errors.Join(
		wrap("sweep vms", a.cfg.VMM.Sweep(ctx, a.cfg.RunDir)),
		wrap("sweep control groups", a.cfg.Groups.Sweep(ctx, a.knows)),
		wrap("sweep disks", a.sweepDisks(ctx)),
		wrap("sweep networks", a.cfg.Networks.Sweep(ctx)),
		wrap("sweep folders", a.sweepDirs()),
	)
}

// sweepDirs removes folders of sandboxes that are not in the journal.
func (a *Agent) sweepDirs() error {
	var errs []error
	for _, parent := range []string{filepath.Join(a.cfg.Dir, "sandboxes"), a.cfg.RunDir} {
		errs = append(errs, osfs.SweepTemp(parent))
		dirs, err := os.ReadDir(parent)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, d := range dirs {
			if _, err := sandbox.ParseID(d.Name()); err != nil {
				continue // not ours
			}
			if !a.knows(d.Name()) {
				errs = append(errs, os.RemoveAll(filepath.Join(parent, d.Name())))
			}
		}
	}
	return errors.Join(errs...)
}

// knows says whether there is a sandbox with this ID.
func (a *Agent) knows(id string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, known := a.boxes[sandbox.ID(id)]
	return known
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
