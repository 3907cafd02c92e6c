package qemu

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/vmm"
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

func tryWith(t *testing.T, binary string, silence, limit time.Duration) string {
	t.Helper()
	d, err := New(Config{Binary: binary, Accelerator: KVM, StartLimit: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "probe-")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }() // a temporary file may stay
	fds := testkit.OpenFDs(t)
	trouble, err := d.tryBoot(t.Context(), ProbeConfig{Kernel: testkit.Asset(t, "vmlinuz"), Silence: silence, Deadline: limit}, dir)
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
	if testkit.Accelerator() != "tcg" {
		testkit.Long(t, "what stands in for KVM is emulated, in a lab that is")
	}
	khz, err := kernel.TSCkHz()
	if err != nil {
		t.Fatal(err)
	}
	if trouble := tryWith(t, standIn(t, "", fmt.Sprintf("tsc_early_khz=%d", khz)), testkit.Patience(time.Minute), testkit.Patience(time.Minute)); trouble != "" {
		t.Errorf("trouble: %s", trouble)
	}
}

// TestAProbeThatHangsIsKilled: -S builds the VM and never runs it, which is how
// a false KVM looks from outside.
func TestAProbeThatHangsIsKilled(t *testing.T) {
	for _, tt := range []struct {
		silence, limit time.Duration
		want           string
	}{
		{1500 * time.Millisecond, time.Minute, "it hangs: nothing on its console for 1.5s, after 0 bytes"},
		{time.Minute, 6 * time.Second, "no first process within 6s"}, // in which QEMU has to start, too
	} {
		start := time.Now()
		if trouble := tryWith(t, standIn(t, "-S", ""), tt.silence, tt.limit); trouble != tt.want {
			t.Errorf("trouble: %q, want %q", trouble, tt.want)
		}
		if took := time.Since(start); took > 30*time.Second {
			t.Errorf("it took %v", took)
		}
	}
}

// talker is a VM whose console gets a word more each time it is looked at, until
// the words are over.
type talker struct {
	vmm.Machine
	words   []string
	console string
}

func (m *talker) Done() <-chan struct{} { return nil }

func (m *talker) Console(int64, int) ([]byte, int64, error) {
	if len(m.words) > 0 {
		m.console, m.words = m.console+m.words[0], m.words[1:]
	}
	return []byte(m.console), 0, nil
}

// TestAProbeThatGetsOnIsWaitedFor: the silence counts from the last word, so that
// a slow boot that takes a multiple of it succeeds; one that stops does not.
func TestAProbeThatGetsOnIsWaitedFor(t *testing.T) {
	const silence = 500 * time.Millisecond
	config := ProbeConfig{Silence: silence, Deadline: time.Minute}
	boot := slices.Repeat([]string{"."}, 150) // looked at every 10 ms
	start := time.Now()
	if trouble := waitForProbe(t.Context(), &talker{words: append(boot, probeMarker)}, config); trouble != "" {
		t.Errorf("after %v: %s", time.Since(start), trouble)
	}
	if took := time.Since(start); took < 2*silence {
		t.Errorf("it took %v, which shows nothing", took)
	}
	if trouble := waitForProbe(t.Context(), &talker{words: boot}, config); trouble != "it hangs: nothing on its console for 500ms, after 150 bytes" {
		t.Errorf("trouble: %q", trouble)
	}
}

func TestAProbeWhoseQEMUDiesSaysWhy(t *testing.T) {
	trouble := tryWith(t, standIn(t, "-no-such-option", ""), time.Minute, time.Minute)
	if !strings.Contains(trouble, "no-such-option") || strings.Contains(trouble, "\n") {
		t.Errorf("trouble: %q", trouble)
	}
}
