package server_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestConcurrentCreatesWithOneKeyMakeOneSandbox(t *testing.T) {
	r := newRig(t)
	const n = 20
	ids := make([]string, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			s, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{}, "same")
			if err != nil {
				t.Error(err)
			}
			ids[i] = s.ID
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Errorf("two sandboxes: %s and %s", ids[0], id)
		}
	}
	if got := r.host.Count("CreateSandbox"); got != 1 {
		t.Errorf("the host was asked %d times", got)
	}
	_, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{MemMiB: 256}, "same")
	r.wantKind(err, sandbox.KindConflict)
}

func TestAClientThatGoesAwayDoesNotStopItsCreate(t *testing.T) {
	r := newRig(t)
	gate := make(chan struct{})
	r.host.SetHook(func(ctx context.Context, method, _ string) error {
		if method == "CreateSandbox" {
			select {
			case <-gate:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	ctx, cancel := context.WithCancel(r.ctx())
	failed := make(chan error, 1)
	go func() {
		_, err := r.c.CreateSandbox(ctx, api.CreateSandbox{}, "k")
		failed <- err
	}()
	testkit.Eventually(t, limit, "asked", func() bool { return r.host.Count("CreateSandbox") == 1 })
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Fatalf("the cancelled create returned %v", err)
	}
	close(gate)
	s, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{}, "k")
	if err != nil || s.State != "running" {
		t.Fatalf("the retry got %+v, %v", s, err)
	}
	if got := r.host.Running(); len(got) != 1 || got[0] != s.ID {
		t.Errorf("the host has %v, want only %s", got, s.ID)
	}
}

// Each step of a create fails once: nothing is left on the host, and the sandbox
// ends in failed with a cause.
func TestCreateFailsAt(t *testing.T) {
	for _, point := range []string{"control/create/recorded", "control/create/created", "control/create/bounded"} {
		t.Run(point, func(t *testing.T) {
			r := newRig(t)
			defer fault.Set(point, fault.Fail)()
			_, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{}, "")
			var ce *client.Error
			if !errors.As(err, &ce) || ce.SandboxID == "" {
				t.Fatalf("the error is %v, want one that names the sandbox", err)
			}
			if got := r.get(ce.SandboxID); got.State != "failed" || got.Cause != "create_failed" || got.EndedAt == nil {
				t.Errorf("after a failure at %s: %+v", point, got)
			}
			if got := r.host.Running(); len(got) != 0 {
				t.Errorf("the host still has %v", got)
			}
			testkit.Eventually(t, limit, "forgotten by the host", func() bool { return r.host.Status(ce.SandboxID) == nil })
		})
	}
}

// The process dies at a step of a create; the next one finds the rest. A fault
// that hangs until the server stops stands for the death: nothing behind the
// point runs, and what the stop would clean up is kept from doing so.
func TestCreateIsFinishedAfterARestart(t *testing.T) {
	for _, tt := range []struct {
		point string
		state string
		cause string
	}{
		{"control/create/recorded", "failed", "agent_crash"},
		{"control/create/created", "running", ""}, // the host has it: it is kept
		{"control/create/bounded", "running", ""},
	} {
		t.Run(tt.point, func(t *testing.T) {
			r := newRig(t)
			var reached atomic.Bool
			release := make(chan struct{})
			disarm := fault.Set(tt.point, func(context.Context, string) error {
				reached.Store(true)
				<-release
				return errors.New("dead")
			})
			ctx, cancel := context.WithCancel(r.ctx())
			answered := make(chan struct{})
			go func() {
				defer close(answered)
				_, _ = r.c.CreateSandbox(ctx, api.CreateSandbox{}, "k") // it never gets an answer
			}()
			// On its way there it is on record, and the host lists it before it runs.
			testkit.Eventually(t, limit, "at the point", reached.Load)
			cancel()
			<-answered

			dead := *r // its goroutine stays in the fault, and its database open
			r.start()
			l, err := r.c.List(r.ctx(), client.ListOptions{All: true})
			if err != nil || len(l.Sandboxes) != 1 {
				t.Fatalf("after the restart: %+v, %v", l, err)
			}
			if got := l.Sandboxes[0]; got.State != tt.state || got.Cause != tt.cause {
				t.Errorf("after the restart it is %s %s, want %s %s", got.State, got.Cause, tt.state, tt.cause)
			}
			s, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{}, "k")
			if (err == nil) != (tt.state == "running") {
				t.Errorf("a retry got %+v, %v", s, err)
			}
			disarm()
			close(release)
			dead.stop()
			if got := r.get(l.Sandboxes[0].ID); got.State != tt.state {
				t.Errorf("the late end of the dead create made it %s", got.State)
			}
			if want := tt.state == "running"; (len(r.host.Running()) == 1) != want {
				t.Errorf("the host has %v", r.host.Running())
			}
		})
	}
}

func TestDestroyIsFinishedAfterAFailureAt(t *testing.T) {
	for _, point := range []string{"control/destroy/marked", "control/destroy/destroyed", "control/destroy/recorded"} {
		t.Run(point, func(t *testing.T) {
			r := newRig(t)
			id := r.create()
			defer fault.Set(point, fault.Nth(1, fault.Fail))()
			if _, err := r.c.Delete(r.ctx(), id); err != nil {
				t.Fatal(err)
			}
			testkit.Eventually(t, limit, "gone", func() bool { return r.get(id).State == "gone" })
			testkit.Eventually(t, limit, "forgotten by the host", func() bool { return r.host.Status(id) == nil })
		})
	}
}

func TestDeleteDuringCreate(t *testing.T) {
	r := newRig(t)
	r.host.SetHook(func(ctx context.Context, method, _ string) error {
		if method == "CreateSandbox" {
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	})
	failed := make(chan error, 1)
	ctx := r.ctx()
	go func() {
		_, err := r.c.CreateSandbox(ctx, api.CreateSandbox{}, "")
		failed <- err
	}()
	testkit.Eventually(t, limit, "asked", func() bool { return r.host.Count("CreateSandbox") == 1 })
	l, err := r.c.List(r.ctx(), client.ListOptions{})
	if err != nil || len(l.Sandboxes) != 1 || l.Sandboxes[0].State != "creating" {
		t.Fatalf("list: %+v, %v", l, err)
	}
	id := l.Sandboxes[0].ID
	_, err = r.c.Exec(r.ctx(), id, api.Exec{Shell: "echo"})
	r.wantKind(err, sandbox.KindConflict)
	if _, err := r.c.Delete(r.ctx(), id); err != nil {
		t.Fatal(err)
	}
	err = <-failed
	r.wantKind(err, sandbox.KindConflict)
	if got := r.get(id); !sandbox.State(got.State).Ended() {
		t.Errorf("after delete it is %s", got.State)
	}
	if got := r.host.Running(); len(got) != 0 {
		t.Errorf("the host has %v", got)
	}
}

// A step fails, but another process's reconciler has found the sandbox running.
func TestAFailedStepOfWhatRunsIsNoFailure(t *testing.T) {
	r := newRig(t)
	defer fault.Set("control/create/bounded", func(ctx context.Context, _ string) error {
		rows, err := r.cfg.Store.Sandboxes(ctx, store.Filter{States: []sandbox.State{sandbox.Creating}})
		if err != nil || len(rows) != 1 {
			t.Errorf("being created: %+v, %v", rows, err)
			return err
		}
		if _, err := r.cfg.Store.Running(ctx, rows[0], time.Now().Add(time.Hour)); err != nil {
			t.Error(err)
		}
		return errors.New("too late")
	})()
	s, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{}, "")
	if err != nil || s.State != "running" || s.Deadline == nil {
		t.Fatalf("create: %+v, %v", s, err)
	}
	if got := r.host.Running(); len(got) != 1 || got[0] != s.ID {
		t.Errorf("the host has %v, want %s", got, s.ID)
	}
	if got := r.get(s.ID); got.State != "running" || got.Cause != "" {
		t.Errorf("on record: %+v", got)
	}
}

func TestCreateThatStartsNothing(t *testing.T) {
	r := newRig(t)
	yes, no := true, false
	for _, tt := range []struct {
		start *bool
		want  int
	}{{nil, 0}, {&yes, 0}, {&no, 1}} {
		if _, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{Start: tt.start}, ""); err != nil {
			t.Fatal(err)
		}
		if got := r.host.Unstarted(); got != tt.want {
			t.Errorf("%d creates left the start command alone, want %d", got, tt.want)
		}
	}
}

func TestHostCauseOfAFailedCreateIsKept(t *testing.T) {
	r := newRig(t)
	r.host.SetHook(func(_ context.Context, method, id string) error {
		if method == "CreateSandbox" {
			r.host.Crash(id, sandbox.CauseBootTimeout, "console: stuck at tsc")
			return sandbox.Errorf(sandbox.KindTimeout, "the guest never answered")
		}
		return nil
	})
	_, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{}, "")
	r.wantKind(err, sandbox.KindTimeout)
	var ce *client.Error
	if !errors.As(err, &ce) || ce.Status != 504 {
		t.Fatalf("the error is %+v", err)
	}
	if got := r.get(ce.SandboxID); got.State != "failed" || got.Cause != "boot_timeout" || got.CauseDetail != "console: stuck at tsc" {
		t.Errorf("recorded %+v", got)
	}
}
