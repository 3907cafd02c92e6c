package host

import (
	"context"

	"github.com/dormouse-sandbox/dormouse/cgroup"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// Group is the control group of one sandbox's VMM, as package cgroup makes it.
type Group interface {
	Path() string
	OOMKilled() (bool, error)
	Remove(ctx context.Context) error
}

// Groups makes them. Find never fails: removing a group that is not there is
// success.
type Groups interface {
	Create(name string, l cgroup.Limits) (Group, error)
	Find(name string) Group
	Sweep(ctx context.Context, keep func(name string) bool) error
}

// ControlGroups offers a tree of package cgroup as Groups.
type ControlGroups struct{ *cgroup.Tree }

// Create makes a group.
func (c ControlGroups) Create(name string, l cgroup.Limits) (Group, error) {
	return c.Tree.Create(name, l)
}

// Find names a group.
func (c ControlGroups) Find(name string) Group { return c.Tree.Find(name) }

// noGroups is a host without control groups.
type noGroups struct{}

func (noGroups) Create(string, cgroup.Limits) (Group, error)         { return noGroup{}, nil }
func (noGroups) Find(string) Group                                   { return noGroup{} }
func (noGroups) Sweep(context.Context, func(name string) bool) error { return nil }

type noGroup struct{}

func (noGroup) Path() string                 { return "" }
func (noGroup) OOMKilled() (bool, error)     { return false, nil }
func (noGroup) Remove(context.Context) error { return nil }

// limits are what a sandbox's VMM may take of the host.
func (a *Agent) limits(spec sandbox.Spec) cgroup.Limits {
	// A VMM has a thread per vCPU, some of its own, and as many as 64 that wait
	// for disk I/O.
	const threads = 128
	return cgroup.Limits{
		MemBytes: int64(a.costMiB(spec)) << 20,
		PIDs:     spec.VCPUs + threads,
		CPUs:     spec.VCPUs + 1, // one for the VMM's own work beside the guest's
	}
}

func (m *machine) makeGroup(ctx context.Context, p plan) error {
	if err := fault.Point(ctx, "host/create/cgroup"); err != nil {
		return err
	}
	g, err := m.a.cfg.Groups.Create(string(m.id), m.a.limits(p.entry.Spec))
	if err != nil {
		return err
	}
	m.group = g
	return nil
}

func (m *machine) removeGroup(ctx context.Context) error {
	if err := fault.Point(ctx, "host/destroy/cgroup"); err != nil {
		return err
	}
	if m.group == nil {
		return nil
	}
	if m.runs() {
		return errStillRuns
	}
	return m.group.Remove(ctx)
}

// exitOf is how a VM ended, as far as the host can tell: of a VMM that the kernel
// killed, its group knows why; of a guest that fell over a page which could not be
// read, what serves its memory.
func (a *Agent) exitOf(id sandbox.ID, vm vmm.Machine) vmm.Exit {
	exit := vm.Exit()
	switch {
	case exit.Cause == sandbox.CauseVMMCrash && a.oomKilled(id):
		exit.Cause = sandbox.CauseOOMHost
		exit.Detail += ": the kernel ended it for want of memory, at the limit of its control group or of the host"
		exit.Retry = false
	case exit.Cause == sandbox.CauseGuestExit && exit.Reset && a.lostMemory(id):
		exit.Cause = sandbox.CausePagerFault
		exit.Detail = "a page of the guest's saved memory could not be read: " + exit.Detail
	}
	return exit
}

func (a *Agent) oomKilled(id sandbox.ID) bool {
	killed, err := a.cfg.Groups.Find(string(id)).OOMKilled()
	if err != nil {
		a.log.Warn("control group not asked", "sandbox", id, "err", err)
	}
	return killed
}
