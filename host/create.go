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
}

// Create boots a sandbox and returns when its guest answers. On an error
// nothing of it is left on the host but the record of why.
func (a *Agent) Create(ctx context.Context, req CreateRequest) (Status, error) {
	p, err := a.plan(req)
	if err != nil {
		return Status{}, err
	}
	b, created, err := a.reserve(p.entry)
	if err != nil {
		return Status{}, err
	}
	if !created {
		return a.existing(b, p.entry)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(b.alive, func() { cancel(context.Cause(b.alive)) })
	defer stop()
	defer context.AfterFunc(a.ctx, func() { cancel(errClosing) })()

	defer b.op.Unlock() // reserve locked it
	if err := a.create(ctx, b, p); err != nil {
		a.createFailed(b, err)
		return statusOf(b.now()), err
	}
	return statusOf(b.now()), nil
}

var errClosing = sandbox.WithKind(sandbox.KindTransient, errors.New("the host agent is stopping"))

// plan checks a request and finds its template.
func (a *Agent) plan(req CreateRequest) (plan, error) {
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
	if req.Hostname == "" {
		req.Hostname = string(req.ID)
	}
	if err := sandbox.SafeName("host", req.Hostname); err != nil {
		return plan{}, err
	}
	t, err := a.cfg.Templates.Get(spec.Template)
	if err != nil {
		return plan{}, err
	}
	if need := int((t.ImageBytes + 1<<20 - 1) >> 20); spec.DiskMiB < need {
		return plan{}, sandbox.Errorf(sandbox.KindInvalid, "disk_mib is %d, template %s needs at least %d", spec.DiskMiB, t.Name, need)
	}
	if free := freeMiB(a.cfg.Dir); free < a.cfg.MinFreeMiB {
		return plan{}, sandbox.Errorf(sandbox.KindNoSpace, "the host has %d MiB of free disk, creates need %d", free, a.cfg.MinFreeMiB)
	}
	return plan{template: t, entry: entry{
		ID: req.ID, State: stateCreating, Spec: spec, Hostname: req.Hostname,
		CreatedAt: now, Deadline: req.Deadline, Slot: -1, Token: newToken(),
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
	live, mem := a.load()
	if live >= a.cfg.MaxSandboxes {
		return nil, false, sandbox.Errorf(sandbox.KindBusy, "the host runs %d sandboxes, its limit is %d", live, a.cfg.MaxSandboxes)
	}
	if mem+a.costMiB(e.Spec) > a.cfg.MaxMemMiB {
		return nil, false, sandbox.Errorf(sandbox.KindBusy,
			"mem_mib is %d, which takes up to %d MiB here, but %d of this host's %d MiB are promised to other sandboxes",
			e.Spec.MemMiB, a.costMiB(e.Spec), mem, a.cfg.MaxMemMiB)
	}
	b := newBox(e)
	b.op.Lock()
	a.boxes[e.ID] = b
	return b, true, nil
}

// load counts sandboxes that have not ended, and what memory they may come to
// take, VMMs included; the caller holds mu.
func (a *Agent) load() (live, memMiB int) {
	for _, b := range a.boxes {
		if e := b.now(); e.State != stateEnded {
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
	m, g, err := a.bootInTurn(ctx, p, watch)
	b.machine = m
	if err != nil {
		return err
	}
	if err := a.publish(ctx, b, g, watch); err != nil {
		rollback := errors.Join(g.close(), m.remove(ctx))
		if rollback == nil {
			b.machine = nil
		}
		return errors.Join(err, rollback)
	}
	a.wg.Go(func() { a.watch(b, m.vm) })
	a.log.Info("sandbox runs", "sandbox", b.id, "template", p.entry.Spec.Template, "took", total(watch.phases))
	return nil
}

// bootInTurn assembles the machine while fewer than MaxBoots others boot: all
// at once would make every one of them late.
func (a *Agent) bootInTurn(ctx context.Context, p plan, watch *stopwatch) (*machine, *guest, error) {
	select {
	case a.boots <- struct{}{}:
		defer func() { <-a.boots }()
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("wait to boot: %w", context.Cause(ctx))
	}
	watch.lap("queue")
	return a.assemble(ctx, p, watch)
}

// publish writes "running" down and lets callers in.
func (a *Agent) publish(ctx context.Context, b *box, g *guest, watch *stopwatch) error {
	if err := fault.Point(ctx, "host/create/publish"); err != nil {
		return err
	}
	m := b.machine
	record := m.vm.Record()
	watch.lap("publish")
	ready := func(e *entry) {
		e.State, e.Slot, e.VMM, e.Disk, e.Phases = stateRunning, m.network.Index(), &record, &m.config, watch.phases
	}
	e := b.now()
	ready(&e)
	if err := a.journal.write("create-done", e); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx) // ended meanwhile: the caller rolls back and writes the end
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	ready(&b.entry) // not a copy: the deadline may have moved
	b.guest, b.vm = g, m.vm
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
