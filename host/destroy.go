package host

import (
	"context"
	"errors"
	"fmt"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// Destroy ends a sandbox and returns when nothing of it is left. Destroying one
// that has ended, or that the host does not know, is success.
func (a *Agent) Destroy(ctx context.Context, id string, cause sandbox.Cause) (Status, error) {
	if cause == "" {
		cause = sandbox.CauseUser
	}
	if !cause.Valid() {
		return Status{}, sandbox.Errorf(sandbox.KindInvalid, "unknown cause %q", cause)
	}
	b, err := a.box(id)
	if sandbox.Is(err, sandbox.KindNotFound) {
		return Status{}, nil
	}
	if err != nil {
		return Status{}, err
	}
	if err := a.end(ctx, b, cause, ""); err != nil {
		return Status{}, err
	}
	return statusOf(b.now()), nil
}

// end takes a sandbox to its end, whatever it is doing: a create under way is
// cancelled, calls into the guest get the cause. The first cause stays. The
// detail may be a guest's word.
func (a *Agent) end(ctx context.Context, b *box, cause sandbox.Cause, detail string) error {
	detail = printable(detail)
	b.die(errEnding(b.id, cause, detail))
	b.op.Lock()
	defer b.op.Unlock()
	if a.isClosed() { // the handles are given up, and the next agent may be at work
		return errClosing
	}
	e := b.now()
	if e.State == stateEnded {
		return nil
	}
	// Removing must not stop half-way because the caller went away.
	ctx = context.WithoutCancel(ctx)
	if e.State != stateDestroying {
		if err := fault.Point(ctx, "host/destroy/journal"); err != nil {
			return err
		}
		e.State, e.Cause, e.Detail = stateDestroying, cause, detail
		b.unnoted = !a.intend(e)
		b.set(func(live *entry) { live.State, live.Cause, live.Detail = e.State, e.Cause, e.Detail })
	} else if b.unnoted {
		b.unnoted = !a.intend(e)
	}
	return a.finish(ctx, b)
}

// intend writes down that a sandbox is to be removed. The removal goes on when
// that fails, whatever the reason: it is what gives resources back, and a full
// disk its space. A crash in the middle is then found as a VM that is gone.
func (a *Agent) intend(e entry) (noted bool) {
	err := a.journal.write("destroy-intent", e)
	if err != nil {
		a.log.Warn("removing a sandbox without a note in the journal", "sandbox", e.ID, "cause", e.Cause, "err", err)
	}
	return err == nil
}

// finish removes what is left of a sandbox that is being destroyed; the caller
// holds op.
func (a *Agent) finish(ctx context.Context, b *box) error {
	b.shut()
	m := b.machine
	if m == nil {
		var err error
		if m, err = a.remains(ctx, b); err != nil {
			return fmt.Errorf("destroy %s: %w", b.id, err)
		}
	}
	if err := m.remove(ctx); err != nil {
		return fmt.Errorf("destroy %s: %w", b.id, err)
	}
	b.machine, b.network = nil, nil
	if err := fault.Point(ctx, "host/destroy/record"); err != nil {
		return err
	}
	e := b.now()
	if err := a.recordEnd(b, stateEnded, e.Cause, e.Detail); err != nil {
		return err
	}
	a.log.Info("sandbox ended", "sandbox", b.id, "cause", e.Cause)
	return nil
}

// recordEnd writes that a sandbox has ended, or that it has to. When the journal
// cannot be written the sandbox stays destroying in memory and is tried again.
func (a *Agent) recordEnd(b *box, next state, cause sandbox.Cause, detail string) error {
	e := b.now()
	detail = printable(detail)
	e.State, e.Cause, e.Detail, e.EndedAt = next, cause, detail, a.cfg.Now()
	e.Slot, e.Disk, e.VMM, e.Token, e.Spec.Env = -1, nil, nil, "", nil
	var unkept error
	if next == stateEnded {
		if unkept = a.rescue(e); unkept == nil {
			e.Last = nil
		} else {
			next, e.State = stateDestroying, stateDestroying
		}
	}
	e.Base, e.Began, e.Env = snapshot.Digest{}, nil, nil
	err := errors.Join(unkept, a.journal.write("destroy-done", e))
	if err != nil && next == stateEnded {
		e.State = stateDestroying
	}
	b.set(func(live *entry) { *live = e })
	a.collectSoon()
	b.die(errEnding(b.id, cause, detail))
	if err != nil {
		a.log.Error("end not recorded yet", "sandbox", b.id, "err", err)
	}
	return err
}

// remains finds what the host still has of a sandbox that this agent did not
// make; the caller holds op. Its VM is found or gone afterwards. What else cannot
// be found is left to the sweeps.
func (a *Agent) remains(ctx context.Context, b *box) (*machine, error) {
	e := b.now()
	m := &machine{
		a: a, id: e.ID, network: b.network, group: a.cfg.Groups.Find(string(e.ID)),
		disk: leftDisk{a.cfg.Disks, a.stateDir(e.ID)},
	}
	if e.VMM != nil {
		vm, err := a.cfg.VMM.Adopt(ctx, *e.VMM)
		if err == nil {
			m.vm = vm
		} else if !sandbox.Is(err, sandbox.KindNotFound) {
			// It runs and does not answer. The great sweep may be held back for
			// long; this one is for it alone.
			if err := a.cfg.VMM.Sweep(ctx, a.runDir(e.ID)); err != nil {
				return nil, fmt.Errorf("end a VM that does not answer: %w", err)
			}
		}
	}
	if e.Slot >= 0 && m.network == nil && !a.slotIsAnothers(b, e.Slot) {
		if network, err := a.cfg.Networks.Adopt(ctx, e.Slot); err == nil {
			m.network = network
		}
	}
	return m, nil
}

// slotIsAnothers says that another sandbox names a network slot: it was given
// away again after this one's end had taken it down and could not be recorded.
func (a *Agent) slotIsAnothers(b *box, slot int) bool {
	for _, other := range a.all() {
		if e := other.now(); other != b && e.State != stateEnded && e.Slot == slot {
			return true
		}
	}
	return false
}

// Acknowledge lets the host forget ended sandboxes.
func (a *Agent) Acknowledge(ids []string) error {
	var errs []error
	for _, id := range ids {
		b, err := a.box(id)
		if sandbox.Is(err, sandbox.KindNotFound) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, a.forget(b))
	}
	return errors.Join(errs...)
}

func (a *Agent) forget(b *box) error {
	if e := b.now(); e.State != stateEnded {
		return sandbox.Errorf(sandbox.KindConflict, "sandbox %s is %s, only ended ones can be acknowledged", b.id, e.State)
	}
	b.op.Lock()
	defer b.op.Unlock()
	if !a.has(b) || a.isClosed() { // somebody forgot it just now; its ID may be another sandbox's already
		return nil
	}
	if err := a.journal.remove(b.id); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.boxes, b.id)
	return nil
}

// shut keeps callers out.
func (b *box) shut() {
	b.mu.Lock()
	g := b.guest
	b.guest, b.vm, b.disk, b.frozen = nil, nil, nil, ""
	b.mu.Unlock()
	if g != nil {
		_ = g.close() // only idle connections: nothing can be lost
	}
}

// DestroyAll ends every sandbox of this host and says how many it ended. Paused
// ones are data, and outlive a server that is taken down.
func (a *Agent) DestroyAll(ctx context.Context, cause sandbox.Cause) (ended int, _ error) {
	var errs []error
	for _, b := range a.all() {
		if s := b.now().State; s == stateEnded || s == statePaused && cause == sandbox.CauseShutdown {
			continue
		}
		if err := a.end(ctx, b, cause, ""); err != nil {
			errs = append(errs, err)
			continue
		}
		ended++
	}
	return ended, errors.Join(append(errs, a.sweepAtLast(ctx, len(errs) > 0))...)
}
