package host_test

import (
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const (
	reserve = int64(100) << 20
	plenty  = int64(100) << 30
)

func spaceRig(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.agentCfg = func(c *host.Config) { c.ReserveMiB = int(reserve >> 20) }
	r.open()
	return r
}

func (r *rig) folder(id sandbox.ID) string { return r.dir + "/host/sandboxes/" + string(id) }

// frozen waits until a sandbox is frozen, or goes on.
func (r *rig) frozen(id sandbox.ID, want sandbox.Freeze) {
	r.t.Helper()
	testkit.Eventually(r.t, 5*time.Second, "frozen: "+string(want), func() bool { return r.status(id).Frozen == want })
}

// answers asks a guest, which a frozen one never does.
func (r *rig) answers(id sandbox.ID) error {
	_, err := r.agent.Ping(r.t.Context(), string(id))
	return err
}

func TestVMsAreFrozenBeforeTheDiskIsFull(t *testing.T) {
	r := spaceRig(t)
	writer, idle := r.mustCreate(), r.mustCreate()

	r.free.Store(reserve - 1) // little: who writes stands still
	testkit.Eventually(t, 5*time.Second, "the writer is frozen", func() bool {
		r.disks.grow(r.folder(writer))
		return r.status(writer).Frozen == sandbox.FreezeNoSpace
	})
	err := r.answers(writer)
	if !sandbox.Is(err, sandbox.KindNoSpace) || !strings.Contains(err.Error(), "less than 100 MiB") {
		t.Errorf("a call into a frozen sandbox: %v", err)
	}
	if err := r.answers(idle); err != nil {
		t.Errorf("the one that does not write: %v", err)
	}

	r.free.Store(reserve/2 - 1) // none: all stand still
	r.frozen(idle, sandbox.FreezeNoSpace)

	r.free.Store(reserve + reserve/8) // enough is not yet plenty: nobody goes on to stop again
	third := r.mustCreate()
	if s := r.status(writer); s.Frozen == "" || s.State != "running" {
		t.Errorf("with a little more space: %+v", s)
	}
	r.free.Store(plenty)
	for _, id := range []sandbox.ID{writer, idle, third} {
		r.frozen(id, "")
		if err := r.answers(id); err != nil {
			t.Errorf("with space again: %v", err)
		}
	}
}

// TestFrozenVMsEnd: a frozen sandbox is destroyed as any other, by its owner and
// by its deadline.
func TestFrozenVMsEnd(t *testing.T) {
	r := spaceRig(t)
	one, two := r.mustCreate(), r.mustCreate()
	r.free.Store(1)
	r.frozen(one, sandbox.FreezeNoSpace)
	r.frozen(two, sandbox.FreezeNoSpace)
	if err := r.agent.SetDeadline(string(two), time.Now().Add(2*time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.agent.Destroy(t.Context(), string(one), ""); err != nil {
		t.Error(err)
	}
	testkit.Eventually(t, 10*time.Second, "the deadline has fired", func() bool { return r.status(two).Cause == sandbox.CauseTTL })
	testkit.Eventually(t, 5*time.Second, "nothing is left", func() bool { return len(r.leftovers()) == 0 })
}

// TestFrozenVMsAreAdopted: an agent that died while VMs were frozen must not
// leave them so, nor may the next one wake them into a full disk.
func TestFrozenVMsAreAdopted(t *testing.T) {
	for name, free := range map[string]int64{"space again": plenty, "still full": 1} {
		t.Run(name, func(t *testing.T) {
			r := spaceRig(t)
			id := r.mustCreate()
			r.free.Store(1)
			r.frozen(id, sandbox.FreezeNoSpace)
			r.agent.Abandon()
			r.networks.crash()
			r.free.Store(free)
			r.open()
			if free == 1 {
				if s := r.status(id); s.Frozen != sandbox.FreezeNoSpace {
					t.Errorf("adopted on a full disk: %+v", s)
				}
				r.free.Store(plenty)
			}
			r.frozen(id, "")
			if err := r.answers(id); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestFreezeThatFails: it is tried again, and callers are not locked out of a
// sandbox that runs.
func TestFreezeThatFails(t *testing.T) {
	r := spaceRig(t)
	id := r.mustCreate()
	r.vms.failFreeze.Store(true)
	r.free.Store(1)
	testkit.Eventually(t, 5*time.Second, "a freeze was tried", func() bool { return r.vms.freezes.Load() > 0 })
	testkit.Eventually(t, 5*time.Second, "it answers", func() bool { return r.answers(id) == nil })
	r.vms.failFreeze.Store(false)
	r.frozen(id, sandbox.FreezeNoSpace)
}
