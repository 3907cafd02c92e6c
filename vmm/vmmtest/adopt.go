package vmmtest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// release drops the handle and checks that the VM runs on.
func release(t *testing.T, h Harness, m vmm.Machine) vmm.Record {
	t.Helper()
	for range 2 {
		if err := m.Release(); err != nil {
			t.Fatal(err)
		}
	}
	if !h.Alive(t, m.Record()) {
		t.Fatal("Release ended the VM")
	}
	return m.Record()
}

func adoptAgain(t *testing.T, h Harness, r vmm.Record) vmm.Machine {
	t.Helper()
	m, err := h.Driver(t).Adopt(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	cleanUp(t, m)
	if m.Record() != r {
		t.Errorf("its record is %+v, was %+v", m.Record(), r)
	}
	return m
}

func adopt(t *testing.T, h Harness) {
	m := start(t, h, h.Driver(t), Hold)
	booted(t, h, m)
	before := console(t, m)
	for range 2 {
		m = adoptAgain(t, h, release(t, h, m))
	}
	if !strings.HasPrefix(console(t, m), before) {
		t.Error("the console did not stay")
	}
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantCause(t, m.Exit(), sandbox.CauseUser)
	if h.Alive(t, m.Record()) {
		t.Error("its process is there after Kill")
	}
}

func adoptedPowerOff(t *testing.T, h Harness) {
	r := release(t, h, start(t, h, h.Driver(t), PowerOff)) // the guest waits for seconds before it does it
	exit := ended(t, adoptAgain(t, h, r), h.BootLimit)
	wantCause(t, exit, sandbox.CauseGuestExit)
}

func adoptedKilled(t *testing.T, h Harness) {
	m := adoptAgain(t, h, release(t, h, start(t, h, h.Driver(t), Hold)))
	h.KillOutside(t, m)
	wantCause(t, ended(t, m, noticed), sandbox.CauseVMMCrash)
}

func adoptDead(t *testing.T, h Harness) {
	m := start(t, h, h.Driver(t), Hold)
	r := release(t, h, m)
	h.KillOutside(t, m)
	testkit.Eventually(t, noticed, "gone", func() bool {
		_, err := h.Driver(t).Adopt(t.Context(), r)
		return sandbox.Is(err, sandbox.KindNotFound)
	})
	if h.Alive(t, r) {
		t.Error("its process is still there")
	}
}

// adoptStranger: a PID that was reused must never be taken, let alone killed.
func adoptStranger(t *testing.T, h Harness) {
	m := start(t, h, h.Driver(t), Hold)
	booted(t, h, m)
	for what, change := range map[string]func(r *vmm.Record){
		"start time": func(r *vmm.Record) { r.StartTime++ },
		"boot ID":    func(r *vmm.Record) { r.BootID = "00000000-0000-0000-0000-000000000000" },
		"PID":        func(r *vmm.Record) { r.PID = os.Getpid() }, // with a start time that is not ours
	} {
		r := m.Record()
		change(&r)
		if got, err := h.Driver(t).Adopt(t.Context(), r); !sandbox.Is(err, sandbox.KindNotFound) {
			t.Errorf("another %s: %v, %v", what, got, err)
		}
	}
	select {
	case <-m.Done():
		t.Fatalf("the VM died of it: %+v", m.Exit())
	default:
	}
	if !h.Alive(t, m.Record()) {
		t.Error("the VM died of it")
	}
}

func sweep(t *testing.T, h Harness) {
	d := h.Driver(t)
	held, lost := start(t, h, d, Hold), start(t, h, d, Hold)
	r := release(t, h, lost)
	if err := d.Sweep(t.Context(), r.Dir+"-elsewhere"); err != nil || !h.Alive(t, r) {
		t.Fatalf("Sweep of another directory: %v, alive %v", err, h.Alive(t, r))
	}
	for _, root := range []string{filepath.Dir(r.Dir), held.Record().Dir} {
		if err := d.Sweep(t.Context(), root); err != nil {
			t.Fatal(err)
		}
	}
	if h.Alive(t, r) {
		t.Error("the VM that nobody holds is there")
	}
	if !h.Alive(t, held.Record()) {
		t.Error("a VM that somebody holds is gone")
	}
}
