package reap_test

import (
	"context"
	"os"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/guest/reap"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// TestExitCodesAreNotStolen makes this process adopt orphans, as PID 1 does, and
// starts a thousand short processes that each leave one.
func TestExitCodesAreNotStolen(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	var r reap.Reaper
	ctx, cancel := context.WithCancel(context.Background())
	swept := make(chan struct{})
	go func() { r.Run(ctx); close(swept) }()

	const workers, each = 8, 125
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				code := (w*each + i) % 200
				if got := runWithOrphan(t, &r, code); got != code {
					t.Errorf("exit code %d, want %d", got, code)
				}
			}
		})
	}
	wg.Wait()
	// The strangers are reaped too: in the end there is no child at all.
	testkit.Eventually(t, 20*time.Second, "without children", func() bool {
		var info unix.Siginfo
		return unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOWAIT|unix.WNOHANG, nil) == unix.ECHILD
	})
	cancel()
	<-swept
}

func runWithOrphan(t *testing.T, r *reap.Reaper, code int) int {
	script := "(exit 99) & : ; exit " + strconv.Itoa(code)
	c, err := r.Start("/bin/sh", []string{"sh", "-c", script}, &os.ProcAttr{})
	if err != nil {
		t.Error(err)
		return -2
	}
	state, err := c.Wait()
	if err != nil {
		t.Error(err)
		return -3
	}
	return state.ExitCode()
}

func TestAStartThatFailsLeavesNothing(t *testing.T) {
	var r reap.Reaper
	before := testkit.OpenFDs(t)
	for range 20 {
		if _, err := r.Start("/nonexistent", []string{"x"}, &os.ProcAttr{}); err == nil {
			t.Fatal("started")
		}
	}
	if after := testkit.OpenFDs(t); after > before {
		t.Errorf("%d descriptors, before %d", after, before)
	}
}

func TestSignalGroupAfterTheEnd(t *testing.T) {
	var r reap.Reaper
	c, err := r.Start("/bin/sh", []string{"sh", "-c", "exit 0"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := c.SignalGroup(syscall.SIGKILL); err != os.ErrProcessDone {
		t.Errorf("got %v", err)
	}
}
