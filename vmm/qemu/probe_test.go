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
	"github.com/dormouse-sandbox/dormouse/vmm/vmmtest"
)

// TestProbeTellsTheTruthAboutThisMachine: whatever the probe says, a guest must
// boot with it; and where /dev/kvm is a false one it says so in time.
func TestProbeTellsTheTruthAboutThisMachine(t *testing.T) {
	cache := filepath.Join(t.TempDir(), "kvm.json")
	config := qemu.ProbeConfig{Kernel: kernelImage(t), CacheFile: cache}
	start := time.Now()
	caps, err := qemu.Probe(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v after %v", caps, time.Since(start))
	if took := time.Since(start); caps.Accelerator == qemu.TCG && took > 25*time.Second { // its silence, and the time to clear up
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
	boot(t, d, spec(t, "hold", nil), vmmtest.Marker)
	again, err := qemu.Probe(t.Context(), config)
	if err != nil || again != caps {
		t.Errorf("asked again: %+v, %v", again, err)
	}
}

// TestFalseKVMIsRecognized: where the probe turns down a /dev/kvm that opens and
// answers, a guest really does not get anywhere with it.
func TestFalseKVMIsRecognized(t *testing.T) {
	opens := kernel.KVM()
	testkit.Require(t, "false-kvm", opens == nil && probed(t).Accelerator == qemu.TCG,
		"no KVM on this machine opens and answers, and boots no guest")
	t.Log(probed(t).Reason)
	d, err := qemu.New(qemu.Config{Accelerator: qemu.KVM})
	if err != nil {
		t.Fatal(err)
	}
	m, err := d.Start(t.Context(), spec(t, "hold", nil))
	if err != nil {
		t.Log(err)
		return
	}
	defer func() { _ = m.Release() }()         // it is killed
	defer func() { _ = m.Kill(t.Context()) }() // or has ended by itself
	select {
	case <-m.Done():
		t.Log(m.Exit().Detail)
	case <-time.After(20 * time.Second):
	}
	if console, _, err := m.Console(0, 1<<20); err != nil || strings.Contains(string(console), vmmtest.Marker) {
		t.Errorf("the probe turned down a KVM under which a guest boots (%v):\n%s", err, console)
	}
}

// TestKVMWorks is for machines that are known to have it: the other tests here
// take whatever the probe finds.
func TestKVMWorks(t *testing.T) {
	caps := probed(t)
	testkit.Require(t, "kvm", caps.Accelerator == qemu.KVM, caps.Reason)
	t.Log(caps.Reason)
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
		caps, err := qemu.Probe(t.Context(), qemu.ProbeConfig{Kernel: image, CacheFile: cache, Silence: 2 * time.Second})
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
