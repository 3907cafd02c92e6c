package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// CreateRequest says what to create. The caller chooses the ID, so that asking
// again after a lost answer finds the same sandbox.
type CreateRequest struct {
	ID       sandbox.ID
	Spec     sandbox.Spec
	Hostname string    // empty: the ID
	Deadline time.Time // when the host destroys it by itself
	// NoStart leaves the template's start command and its health check alone.
	NoStart bool
	// AutoPause is after how long of idleness the host pauses it by itself; 0 is
	// never.
	AutoPause time.Duration
}

// Create boots a sandbox and returns when its guest answers, its template's start
// command runs and the health check of that has succeeded. On an error
// nothing of it is left on the host but the record of why.
func (a *Agent) Create(ctx context.Context, req CreateRequest) (Status, error) {
	p, release, err := a.plan(req)
	if err != nil {
		return Status{}, err
	}
	defer release()
	return a.createPlanned(ctx, p)
}

func (a *Agent) createPlanned(ctx context.Context, p plan) (Status, error) {
	b, created, err := a.reserve(p.entry)
	if err != nil {
		return Status{}, err
	}
	if !created {
		return a.existing(b, p.entry)
	}
	err = a.createReserved(ctx, b, p)
	return statusOf(b.now()), err
}

// createReserved takes a sandbox that reserve has made to running, or to its end.
func (a *Agent) createReserved(ctx context.Context, b *box, p plan) error {
	ctx, cancel := a.while(ctx, b.alive)
	defer cancel()
	defer b.op.Unlock() // reserve locked it
	err := a.create(ctx, b, p)
	if err != nil {
		a.createFailed(b, err)
	}
	return err
}

var errClosing = sandbox.WithKind(sandbox.KindTransient, errors.New("the host agent is stopping"))

// plan checks a request and finds what it is made from. What that is made of is
// kept until release.
func (a *Agent) plan(req CreateRequest) (_ plan, release func(), err error) {
	p, err := a.checked(req)
	if err != nil {
		return plan{}, nil, err
	}
	spec := req.Spec
	t, err := a.cfg.Templates.Get(spec.Template)
	if sandbox.Is(err, sandbox.KindNotFound) {
		from, release, noSnapshot := a.pointNamed(spec.Template)
		if sandbox.Is(noSnapshot, sandbox.KindNotFound) {
			return plan{}, nil, err
		}
		if noSnapshot != nil {
			return plan{}, nil, noSnapshot
		}
		if err := errors.Join(from.shape(spec.Template, spec), a.fits(from)); err != nil {
			release()
			return plan{}, nil, err
		}
		p.begin(from, sandbox.StartSnapshot)
		return p, release, nil
	}
	if err != nil {
		return plan{}, nil, err
	}
	if need := int((t.ImageBytes + 1<<20 - 1) >> 20); spec.DiskMiB < need {
		return plan{}, nil, sandbox.Errorf(sandbox.KindInvalid, "disk_mib is %d, template %s needs at least %d", spec.DiskMiB, t.Name, need)
	}
	p.image = t
	p.entry.Env, p.entry.DefaultUser, p.entry.DefaultWorkdir = t.Env, t.DefaultUser, t.DefaultWorkdir
	return p, func() {}, nil
}

// checked checks what a request says, whatever it is made from.
func (a *Agent) checked(req CreateRequest) (plan, error) {
	if _, err := sandbox.ParseID(string(req.ID)); err != nil {
		return plan{}, err
	}
	spec := req.Spec
	if err := spec.Check(); err != nil {
		return plan{}, err
	}
	if a.costMiB(spec) > a.cfg.MaxMemMiB {
		return plan{}, sandbox.Errorf(sandbox.KindInvalid, "mem_mib is %d, which takes up to %d MiB here; this host has %d MiB for sandboxes",
			spec.MemMiB, a.costMiB(spec), a.cfg.MaxMemMiB)
	}
	now := a.cfg.Now()
	if err := sandbox.CheckTimeout(req.Deadline.Sub(now).Round(time.Second)); err != nil {
		return plan{}, fmt.Errorf("deadline: %w", err)
	}
	if req.AutoPause < 0 {
		return plan{}, sandbox.Errorf(sandbox.KindInvalid, "auto_pause is %v, must not be negative", req.AutoPause)
	}
	if req.Hostname == "" {
		req.Hostname = string(req.ID)
	}
	if err := sandbox.SafeName("host", req.Hostname); err != nil {
		return plan{}, err
	}
	if free := a.freeMiB(); free < a.cfg.MinFreeMiB {
		return plan{}, sandbox.Errorf(sandbox.KindNoSpace, "the host has %d MiB of free disk, creates need %d", free, a.cfg.MinFreeMiB)
	}
	return plan{start: sandbox.StartBoot, noStart: req.NoStart, entry: entry{
		ID: req.ID, State: stateCreating, Spec: spec, Hostname: req.Hostname,
		CreatedAt: now, Deadline: req.Deadline, Slot: -1, Token: newToken(),
		AutoPause: req.AutoPause,
	}}, nil
}

// reserve gives the sandbox its place, with op locked. When there is one with
// this ID already, that is returned instead, unlocked.
func (a *Agent) reserve(e entry) (_ *box, created bool, _ error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, false, errClosing
	}
	if b, ok := a.boxes[e.ID]; ok {
		return b, false, nil
	}
	if err := a.hasRoom(e.Spec); err != nil {
		return nil, false, err
	}
	b := newBox(e)
	b.op.Lock()
	a.boxes[e.ID] = b
	return b, true, nil
}

// hasRoom says whether another sandbox may run; the caller holds mu.
func (a *Agent) hasRoom(spec sandbox.Spec) error {
	live, mem := a.load()
	if live >= a.cfg.MaxSandboxes {
		return sandbox.Errorf(sandbox.KindBusy, "the host runs %d sandboxes, its limit is %d", live, a.cfg.MaxSandboxes)
	}
	if mem+a.costMiB(spec) > a.cfg.MaxMemMiB {
		return sandbox.Errorf(sandbox.KindBusy,
			"mem_mib is %d, which takes up to %d MiB here, but %d of this host's %d MiB are promised to other sandboxes",
			spec.MemMiB, a.costMiB(spec), mem, a.cfg.MaxMemMiB)
	}
	return nil
}

// load counts sandboxes that neither ended nor are paused, and what memory they
// may come to take, VMMs included; the caller holds mu.
func (a *Agent) load() (live, memMiB int) {
	for _, b := range a.boxes {
		if e := b.now(); e.State != stateEnded && e.State != statePaused {
			live++
			memMiB += a.costMiB(e.Spec)
		}
	}
	return live, memMiB
}

// costMiB is what a sandbox may come to take of the host's memory.
func (a *Agent) costMiB(spec sandbox.Spec) int {
	return spec.MemMiB + a.cfg.VMM.Capabilities().OverheadMiB
}

// existing answers a repeated create.
func (a *Agent) existing(b *box, want entry) (Status, error) {
	have := b.now()
	if !sameSpec(have.Spec, want.Spec) {
		return Status{}, sandbox.Errorf(sandbox.KindExists, "sandbox %s exists with another spec", b.id)
	}
	switch have.State {
	case stateRunning:
		return statusOf(have), nil
	case stateCreating:
		return Status{}, sandbox.Errorf(sandbox.KindBusy, "sandbox %s is being created", b.id)
	}
	return Status{}, errNotRunning(have)
}

// create takes a reserved sandbox to running.
func (a *Agent) create(ctx context.Context, b *box, p plan) error {
	watch := newStopwatch(a.cfg.Now)
	if err := fault.Point(ctx, "host/create/journal"); err != nil {
		return err
	}
	if err := a.journal.write("create-intent", p.entry); err != nil {
		return err
	}
	watch.lap("journal")
	m, g, err := a.createMachine(ctx, b, &p, watch)
	b.machine = m
	if err != nil {
		return err
	}
	err = a.startUp(ctx, m, g, p, watch)
	if err == nil {
		err = a.publish(ctx, b, g, p.from, p.start, watch)
	}
	if err != nil {
		rollback := errors.Join(g.close(), m.remove(ctx))
		if rollback == nil {
			b.machine = nil
		}
		return errors.Join(err, rollback)
	}
	a.attend(b, m)
	a.log.Info("sandbox runs", "sandbox", b.id, "template", p.entry.Spec.Template, "took", total(watch.phases))
	return nil
}

// bootInTurn assembles the machine when it is its turn.
func (a *Agent) bootInTurn(ctx context.Context, p plan, watch *stopwatch) (*machine, *guest, error) {
	done, err := a.turn(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer done()
	watch.lap("queue")
	return a.assemble(ctx, p, watch)
}

// turn waits until fewer than MaxBoots others boot: all at once would make every one
// of them late.
func (a *Agent) turn(ctx context.Context) (done func(), err error) {
	select {
	case a.boots <- struct{}{}:
		return func() { <-a.boots }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait to boot: %w", context.Cause(ctx))
	}
}

// publish writes "running" down and lets callers in.
func (a *Agent) publish(ctx context.Context, b *box, g *guest, from *point, how sandbox.Start, watch *stopwatch) error {
	if err := fault.Point(ctx, "host/create/publish"); err != nil {
		return err
	}
	m := b.machine
	record := m.vm.Record()
	watch.lap("publish")
	ready := func(e *entry) {
		e.State, e.Slot, e.VMM, e.Phases = stateRunning, m.network.Index(), &record, watch.phases
		e.Disk, e.DiskDriver, e.Base = &m.config, a.cfg.Disks[0].Name(), m.base
		e.Began, e.PausedAt, e.PausedBy, e.Start = from, time.Time{}, "", how
		switch {
		case from != nil:
			e.Last = from
		case m.kept != nil:
			e.Last = m.kept
		}
	}
	e := b.now()
	ready(&e)
	if err := a.journal.write("create-done", e); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx) // ended meanwhile: the caller rolls back and writes the end
	}
	b.awakened()
	defer func() { _ = m.unpin() }() // it never fails; what is needed is in the entry by then
	b.mu.Lock()
	defer b.mu.Unlock()
	ready(&b.entry) // not a copy: the deadline may have moved
	b.guest, b.vm, b.disk = g, m.vm, m.disk
	b.use = activity{last: a.cfg.Now()}
	return nil
}

// createFailed records why a create failed. What could not be rolled back is
// left to the house-keeping.
func (a *Agent) createFailed(b *box, err error) {
	cause, detail := sandbox.CauseCreateFailed, err.Error()
	var c *causeError
	switch {
	case b.alive.Err() != nil:
		cause, detail = causeOf(b)
	case errors.As(err, &c):
		cause = c.cause
	}
	next := stateEnded
	if b.machine != nil {
		next = stateDestroying
	}
	a.log.Warn("create failed", "sandbox", b.id, "cause", cause, "err", err)
	_ = a.recordEnd(b, next, cause, detail) // logged there, and tried again by the house-keeping
}

func total(phases []Phase) time.Duration {
	var sum time.Duration
	for _, p := range phases {
		sum += p.Took
	}
	return sum
}
