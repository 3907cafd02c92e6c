package server_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/control/server"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// ids are those of the copies that run.
func ids(f api.Forked) (out []string) {
	for _, c := range f.Copies {
		if c.Sandbox != nil {
			out = append(out, c.Sandbox.ID)
		}
	}
	return out
}

func TestFork(t *testing.T) {
	r := newRig(t)
	id := r.createWith(api.CreateSandbox{
		VCPUs: 2, MemMiB: 256, TimeoutSeconds: ptr(600.0), AutoPauseSeconds: 60, AutoResume: ptr(false),
		Env: map[string]string{"A": "1", "B": "1"}, Metadata: map[string]string{"owner": "ann"},
	})
	r.write(id, "/a", "at the fork")
	f, err := r.c.Fork(r.ctx(), id, api.Fork{Count: ptr(3), Env: map[string]string{"B": "2"}}, "")
	if err != nil || len(f.Copies) != 3 || len(ids(f)) != 3 || f.Report == nil || f.Report.StoppedMillis == 0 || len(f.Phases) == 0 {
		t.Fatalf("forked: %+v, %v", f, err)
	}
	r.write(id, "/a", "afterwards")
	for i, c := range f.Copies {
		s := c.Sandbox
		if s.State != "running" || s.VCPUs != 2 || s.MemMiB != 256 || s.TimeoutSeconds != 600 || s.AutoPauseSeconds != 60 || s.AutoResume ||
			s.Metadata["owner"] != "ann" || s.ForkedFrom != id || s.StartedBy != "fork" || s.Template != "base" || s.ID == id {
			t.Errorf("copy %d: %+v", i, s)
		}
		spec := r.host.Status(s.ID).GetSpec()
		if diff := cmp.Diff(map[string]string{"A": "1", "B": "2"}, spec.GetEnv()); diff != "" {
			t.Errorf("copy %d has the environment (-want +got):\n%s", i, diff)
		}
		if spec.GetHostname() != s.ID || !spec.GetDeadline().AsTime().Equal(*s.Deadline) || time.Until(*s.Deadline) > 10*time.Minute {
			t.Errorf("copy %d is on its host as %v", i, spec)
		}
		if got := r.read(s.ID, "/a"); got != "at the fork" {
			t.Errorf("copy %d has the file %q", i, got)
		}
		r.write(s.ID, "/a", fmt.Sprint("copy ", i))
	}
	for i, copied := range ids(f) {
		if got := r.read(copied, "/a"); got != fmt.Sprint("copy ", i) {
			t.Errorf("copy %d has the file %q: copies share it", i, got)
		}
	}
	if got := r.read(id, "/a"); got != "afterwards" {
		t.Errorf("the original has the file %q", got)
	}
	other, err := r.c.Fork(r.ctx(), id, api.Fork{
		TimeoutSeconds: ptr(10.0), Metadata: map[string]string{"x": "y"}, AutoPauseSeconds: ptr(0.0), AutoResume: ptr(true),
	}, "")
	if err != nil || len(other.Copies) != 1 {
		t.Fatalf("one more: %+v, %v", other, err)
	}
	if s := other.Copies[0].Sandbox; s.TimeoutSeconds != 10 || s.AutoPauseSeconds != 0 || !s.AutoResume || len(s.Metadata) != 1 || s.Metadata["x"] != "y" {
		t.Errorf("with limits of its own: %+v", s)
	}
	if _, err := r.c.Delete(r.ctx(), id); err != nil {
		t.Fatal(err)
	}
	if got := r.get(ids(f)[0]).State; got != "running" {
		t.Errorf("without its original a copy is %s", got)
	}
}

func TestForkBounds(t *testing.T) {
	r := newRig(t)
	id := r.create()
	for body, says := range map[string]string{
		`{"count":0}`:                  "count is 0, must be from 1 to 100",
		`{"count":101}`:                "count is 101, must be from 1 to 100",
		`{"count":-1}`:                 "count is -1, must be from 1 to 100",
		`{"timeout_seconds":0}`:        "from 1 to",
		`{"auto_pause_seconds":0.5}`:   "auto_pause_seconds is 0.5, must be from 1 to",
		`{"auto_pause_seconds":1e300}`: "auto_pause_seconds is 1e+300",
		`{"env":{"A-B":"c"}}`:          "env name",
		`{"template":"x"}`:             "unknown field",
		`[]`:                           "must be an object",
	} {
		r.wantRefused("POST", "/v1/sandboxes/"+id+"/fork", body, 400, says)
	}
	if r.host.Count("ForkSandbox") > 0 {
		t.Error("one reached the host")
	}
}

func (r *rig) wantRefused(method, path, body string, status int, says string) {
	r.t.Helper()
	resp, d := r.send(method, path, body)
	if resp.StatusCode != status || !containsText(d.Message, says) {
		r.t.Errorf("%s %s %s: %d %q, want %d with %q", method, path, body, resp.StatusCode, d.Message, status, says)
	}
}

func TestCopiesFailOneByOne(t *testing.T) {
	r := newRig(t)
	id := r.create()
	n := 0
	r.host.SetHook(func(_ context.Context, method, _ string) error {
		if method == "ForkSandbox.copy" {
			if n++; n%2 == 0 {
				return sandbox.Errorf(sandbox.KindBusy, "the host is full")
			}
		}
		return nil
	})
	f, err := r.c.Fork(r.ctx(), id, api.Fork{Count: ptr(5)}, "k")
	if err != nil || len(f.Copies) != 5 || len(ids(f)) != 3 {
		t.Fatalf("forked: %+v, %v", f, err)
	}
	for i, c := range f.Copies {
		if (c.Error != nil) != (i%2 == 1) {
			t.Fatalf("copy %d: %+v", i, c)
		}
		if c.Error == nil {
			continue
		}
		if c.Error.Code != "busy" || !containsText(c.Error.Message, "the host is full") {
			t.Errorf("copy %d: %+v", i, c.Error)
		}
		if got := r.get(c.Error.SandboxID); got.State != "failed" || got.Cause != "create_failed" {
			t.Errorf("copy %d is on record as %+v", i, got)
		}
	}
	testkit.Eventually(t, limit, "the host forgot those that failed", func() bool { return len(r.host.Running()) == 4 })
	again, err := r.c.Fork(r.ctx(), id, api.Fork{Count: ptr(5)}, "k")
	if err != nil || !slices.Equal(ids(again), ids(f)) || again.Copies[1].Error == nil || again.Copies[1].Error.SandboxID != f.Copies[1].Error.SandboxID {
		t.Errorf("the same again: %+v, %v", again, err)
	}
	r.host.SetHook(func(_ context.Context, method, _ string) error {
		if method == "ForkSandbox.copy" {
			return sandbox.Errorf(sandbox.KindBusy, "the host is full")
		}
		return nil
	})
	_, err = r.c.Fork(r.ctx(), id, api.Fork{Count: ptr(2)}, "")
	r.wantKind(err, sandbox.KindBusy)
	if !containsText(err.Error(), "none of 2 copies") {
		t.Errorf("no copy: %v", err)
	}
}

func TestConcurrentForksWithOneKeyMakeOneSet(t *testing.T) {
	r := newRig(t)
	id := r.create()
	const n = 10
	got := make([]api.Forked, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			var err error
			if got[i], err = r.c.Fork(r.ctx(), id, api.Fork{Count: ptr(2)}, "same"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, f := range got {
		if !slices.Equal(ids(f), ids(got[0])) || len(ids(f)) != 2 {
			t.Errorf("two sets: %v and %v", ids(f), ids(got[0]))
		}
	}
	if asked := r.host.Count("ForkSandbox"); asked != 1 {
		t.Errorf("the host was asked %d times", asked)
	}
	_, err := r.c.Fork(r.ctx(), id, api.Fork{Count: ptr(3)}, "same")
	r.wantKind(err, sandbox.KindConflict)
	_, err = r.c.CreateSandbox(r.ctx(), api.CreateSandbox{}, "same")
	r.wantKind(err, sandbox.KindConflict)
}

// Each step of a fork fails once: no copy is left on the host, the original runs,
// and each copy is on record with its cause.
func TestForkFailsAt(t *testing.T) {
	for _, tt := range []struct {
		name, point, host string
		err               error
	}{
		{"before the host was asked", "control/fork/recorded", "", nil},
		{"after the host has made them", "control/fork/forked", "", nil},
		{"while they are bounded", "control/create/bounded", "", nil},
		{"the host refuses", "", "ForkSandbox", sandbox.Errorf(sandbox.KindNoSpace, "full")},
		{"the host cannot be reached", "", "ForkSandbox", sandbox.Errorf(sandbox.KindTransient, "no route")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			id := r.create()
			disarm := func() { r.host.SetHook(nil) }
			if tt.point != "" {
				disarm = fault.Set(tt.point, fault.Fail)
			} else {
				r.host.SetHook(func(_ context.Context, method, _ string) error {
					if method == tt.host {
						return tt.err
					}
					return nil
				})
			}
			_, err := r.c.Fork(r.ctx(), id, api.Fork{Count: ptr(3)}, "")
			disarm()
			var ce *client.Error
			if !errors.As(err, &ce) || ce.SandboxID == "" {
				t.Fatalf("the error is %v, want one that names a sandbox", err)
			}
			l, err := r.c.List(r.ctx(), client.ListOptions{All: true, States: []string{"failed"}})
			if err != nil || len(l.Sandboxes) != 3 {
				t.Errorf("on record: %+v, %v", l, err)
			}
			testkit.Eventually(t, limit, "only the original is left", func() bool { return slices.Equal(r.host.Running(), []string{id}) })
			if f, err := r.c.Fork(r.ctx(), id, api.Fork{Count: ptr(3)}, ""); err != nil || len(ids(f)) != 3 {
				t.Errorf("the next fork: %+v, %v", f, err)
			}
		})
	}
}

// TestWorkIsFinishedAfterARestart: the process dies at a step of each verb, and the
// next one finds the rest. As with creates, a fault that hangs stands for the
// death.
func TestWorkIsFinishedAfterARestart(t *testing.T) {
	type end struct{ sandbox, snapshot, copies string }
	for point, want := range map[string]end{
		"control/pause/marked":      {sandbox: "running"},
		"control/pause/paused":      {sandbox: "paused"},
		"control/resume/marked":     {sandbox: "paused"},
		"control/resume/resumed":    {sandbox: "running"},
		"control/resume/bounded":    {sandbox: "running"},
		"control/fork/recorded":     {sandbox: "running", copies: "failed"},
		"control/fork/forked":       {sandbox: "running", copies: "running"},
		"control/snapshot/recorded": {sandbox: "running"},
		"control/snapshot/made":     {sandbox: "running", snapshot: "ready"},
		"control/snapshot/deleting": {sandbox: "running"},
		"control/snapshot/deleted":  {sandbox: "running"},
	} {
		t.Run(point, func(t *testing.T) {
			r := newRig(t, func(c *server.Config) {
				c.Reconcile.SettleFor, c.ChangeLimit = 50*time.Millisecond, 5*time.Second
			})
			id := r.create()
			r.write(id, "/a", "kept")
			verb := r.prepare(point, id)
			release, reached := make(chan struct{}), make(chan struct{}, 100)
			disarm := fault.Set(point, func(context.Context, string) error {
				reached <- struct{}{}
				<-release
				return errors.New("dead")
			})
			ctx, cancel := context.WithCancel(r.ctx())
			answered := make(chan struct{})
			go func() {
				defer close(answered)
				verb(ctx) // it never gets an answer
			}()
			<-reached
			cancel()
			<-answered
			dead := *r // its goroutine stays in the fault, and its database open
			disarm()
			r.start()
			r.settled(id, want.sandbox, want.snapshot, want.copies)
			close(release)
			dead.stop()
			r.settled(id, want.sandbox, want.snapshot, want.copies)
			if got := r.read(id, "/a"); got != "kept" {
				t.Errorf("its file has %q", got)
			}
		})
	}
}

// prepare makes what a verb needs, and returns the verb that has the point.
func (r *rig) prepare(point, id string) func(context.Context) {
	c := r.c
	switch {
	case containsText(point, "/pause/"):
		return func(ctx context.Context) { _, _ = c.Pause(ctx, id) }
	case containsText(point, "/resume/"):
		r.pause(id)
		return func(ctx context.Context) { _, _ = c.Resume(ctx, id, api.Resume{}) }
	case containsText(point, "/fork/"):
		return func(ctx context.Context) { _, _ = c.Fork(ctx, id, api.Fork{Count: ptr(2)}, "k") }
	case containsText(point, "/delet"):
		r.snapshot(id, "shot")
		return func(ctx context.Context) { _, _ = c.DeleteSnapshot(ctx, "shot") }
	}
	return func(ctx context.Context) {
		_, _ = c.CreateSnapshot(ctx, api.CreateSnapshot{Name: "shot", SandboxID: id})
	}
}

// settled waits until everything is as it is wanted; empty: there is none.
func (r *rig) settled(id, state, snapshot, copies string) {
	r.t.Helper()
	testkit.Eventually(r.t, limit, "the sandbox is "+state, func() bool { return r.get(id).State == state })
	testkit.Eventually(r.t, limit, "the snapshot is "+snapshot, func() bool {
		return r.states()["shot"] == snapshot && slices.Contains(r.host.Snapshots(), "shot") == (snapshot != "")
	})
	l, err := r.c.List(r.ctx(), client.ListOptions{All: true})
	if err != nil {
		r.t.Fatal(err)
	}
	n := 0
	for _, s := range l.Sandboxes {
		if s.ForkedFrom == id {
			n++
			testkit.Eventually(r.t, limit, "a copy is "+copies, func() bool { return r.get(s.ID).State == copies })
		}
	}
	if (n == 2) != (copies != "") {
		r.t.Errorf("there are %d copies", n)
	}
}

// TestPausedStaysPaused through ten passes and three restarts, and a host that is
// silent for a while.
func TestPausedStaysPaused(t *testing.T) {
	r := newRig(t)
	id := r.create()
	r.write(id, "/a", "kept")
	r.pause(id)
	before := r.get(id)
	for range 3 {
		for range 10 {
			if err := r.srv.Reconcile(r.ctx()); err != nil {
				t.Fatal(err)
			}
		}
		r.host.SetHook(func(context.Context, string, string) error { return sandbox.Errorf(sandbox.KindTransient, "no route") })
		_ = r.srv.Reconcile(r.ctx()) // the same error
		r.host.SetHook(nil)
		r.stop()
		r.start()
	}
	if diff := cmp.Diff(before, r.get(id)); diff != "" {
		t.Errorf("it has changed (-before +after):\n%s", diff)
	}
	if got := r.read(id, "/a"); got != "kept" {
		t.Errorf("resumed, its file has %q", got)
	}
}

// TestAVMThatVanishedHasFailed, whatever was being done to it.
func TestAVMThatVanishedHasFailed(t *testing.T) {
	r := newRig(t)
	for _, step := range []string{"", "PauseSandbox.save", "ResumeSandbox.restore"} {
		id := r.create()
		if step == "ResumeSandbox.restore" {
			r.pause(id)
		}
		r.host.SetHook(func(_ context.Context, method, box string) error {
			if method == step && box == id {
				r.host.Crash(id, sandbox.CauseVMMCrash, "killed")
			}
			return nil
		})
		var err error
		switch step {
		case "":
			r.host.Crash(id, sandbox.CauseVMMCrash, "killed")
		case "PauseSandbox.save":
			_, err = r.c.Pause(r.ctx(), id)
		default:
			_, err = r.c.Resume(r.ctx(), id, api.Resume{})
		}
		r.host.SetHook(nil)
		if step != "" && (!sandbox.Is(err, sandbox.KindConflict) || !containsText(err.Error(), "vmm_crash")) {
			t.Errorf("%s: %v, want a conflict with the cause", step, err)
		}
		testkit.Eventually(t, limit, "failed", func() bool { return r.get(id).State == "failed" })
		if got := r.get(id); got.Cause != "vmm_crash" || got.Saved != nil {
			t.Errorf("%s: %+v", step, got)
		}
	}
}
