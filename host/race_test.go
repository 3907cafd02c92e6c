package host_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestNoRemovalMakesADeadlineLate: one that hangs for minutes does not either.
func TestNoRemovalMakesADeadlineLate(t *testing.T) {
	r := newRig(t)
	r.open()
	hung, other := r.mustCreate(), r.mustCreate()
	act, reached, goOn := wait(t)
	defer fault.Set("host/destroy/vm", act)()
	disarm := fault.Set("host/destroy/journal", fault.Fail) // and the house-keeping with it, until it is disarmed
	defer disarm()
	if _, err := r.agent.Destroy(t.Context(), string(hung), ""); !errors.Is(err, fault.ErrInjected) {
		t.Fatal(err)
	}
	disarm()
	<-reached // the house-keeping tries again, and hangs
	if err := r.agent.SetDeadline(string(other), time.Now().Add(1500*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, 10*time.Second, "ended by its deadline", func() bool { return r.status(other).State == "ended" })
	if s := r.status(hung); s.State == "ended" {
		t.Error("the removal that hangs has ended")
	}
	goOn <- nil
	testkit.Eventually(t, 10*time.Second, "ended", func() bool { return r.status(hung).State == "ended" })
}

// TestDeadlineMovedInTime: once the host has said that it moved a deadline, the
// old one ends nothing, though it passed while the new one was written.
func TestDeadlineMovedInTime(t *testing.T) {
	var later atomic.Int64 // the deadline passes when the test says so, not before
	r := newRig(t)
	r.agentCfg = func(c *host.Config) {
		c.Now = func() time.Time { return time.Now().Add(time.Duration(later.Load())) }
	}
	r.open()
	id, other := r.mustCreate(), r.mustCreate() // for an hour
	act, reached, goOn := wait(t)
	defer fault.Set("osfs/set-deadline/write", act)()
	moved := make(chan error)
	go func() { moved <- r.agent.SetDeadline(string(id), time.Now().Add(3*time.Hour)) }()
	<-reached
	later.Store(int64(2 * time.Hour))
	testkit.Eventually(t, 10*time.Second, "ended by its deadline", func() bool { return r.status(other).State == "ended" })
	const ticks = 600 * time.Millisecond // of the house-keeping, which has seen the deadline pass, two more
	time.Sleep(ticks)
	goOn <- nil
	if err := <-moved; err != nil {
		t.Fatal(err)
	}
	if _, err := r.agent.Ping(t.Context(), string(id)); err != nil {
		t.Error(err)
	}
	if s := r.status(id); s.State != "running" {
		t.Errorf("status: %+v", s)
	}
}

// TestDeadlineOfOneThatIsBeingChanged waits for whoever changes it, but not forever.
func TestDeadlineOfOneThatIsBeingChanged(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	act, reached, goOn := wait(t)
	defer fault.Set("osfs/set-deadline/write", act)()
	move := func(to time.Time) chan error {
		moved := make(chan error)
		go func() { moved <- r.agent.SetDeadline(string(id), to) }()
		return moved
	}
	first := move(time.Now().Add(time.Hour))
	<-reached
	if err := <-move(time.Now().Add(time.Hour)); !sandbox.Is(err, sandbox.KindBusy) {
		t.Errorf("while another change hangs: %v", err)
	}
	last := time.Now().Add(2 * time.Hour)
	second := move(last)
	goOn <- nil
	if err := <-first; err != nil {
		t.Error(err)
	}
	if err := <-second; err != nil || !r.status(id).Deadline.Equal(last) {
		t.Errorf("after it: %v, and the deadline is %v, want %v", err, r.status(id).Deadline, last)
	}
}

// TestDeadlineOfOneThatEnds cannot be moved: nobody is told that it lives on.
func TestDeadlineOfOneThatEnds(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	defer fault.Set("host/destroy/journal", fault.Fail)()
	if _, err := r.agent.Destroy(t.Context(), string(id), ""); !errors.Is(err, fault.ErrInjected) {
		t.Fatal(err)
	}
	testkit.Eventually(t, 5*time.Second, "refused for its end", func() bool {
		err := r.agent.SetDeadline(string(id), time.Now().Add(time.Hour))
		if err == nil {
			t.Fatal("the deadline of a sandbox that ends was moved")
		}
		return sandbox.Is(err, sandbox.KindConflict) // else somebody is at it
	})
}

// TestDestroyBesideClose: one that comes to its turn after the agent has given
// up its handles changes nothing. The next agent has the sandbox whole.
func TestDestroyBesideClose(t *testing.T) {
	r := newRig(t)
	agent := r.open()
	id := r.mustCreate()
	act, reached, goOn := wait(t)
	defer fault.Set("host/destroy/journal", act)()
	ended := make(chan error, 2)
	destroy := func() {
		_, err := agent.Destroy(context.Background(), string(id), "")
		ended <- err
	}
	go destroy()
	<-reached
	go destroy() // waits for the first
	closed := make(chan error)
	go func() { closed <- agent.Close() }()
	testkit.Eventually(t, 5*time.Second, "closing", agent.Closed)
	goOn <- fault.ErrInjected
	for range 2 {
		if err := <-ended; !errors.Is(err, fault.ErrInjected) && !sandbox.Is(err, sandbox.KindTransient) {
			t.Errorf("destroy: %v", err)
		}
	}
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	r.networks.crash()
	r.open()
	if _, err := r.agent.Ping(t.Context(), string(id)); err != nil {
		t.Errorf("the next agent: %v", err)
	}
}

// TestNothingGoesBeforeItsVM: while a VM cannot be killed it keeps its network,
// its disk and its user ID.
func TestNothingGoesBeforeItsVM(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	disarm := fault.Set("host/destroy/vm", fault.Fail)
	defer disarm()
	if _, err := r.agent.Destroy(t.Context(), string(id), ""); !errors.Is(err, fault.ErrInjected) {
		t.Fatal(err)
	}
	if n := len(r.networks.inUse()); n != 1 {
		t.Errorf("%d networks are left beside the VM", n)
	}
	if _, err := os.Stat(filepath.Join(r.dir, "host/sandboxes", string(id), "disk")); err != nil {
		t.Error(err)
	}
	disarm()
	testkit.Eventually(t, 5*time.Second, "ended", func() bool { return r.status(id).State == "ended" })
	if left := r.leftovers(); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
}

// TestDestroyOfOneThatIsNotAdopted: its VM is gone when destroy returns, also
// while another one holds back the sweep.
func TestDestroyOfOneThatIsNotAdopted(t *testing.T) {
	r := newRig(t)
	r.open()
	id, other := r.mustCreate(), r.mustCreate()
	r.kill()
	disarm := fault.Set("vmmfake/adopt", fault.Fail)
	defer disarm()
	r.open()
	status, err := r.agent.Destroy(t.Context(), string(id), "")
	if err != nil || status.State != "ended" {
		t.Fatalf("destroy: %+v, %v", status, err)
	}
	if left := r.vms.Running(); len(left) != 1 || left[0] != other {
		t.Errorf("running: %v, want only %s", left, other)
	}
	disarm()
	testkit.Eventually(t, 5*time.Second, "the other one adopted", func() bool {
		_, err := r.agent.Ping(t.Context(), string(other))
		return err == nil
	})
}

// TestTakeOverGoesOn: a network can be adopted once; a take-over that failed
// after that is repeated all the same, and so is an end.
func TestTakeOverGoesOn(t *testing.T) {
	r := newRig(t)
	r.open()
	id, other := r.mustCreate(), r.mustCreate()
	r.kill()
	r.networks.failOpen(errors.New("netlink: no buffer space available"))
	r.open()
	if _, err := r.agent.Ping(t.Context(), string(id)); !sandbox.Is(err, sandbox.KindTransient) {
		t.Errorf("ping: %v, want transient", err)
	}
	if _, err := r.agent.Destroy(t.Context(), string(other), ""); err != nil {
		t.Fatal(err)
	}
	if n := len(r.networks.inUse()); n != 1 {
		t.Errorf("%d networks are left", n)
	}
	r.networks.failOpen(nil)
	testkit.Eventually(t, 5*time.Second, "adopted at last", func() bool {
		_, err := r.agent.Ping(t.Context(), string(id))
		return err == nil
	})
}

// TestSweepIsRepeated: what cannot be swept does not keep the agent from looking
// after what runs.
func TestSweepIsRepeated(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	r.kill()
	if _, err := r.networks.Acquire(t.Context()); err != nil { // by a create that died
		t.Fatal(err)
	}
	r.networks.crash()
	r.networks.failSweep(errors.New("device or resource busy"))
	r.open()
	if _, err := r.agent.Ping(t.Context(), string(id)); err != nil {
		t.Error(err)
	}
	if _, err := r.agent.DestroyAll(t.Context(), sandbox.CauseShutdown); err == nil {
		t.Error("all is said to be gone, and something is left")
	}
	r.networks.failSweep(nil)
	testkit.Eventually(t, 5*time.Second, "swept", func() bool { return len(r.leftovers()) == 0 })
}

// TestConsolesAreBounded: however many sandboxes come and go in a day.
func TestConsolesAreBounded(t *testing.T) {
	const most, more = 1000, 7
	r := newRig(t)
	dir := filepath.Join(r.dir, "host/consoles")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := func(i int) string { return filepath.Join(dir, fmt.Sprintf("%024d.log", i)) }
	for i := range most + more {
		at := time.Now().Add(-time.Duration(i) * time.Second)
		if err := errors.Join(os.WriteFile(path(i), nil, 0o600), os.Chtimes(path(i), at, at)); err != nil {
			t.Fatal(err)
		}
	}
	r.open()
	testkit.Eventually(t, 10*time.Second, "the oldest removed", func() bool {
		_, err := os.Stat(path(most))
		left, listErr := os.ReadDir(dir)
		return os.IsNotExist(err) && listErr == nil && len(left) == most
	})
}
