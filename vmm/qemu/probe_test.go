package qemu_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/vmm/qemu"
)

// TestProbeTellsTheTruthAboutThisMachine: whatever the probe says, a guest must
// boot with it; and where /dev/kvm is a false one it says so in time.
func TestProbeTellsTheTruthAboutThisMachine(t *testing.T) {
	cache := filepath.Join(t.TempDir(), "kvm.json")
	config := qemu.ProbeConfig{Kernel: kernelImage(t), CacheFile: cache, Deadline: 4 * time.Second}
	start := time.Now()
	caps, err := qemu.Probe(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v after %v", caps, time.Since(start))
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	noKVM := kernel.KVM()
	switch {
	case noKVM != nil && (caps.Accelerator != qemu.TCG || caps.Reason != noKVM.Error()):
		t.Errorf("without KVM (%v): %+v", noKVM, caps)
	case noKVM == nil && caps.Accelerator == qemu.TCG && !strings.Contains(caps.Reason, "/dev/kvm exists, but the guest kernel did not boot under it"):
		t.Errorf("the reason does not explain why KVM is not used: %+v", caps)
	}
	d, err := qemu.New(qemu.Config{Accelerator: caps.Accelerator, Reason: caps.Reason})
	if err != nil {
		t.Fatal(err)
	}
	boot(t, d, spec(t, "hold", nil), "GUEST-UP")
	again, err := qemu.Probe(t.Context(), config)
	if err != nil || again != caps {
		t.Errorf("asked again: %+v, %v", again, err)
	}
}

// TestProbeRemembersAndForgets plants an answer that no probe would give.
func TestProbeRemembersAndForgets(t *testing.T) {
	cache := filepath.Join(t.TempDir(), "kvm.json")
	testkit.Tool(t, "qemu-system-x86_64")
	image := filepath.Join(t.TempDir(), "kernel")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(image, "no kernel at all")
	probe := func() string {
		t.Helper()
		caps, err := qemu.Probe(t.Context(), qemu.ProbeConfig{Kernel: image, CacheFile: cache, Deadline: 2 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		if caps.Accelerator != qemu.TCG && !strings.Contains(caps.Reason, "planted") {
			t.Errorf("a file that is no kernel booted: %+v", caps)
		}
		return caps.Reason
	}
	first := probe()
	stored := readFile(t, cache)
	write(cache, strings.Replace(stored, `"Reason": "`, `"Reason": "planted `, 1))
	if got := probe(); got != "planted "+first {
		t.Errorf("not taken from the file: %q", got)
	}
	write(image, "another kernel that is none")
	if got := probe(); strings.Contains(got, "planted") {
		t.Errorf("taken from the file for another kernel: %q", got)
	}
	write(cache, "{")
	if got := probe(); strings.Contains(got, "planted") {
		t.Errorf("taken from a broken file: %q", got)
	}
}

func TestACancelledProbeAnswersNothing(t *testing.T) {
	image := kernelImage(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	cache := filepath.Join(t.TempDir(), "kvm.json")
	caps, err := qemu.Probe(ctx, qemu.ProbeConfig{Kernel: image, CacheFile: cache})
	if kernel.KVM() == nil && !errors.Is(err, context.Canceled) {
		t.Errorf("%+v, %v", caps, err)
	}
	if _, statErr := os.Stat(cache); err != nil && statErr == nil {
		t.Error("it was remembered")
	}
}
