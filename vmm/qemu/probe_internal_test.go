package qemu

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// standIn is a QEMU whose "kvm" is software emulation, so that both outcomes of
// a probe can be had on any machine. extra are arguments, words kernel parameters.
func standIn(t *testing.T, extra, words string) string {
	t.Helper()
	testkit.Tool(t, "qemu-system-x86_64")
	real, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf(`#!/bin/bash
if [ "$1" = --version ]; then exec %[1]s --version; fi
args=()
for a in "$@"; do
  case "$a" in
    kvm) a=tcg,thread=multi ;;
    host) a=max ;;
    console=*) a="$a %[3]s" ;;
  esac
  args+=("$a")
done
exec %[1]s "${args[@]}" %[2]s
`, real, extra, words)
	path := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func tryWith(t *testing.T, binary string, limit time.Duration) string {
	t.Helper()
	d, err := New(Config{Binary: binary, Accelerator: KVM, StartLimit: limit})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "probe-")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }() // a temporary file may stay
	fds := testkit.OpenFDs(t)
	trouble, err := d.tryBoot(t.Context(), ProbeConfig{Kernel: testkit.Asset(t, "vmlinuz"), Deadline: limit}, dir)
	if err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, 3*time.Second, "as many descriptors as before", func() bool { return testkit.OpenFDs(t) <= fds })
	if err := d.Sweep(t.Context(), dir); err != nil {
		t.Error(err)
	}
	return trouble
}

func TestAProbeThatReachesItsFirstProcessSucceeds(t *testing.T) {
	khz, err := kernel.TSCkHz()
	if err != nil {
		t.Fatal(err)
	}
	if trouble := tryWith(t, standIn(t, "", fmt.Sprintf("tsc_early_khz=%d", khz)), time.Minute); trouble != "" {
		t.Errorf("trouble: %s", trouble)
	}
}

// TestAProbeThatHangsIsKilled: -S builds the VM and never runs it, which is how
// a false KVM looks from outside.
func TestAProbeThatHangsIsKilled(t *testing.T) {
	start := time.Now()
	trouble := tryWith(t, standIn(t, "-S", ""), 1500*time.Millisecond)
	if trouble != "no first process within 1.5s" {
		t.Errorf("trouble: %q", trouble)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestAProbeWhoseQEMUDiesSaysWhy(t *testing.T) {
	trouble := tryWith(t, standIn(t, "-no-such-option", ""), 5*time.Second)
	if !strings.Contains(trouble, "no-such-option") || strings.Contains(trouble, "\n") {
		t.Errorf("trouble: %q", trouble)
	}
}
