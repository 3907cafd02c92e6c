package host_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestCreatesAreRestores: the first of a shape boots, and those after it go on
// from it; a warm snapshot that does not work is given up.
func TestCreatesAreRestores(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	first, second := r.mustCreate(), r.mustCreate()
	if r.inside(first).Restored || !r.inside(second).Restored {
		t.Error("the first boots, the second is restored")
	}
	if got := read(r.inside(second), 0, 34); got != "booted as "+string(first) {
		t.Errorf("the second one's memory begins with %q", got)
	}
	if got := read(r.inside(second), 4096+64, 9); got != "rehearsed" {
		t.Errorf("in the second one's memory is %q, want that the first has rehearsed", got)
	}
	r.restart()
	if third := r.mustCreate(); !r.inside(third).Restored {
		t.Error("after a restart it boots again")
	}
	refs, err := r.store.Refs()
	if err != nil || len(refs) != 1 {
		t.Fatalf("references: %+v, %v", refs, err)
	}
	defer fault.Set("host/restore/vm", fault.Nth(1, fault.Fail))()
	if fourth := r.mustCreate(); r.inside(fourth).Restored {
		t.Error("it was restored, against all odds")
	}
	if left := slices.DeleteFunc(r.leftovers(), func(s string) bool { return !strings.HasPrefix(s, "vm ") }); len(left) != 4 {
		t.Errorf("there are %v", left)
	}
	for generation := range 2 {
		if saved := r.mustPause(second); saved.Memory.Written > 4 {
			t.Errorf("pause %d of one that did nothing wrote %+v", generation, saved.Memory)
		}
		r.mustResume(second)
	}
}

// TestARehearsalThatFails costs the warm snapshot, and not the sandbox.
func TestARehearsalThatFails(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	r.forgets.Store(true)
	first := r.mustCreate()
	if r.stands(first) {
		t.Error("the processes of the first stand still")
	}
	if refs, err := r.store.Refs(); err != nil || len(refs) > 0 {
		t.Errorf("references: %+v, %v", refs, err)
	}
	r.forgets.Store(false)
	r.mustCreate() // and rehearses
	if third := r.mustCreate(); !r.inside(third).Restored {
		t.Error("after a rehearsal that went well the next one boots again")
	}
}

// TestProcessesAreHeldInAWarmSnapshot, so that no copy has to do it first, and run on
// in the machine that it is made of.
func TestProcessesAreHeldInAWarmSnapshot(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	var held atomic.Bool
	defer fault.Set("host/warm/freeze", func(context.Context, string) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, still := range r.standing {
			held.Store(held.Load() || still)
		}
		return nil
	})()
	first := r.mustCreate()
	if !held.Load() {
		t.Error("nothing stands still in what is kept")
	}
	if r.stands(first) {
		t.Error("the processes of the first stand still")
	}
	if second := r.mustCreate(); !r.inside(second).Restored || r.stands(second) {
		t.Error("the second one was not restored, or stands still")
	}
}

// TestAWarmSnapshotOfRunningProcesses is kept where they cannot be held.
func TestAWarmSnapshotOfRunningProcesses(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	defer fault.Set("host/warm/hold", fault.Fail)()
	first := r.mustCreate()
	if r.stands(first) {
		t.Error("the processes of the first stand still")
	}
	if second := r.mustCreate(); !r.inside(second).Restored || r.stands(second) {
		t.Error("the second one was not restored, or stands still")
	}
}

// TestOneOfACrowdBoots: those that wait for their turn behind it go on from what it
// has kept.
func TestOneOfACrowdBoots(t *testing.T) {
	r := newSnapshotRig(t)
	with := r.agentCfg
	r.agentCfg = func(c *host.Config) { with(c); c.MaxBoots = 1 }
	r.open()
	var booted atomic.Int64
	var wg sync.WaitGroup
	for range 6 {
		req := r.request()
		wg.Go(func() {
			s, err := r.agent.Create(t.Context(), req)
			if err != nil {
				t.Error(err)
			}
			if s.Start == sandbox.StartBoot {
				booted.Add(1)
			}
		})
	}
	wg.Wait()
	if n := booted.Load(); n != 1 {
		t.Errorf("%d of them booted, want the first", n)
	}
}

// TestWarmSnapshotsAreFew: each shape makes one, and the oldest go.
func TestWarmSnapshotsAreFew(t *testing.T) {
	r := newSnapshotRig(t)
	with := r.agentCfg
	r.agentCfg = func(c *host.Config) { with(c); c.MaxWarm = 2 }
	r.open()
	for i := range 4 {
		req := r.request()
		req.Spec.MemMiB += i
		if _, err := r.agent.Create(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	if refs, err := r.store.Refs(); err != nil || len(refs) != 2 {
		t.Errorf("there are %d warm snapshots, %v", len(refs), err)
	}
}
