package qemu_test

import (
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
	"github.com/dormouse-sandbox/dormouse/vmm/qemu"
)

// TestAdoptWhileAnotherHoldsTheVM: QEMU serves one client at a time. The second
// one gets a transient error, and the VM is none the worse for it.
func TestAdoptWhileAnotherHoldsTheVM(t *testing.T) {
	first := driver(t)
	m, err := first.Start(t.Context(), spec(t, "hold", nil))
	if err != nil {
		t.Fatal(err)
	}
	second, err := qemu.New(qemu.Config{Accelerator: qemu.TCG, StartLimit: 300 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.Adopt(t.Context(), m.Record()); !sandbox.Is(err, sandbox.KindTransient) {
		t.Errorf("while it is held: %v", err)
	}
	if !alive(t, m.Record()) {
		t.Fatal("the VM died of it")
	}
	if err := m.Release(); err != nil {
		t.Fatal(err)
	}
	again, err := first.Adopt(t.Context(), m.Record())
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	if err := again.Release(); err != nil {
		t.Error(err)
	}
}

func TestAdoptRefusesTheRecordOfAnotherDriver(t *testing.T) {
	_, err := driver(t).Adopt(t.Context(), vmm.Record{Driver: "firecracker", PID: 1})
	if !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("error %v", err)
	}
}
