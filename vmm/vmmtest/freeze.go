package vmmtest

import (
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// stillFor is how long a frozen guest is watched: a running one prints a hundred
// lines in it.
const stillFor = 300 * time.Millisecond

// printed is how much the guest has printed so far.
func printed(t *testing.T, m vmm.Machine) int64 {
	t.Helper()
	_, next, err := m.Console(1<<62, 0)
	if err != nil {
		t.Fatal(err)
	}
	return next
}

func standsStill(t *testing.T, m vmm.Machine) {
	t.Helper()
	before := printed(t, m)
	time.Sleep(stillFor) // that nothing happens has no condition to wait for
	if after := printed(t, m); after != before {
		t.Errorf("a frozen guest printed %d bytes", after-before)
	}
}

func runsOn(t *testing.T, h Harness, m vmm.Machine) {
	t.Helper()
	before := printed(t, m)
	testkit.Eventually(t, h.BootLimit, "running on", func() bool { return printed(t, m) > before })
}

func freeze(t *testing.T, h Harness) {
	m := start(t, h, h.Driver(t), Count)
	shows(t, h, m, "line ")
	for range 2 {
		for range 2 {
			if err := m.Freeze(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		standsStill(t, m)
		for range 2 {
			if err := m.Thaw(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		runsOn(t, h, m)
	}
}

func adoptedFrozen(t *testing.T, h Harness) {
	m := start(t, h, h.Driver(t), Count)
	shows(t, h, m, "line ")
	if err := m.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	m = adoptAgain(t, h, release(t, h, m))
	standsStill(t, m)
	if err := m.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	runsOn(t, h, m)
}

func frozenEnds(t *testing.T, h Harness) {
	for _, how := range []struct {
		end  func(m vmm.Machine)
		want sandbox.Cause
	}{
		{func(m vmm.Machine) { _ = m.Kill(t.Context()) }, sandbox.CauseUser}, // its end is what is looked at
		{func(m vmm.Machine) { h.KillOutside(t, m) }, sandbox.CauseVMMCrash},
	} {
		m := start(t, h, h.Driver(t), Hold)
		if err := m.Freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		how.end(m)
		wantCause(t, ended(t, m, noticed), how.want)
		if err := m.Freeze(t.Context()); err == nil {
			t.Error("a VM that is gone was frozen")
		}
	}
}
