package e2e_test

import (
	"context"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const powerOff = `
import ctypes
ctypes.CDLL(None).reboot(0x4321fedc) # LINUX_REBOOT_CMD_POWER_OFF
`

// TestGuestDies: a VM that ends by itself, or whose process is killed, is
// noticed at once; its cause is on record, and whoever waits for a command in
// it learns of it.
func TestGuestDies(t *testing.T) {
	w := shared(t)
	for _, tt := range []struct {
		name  string
		kill  func(w world, id string)
		cause sandbox.Cause
	}{
		{"its kernel panics", func(w world, id string) { w.attempt(id, api.Exec{Shell: "echo c >/proc/sysrq-trigger", User: "root"}) }, sandbox.CauseGuestExit},
		{"it powers itself off", func(w world, id string) {
			w.attempt(id, api.Exec{Command: []string{"python3", "-c", powerOff}, User: "root"})
		}, sandbox.CauseGuestExit},
		{"its VMM is killed", func(w world, id string) {
			if err := syscall.Kill(w.vmOf(id), syscall.SIGKILL); err != nil {
				w.t.Fatal(err)
			}
		}, sandbox.CauseVMMCrash},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := w.in(t)
			id := w.create(small()).ID
			vms := len(w.VMs())
			s, err := w.Client.ExecStream(within(t, time.Minute), id, api.Exec{Command: []string{"sleep", "600"}}, client.StreamOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = s.Close() }()
			start := time.Now()
			tt.kill(w, id)
			_, err = s.Wait()
			told := time.Since(start)
			if err == nil || told > 20*time.Second {
				t.Errorf("the exec under way ended after %v with %v", told, err)
			}
			end := w.await(id, 20*time.Second)
			if end.State != string(sandbox.Failed) || end.Cause != string(tt.cause) || end.CauseDetail == "" {
				t.Errorf("its end: %s, %s, %q; want failed, %s", end.State, end.Cause, end.CauseDetail, tt.cause)
			}
			_, err = w.Client.Exec(within(t, time.Minute), id, api.Exec{Shell: "true"})
			if !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), string(tt.cause)) {
				t.Errorf("exec afterwards: %v", err)
			}
			testkit.Eventually(t, 20*time.Second, "rid of the VM", func() bool { return len(w.VMs()) < vms })
			t.Logf("failed with %s (%s); the exec under way ended after %v", end.Cause, end.CauseDetail, told)
		})
	}
}

// attempt runs a command that is not expected to live to its end.
func (w world) attempt(id string, req api.Exec) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	start := time.Now()
	if r, err := w.Client.Exec(ctx, id, req); err == nil {
		w.t.Errorf("the command that ends its VM came back: %+v", r)
	} else if time.Since(start) > 25*time.Second {
		w.t.Errorf("the command that ends its VM hung for %v: %v", time.Since(start), err)
	}
}

// vmOf is the process of a sandbox's VM.
func (w world) vmOf(id string) int {
	w.t.Helper()
	for _, pid := range w.VMs() {
		cmdline, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
		if err == nil && strings.Contains(string(cmdline), id) {
			return pid
		}
	}
	w.t.Fatalf("no VM of %s", id)
	return 0
}

const hog = `
b = []
while True:
    b.append(bytearray(b'x' * (8 << 20)))
`

// TestGuestUnderPressure: a fork bomb and a memory hog hurt their own sandbox;
// its agent lives and answers.
func TestGuestUnderPressure(t *testing.T) {
	w := shared(t)
	id := w.create(small()).ID
	for _, tt := range []struct {
		name string
		exec api.Exec
	}{
		{"a memory hog", api.Exec{Command: []string{"python3", "-c", hog}, TimeoutSeconds: 60}},
		{"a memory hog of root's", api.Exec{Command: []string{"python3", "-c", hog}, TimeoutSeconds: 60, User: "root"}},
		{"a fork bomb", api.Exec{Command: []string{"bash", "-c", "bomb() { bomb | bomb & }; bomb; wait; sleep 600"}, TimeoutSeconds: 5}},
		{"a fork bomb of root's", api.Exec{Command: []string{"bash", "-c", "bomb() { bomb | bomb & }; bomb; wait; sleep 600"}, TimeoutSeconds: 5, User: "root"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := w.in(t)
			start := time.Now()
			r, err := w.Client.Exec(within(t, 2*time.Minute), id, tt.exec)
			if err != nil {
				t.Fatalf("after %v: %v", time.Since(start), err)
			}
			if r.ExitCode == 0 {
				t.Errorf("it ended well: %+v", r)
			}
			ended := time.Since(start)
			again := time.Now()
			if got := w.sh(id, "echo alive"); got != "alive" {
				t.Errorf("afterwards: %q", got)
			}
			t.Logf("it ended after %v with %q (timed out: %v); the next exec answered within %v", ended, r.Status, r.TimedOut, time.Since(again))
			testkit.Eventually(t, time.Minute, "rid of its processes", func() bool {
				return w.sh(id, "grep -alE '^(bash.-c.bomb|python3.-c.*hog)' /proc/[0-9]*/cmdline 2>/dev/null | wc -l") == "0"
			})
		})
	}
}
