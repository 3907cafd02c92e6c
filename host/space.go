package host

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// A disk is promised to a sandbox and taken from the host only as it is written.
// When the host has no more to give, a guest would see I/O errors, and an overlay
// of device-mapper would be lost as a whole. So free space is watched, and VMs are
// frozen before it is gone: first those that write, in the last half of the
// reserve all of them. They go on as soon as there is space again.
//
// The reserve is what VMs may write from one look to the next, and while they are
// being stopped; no request of theirs is under way in a frozen one.
const (
	spaceTick      = 100 * time.Millisecond
	freezeLimit    = 5 * time.Second // for one VM to stop or go on
	freezeAgain    = time.Second     // after which a VM that did not is asked again
	defaultReserve = 256             // MiB
)

// space is how much room the host has, as far as VMs are concerned.
type space int

const (
	roomy  space = iota
	enough       // what is frozen stays so: going on and stopping in turns helps nobody
	little       // VMs that write are stopped
	none         // all are
)

func (a *Agent) spaceOf(freeBytes int64) space {
	reserve := int64(a.cfg.ReserveMiB) << 20
	switch {
	case freeBytes < reserve/2:
		return none
	case freeBytes < reserve:
		return little
	case freeBytes < reserve+reserve/4:
		return enough
	}
	return roomy
}

// watchSpace looks once. Whoever changes a sandbox just now is left alone: the
// next look is near.
func (a *Agent) watchSpace(now time.Time) {
	free, err := a.cfg.FreeBytes(a.cfg.Dir)
	if err != nil {
		a.log.Warn("free space not known", "err", err)
		return
	}
	room := a.spaceOf(free)
	for _, b := range a.all() {
		grew := room != roomy && b.grew()
		switch frozen := b.isFrozen(); {
		case !frozen && (room == none || room == little && grew):
			a.inTheBackground(b, now, a.freeze)
		case frozen && room == roomy:
			a.inTheBackground(b, now, a.thaw)
		}
	}
}

// grew says whether a sandbox's overlay has grown since it was asked last.
func (b *box) grew() bool {
	b.mu.Lock()
	d := b.disk
	b.mu.Unlock()
	if d == nil {
		return false
	}
	size, err := d.Allocated()
	if err != nil {
		return false // it goes away just now
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	before := b.overlay
	b.overlay = size
	return before != 0 && size > before
}

func (b *box) isFrozen() bool { return b.standsStill() != "" }

// standsStill is why, if it does.
func (b *box) standsStill() sandbox.Freeze {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.frozen
}

// inTheBackground freezes or thaws a running sandbox, with op held: a VMM that
// does not answer keeps no other one waiting.
func (a *Agent) inTheBackground(b *box, now time.Time, change func(context.Context, *box, vmm.Machine) error) {
	if !b.due(now) || !b.op.TryLock() {
		return
	}
	a.wg.Go(func() {
		defer b.op.Unlock()
		if b.machine == nil || b.now().State != stateRunning || b.alive.Err() != nil {
			return
		}
		ctx, cancel := context.WithTimeout(a.ctx, freezeLimit)
		defer cancel()
		if err := change(ctx, b, b.machine.vm); err != nil {
			a.log.Error("vm neither frozen nor thawed, will try again", "sandbox", b.id, "err", err)
			b.mu.Lock()
			b.again = now.Add(freezeAgain)
			b.mu.Unlock()
		}
	})
}

// due says that a running sandbox may be asked to stop or to go on.
func (b *box) due(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.entry.State == stateRunning && b.vm != nil && !now.Before(b.again)
}

// freeze stops a sandbox; the caller holds op. Callers are told before it stands
// still, so that none waits for it in vain.
func (a *Agent) freeze(ctx context.Context, b *box, vm vmm.Machine) error {
	b.setFrozen(sandbox.FreezeNoSpace)
	if err := vm.Freeze(ctx); err != nil {
		b.setFrozen("")
		return fmt.Errorf("freeze: %w", err)
	}
	a.log.Warn("sandbox frozen: the disk of the host is nearly full", "sandbox", b.id, "reserve_mib", a.cfg.ReserveMiB)
	return nil
}

// thaw lets it go on, and its guest's processes if a pause or snapshot has left
// them frozen; the caller holds op.
func (a *Agent) thaw(ctx context.Context, b *box, vm vmm.Machine) error {
	if err := vm.Thaw(ctx); err != nil {
		return fmt.Errorf("thaw: %w", err)
	}
	b.mu.Lock()
	why, g := b.frozen, b.guest
	b.mu.Unlock()
	if why == sandbox.FreezeSave {
		if err := g.thaw(ctx, a.key, b.id, a.cfg.Now()); err != nil {
			return fmt.Errorf("thaw the guest's processes: %w", err)
		}
	}
	b.setFrozen("")
	a.log.Info("sandbox goes on", "sandbox", b.id)
	return nil
}

func (b *box) setFrozen(why sandbox.Freeze) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.frozen = why
}

// wake lets a VM go on that an earlier agent may have frozen; the caller holds
// op. One that does not, for now or for want of space, counts as frozen, and
// watchSpace goes on with it.
func (a *Agent) wake(ctx context.Context, b *box, vm vmm.Machine) {
	free, err := a.cfg.FreeBytes(a.cfg.Dir)
	if err == nil && a.spaceOf(free) >= little {
		b.setFrozen(sandbox.FreezeNoSpace)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, freezeLimit)
	defer cancel()
	if err := vm.Thaw(ctx); err != nil {
		b.setFrozen(sandbox.FreezeNoSpace)
		a.log.Error("adopted vm not thawed, will try again", "sandbox", b.id, "err", err)
	}
}

// errFrozen is what callers are told meanwhile.
func (a *Agent) errFrozen(id sandbox.ID, why sandbox.Freeze) error {
	if why == sandbox.FreezeSave {
		return sandbox.Errorf(sandbox.KindTransient, "sandbox %s stands still: a pause or snapshot was given up, and it has not gone on yet; that is tried again", id)
	}
	return sandbox.Errorf(sandbox.KindNoSpace,
		"sandbox %s is frozen: the host has less than %d MiB of free disk; it goes on when there is more", id, a.cfg.ReserveMiB)
}

// freeBytes is what an unprivileged process could still write to dir's file
// system.
func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}
