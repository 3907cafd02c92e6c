package chaos_test

import (
	"context"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// signal sends a signal to the only VM of a server.
func signal(t testing.TB, s *rig.Server, sig syscall.Signal) {
	t.Helper()
	vms := s.VMs()
	if len(vms) != 1 {
		t.Fatalf("VMs are %v, want one", vms)
	}
	if err := syscall.Kill(vms[0], sig); err != nil {
		t.Fatal(err)
	}
}

// TestKillVM kills the VM under a command that runs: the command's caller and
// whoever asks later hear why, and nothing is left.
func TestKillVM(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	id := create(t, s)
	stream, err := s.Client.ExecStream(t.Context(), id, api.Exec{Shell: "sleep 1000"}, client.StreamOptions{})
	if err != nil {
		t.Fatal(err)
	}
	signal(t, s, syscall.SIGKILL)
	if exit, err := stream.Wait(); err == nil || !strings.Contains(err.Error(), "vmm_crash") {
		t.Errorf("the stream ended with %+v, %v; want an error that names vmm_crash", exit, err)
	}
	wantEnd(t, ended(t, s, id), "failed", "vmm_crash")
	if _, err := shell(t.Context(), s, id, "true"); !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), "vmm_crash") {
		t.Errorf("an exec afterwards: %v", err)
	}
	onlyThese(t, s)
}

// TestKillVMWhileTheServerIsDown has the same end.
func TestKillVMWhileTheServerIsDown(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	id := create(t, s)
	s.Kill()
	signal(t, s, syscall.SIGKILL)
	s.Up()
	wantEnd(t, ended(t, s, id), "failed", "vmm_crash")
	onlyThese(t, s)
}

// TestStoppedVM holds a VM still. Calls into it end in time, a server that is
// started meanwhile keeps it, and it goes on as if nothing had been.
func TestStoppedVM(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	w := leave(t, s, create(t, s))
	signal(t, s, syscall.SIGSTOP)

	ctx, cancel := context.WithTimeout(t.Context(), settleLimit)
	defer cancel()
	began := time.Now()
	got, err := s.Client.Exec(ctx, w.id, api.Exec{Command: []string{"true"}, TimeoutSeconds: 1})
	switch {
	case ctx.Err() != nil:
		t.Errorf("an exec with a timeout of 1s hangs for %v", time.Since(began))
	case err == nil && !got.TimedOut:
		t.Errorf("an exec in a VM that stands still: %+v", got)
	}
	t.Logf("an exec with a timeout of 1s ends after %v: %+v, %v", time.Since(began).Round(time.Millisecond), got, err)
	signal(t, s, syscall.SIGCONT)
	w.check(t, s)

	s.Kill()
	signal(t, s, syscall.SIGSTOP)
	s.Up()
	if sb := get(t, s, w.id); sb.State != "running" && sb.State != "unreachable" {
		t.Errorf("a VM that stands still is %s (%s) after a start", sb.State, sb.Cause)
	}
	signal(t, s, syscall.SIGCONT)
	testkit.Eventually(t, time.Minute, "taken over after all", func() bool {
		_, err := shell(t.Context(), s, w.id, "true")
		return err == nil
	})
	w.check(t, s)
	onlyThese(t, s, w.id)

	signal(t, s, syscall.SIGSTOP)
	began = time.Now()
	if sb, err := remove(t, s, w.id); err != nil || sb.State != "gone" {
		t.Errorf("destroying a VM that stands still: %s, %v", sb.State, err)
	}
	t.Logf("destroying it takes %v", time.Since(began).Round(time.Millisecond))
	onlyThese(t, s)
}
