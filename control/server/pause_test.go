package server_test

import (
	"bytes"
	"context"
	"io"
	"strings"
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

// write puts a file into a sandbox.
func (r *rig) write(id, path, text string) {
	r.t.Helper()
	if _, err := r.c.WriteFile(r.ctx(), id, path, "", strings.NewReader(text)); err != nil {
		r.t.Fatal(err)
	}
}

// read reads it back.
func (r *rig) read(id, path string) string {
	r.t.Helper()
	f, _, err := r.c.ReadFile(r.ctx(), id, path, "")
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // it is read to its end
	b, err := io.ReadAll(f)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(b)
}

func (r *rig) pause(id string) api.Sandbox {
	r.t.Helper()
	s, err := r.c.Pause(r.ctx(), id)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// createWith makes a sandbox that runs, as asked.
func (r *rig) createWith(req api.CreateSandbox) string {
	r.t.Helper()
	s, err := r.c.CreateSandbox(r.ctx(), req, "")
	if err != nil {
		r.t.Fatal(err)
	}
	return s.ID
}

func ptr[T any](v T) *T { return &v }

func TestPauseAndResume(t *testing.T) {
	r := newRig(t)
	id := r.createWith(api.CreateSandbox{TimeoutSeconds: ptr(120.0), Env: map[string]string{"A": "1"}})
	r.write(id, "/a", "kept")
	paused := r.pause(id)
	if paused.State != "paused" || paused.PausedAt == nil || paused.PauseReason != "user" || paused.Deadline != nil {
		t.Errorf("paused: %+v", paused)
	}
	if s := paused.Saved; s == nil || s.Generation != 1 || s.Durability != "local" || s.MemoryBytes == 0 || s.DiskBytes == 0 || s.OwnBytes == 0 || s.MemoryDigest == "" {
		t.Errorf("its pause point: %+v", s)
	}
	var names []string
	for _, p := range paused.Phases {
		names = append(names, p.Name)
	}
	if diff := cmp.Diff([]string{"freeze", "device_state", "dirty_scan", "compare", "publish"}, names); diff != "" {
		t.Errorf("its phases (-want +got):\n%s", diff)
	}
	if paused.Report == nil || paused.Report.ChangedPages == 0 || paused.Report.BytesWritten == 0 {
		t.Errorf("its report: %+v", paused.Report)
	}
	kept := r.get(id)
	again := r.pause(id)
	if diff := cmp.Diff(kept, again); diff != "" {
		t.Errorf("a second pause does something (-get +pause):\n%s", diff)
	}
	if n := r.host.Count("PauseSandbox"); n != 1 {
		t.Errorf("the host was asked to pause %d times", n)
	}

	resumed, err := r.c.Resume(r.ctx(), id, api.Resume{Env: map[string]string{"B": "2"}})
	if err != nil || resumed.State != "running" || resumed.PausedAt != nil || resumed.StartedBy != "resume" || len(resumed.Phases) == 0 {
		t.Fatalf("resumed: %+v, %v", resumed, err)
	}
	if left := time.Until(*resumed.Deadline); left > 2*time.Minute || left < time.Minute {
		t.Errorf("its deadline is in %v, want the 2 min that it was created with", left)
	}
	if got := r.host.Status(id).GetSpec().GetDeadline().AsTime(); !got.Equal(*resumed.Deadline) {
		t.Errorf("the host's deadline is %v, the answer's %v", got, *resumed.Deadline)
	}
	if diff := cmp.Diff(map[string]string{"A": "1", "B": "2"}, r.host.Status(id).GetSpec().GetEnv()); diff != "" {
		t.Errorf("its environment (-want +got):\n%s", diff)
	}
	if got := r.read(id, "/a"); got != "kept" {
		t.Errorf("its file has %q", got)
	}
	resumed.Phases = nil
	same, err := r.c.Resume(r.ctx(), id, api.Resume{TimeoutSeconds: ptr(5.0)})
	if diff := cmp.Diff(resumed, same); err != nil || diff != "" {
		t.Errorf("resuming a running one changes something: %v (-resumed +again):\n%s", err, diff)
	}
	second := r.pause(id)
	if second.Saved.Generation != 2 || second.Saved.ParentDigest != paused.Saved.MemoryDigest {
		t.Errorf("the second pause point does not follow the first: %+v", second.Saved)
	}
	short, err := r.c.Resume(r.ctx(), id, api.Resume{TimeoutSeconds: ptr(10.0)})
	if err != nil || time.Until(*short.Deadline) > 11*time.Second || short.TimeoutSeconds != 10 {
		t.Errorf("resumed for 10 s: %+v, %v", short, err)
	}
	r.pause(id)
	ended, err := r.c.Delete(r.ctx(), id)
	if err != nil || ended.State != "gone" || ended.Saved != nil {
		t.Errorf("destroying a paused one: %+v, %v", ended, err)
	}
	_, err = r.c.Pause(r.ctx(), id)
	r.wantKind(err, sandbox.KindConflict)
	_, err = r.c.Resume(r.ctx(), id, api.Resume{})
	r.wantKind(err, sandbox.KindConflict)
	if !strings.Contains(err.Error(), "cause user") {
		t.Errorf("resuming what has ended: %v", err)
	}
}

// reaching are all calls that reach into a sandbox.
var reaching = map[string]func(*rig, string) error{
	"exec": func(r *rig, id string) error {
		_, err := r.c.Exec(r.ctx(), id, api.Exec{Shell: "echo"})
		return err
	},
	"exec stream": func(r *rig, id string) error {
		s, err := r.c.ExecStream(r.ctx(), id, api.Exec{Shell: "echo hi"}, client.StreamOptions{Stdout: new(bytes.Buffer)})
		if err == nil {
			_, err = s.Wait()
		}
		return err
	},
	"terminal": func(r *rig, id string) error {
		s, err := r.c.OpenTerminal(r.ctx(), id, api.Exec{Shell: "echo hi"}, client.TerminalOptions{})
		if err == nil {
			_, err = s.Wait()
		}
		return err
	},
	"watch": func(r *rig, id string) error {
		w, err := r.c.Watch(r.ctx(), id, "/", client.WatchOptions{})
		if err == nil {
			err = w.Close()
		}
		return err
	},
	"connection to a port": func(r *rig, id string) error {
		c, err := r.c.DialPort(r.ctx(), id, 80)
		if sandbox.Is(err, sandbox.KindUnanswered) { // of the port: nothing listens there
			return nil
		}
		if err == nil {
			err = c.Close()
		}
		return err
	},
	"request to a port": func(r *rig, id string) error {
		resp, d := r.send("GET", "/v1/sandboxes/"+id+"/ports/80/", "")
		if resp.StatusCode == 502 { // as above
			return nil
		}
		return sandbox.Errorf(sandbox.Kind(d.Code), "%s", d.Message)
	},
	"ping": func(r *rig, id string) error { _, err := r.c.Ping(r.ctx(), id); return err },
	"read": func(r *rig, id string) error {
		f, _, err := r.c.ReadFile(r.ctx(), id, "/pattern/1000", "")
		if err == nil {
			err = f.Close()
		}
		return err
	},
	"write": func(r *rig, id string) error {
		_, err := r.c.WriteFile(r.ctx(), id, "/new", "", strings.NewReader(strings.Repeat("x", 1<<20)))
		return err
	},
	"list":  func(r *rig, id string) error { _, err := r.c.ListDir(r.ctx(), id, "/", "", 1); return err },
	"mkdir": func(r *rig, id string) error { _, err := r.c.MakeDir(r.ctx(), id, "/dir", ""); return err },
	"fork":  func(r *rig, id string) error { _, err := r.c.Fork(r.ctx(), id, api.Fork{}, ""); return err },
	"snapshot": func(r *rig, id string) error {
		_, err := r.c.CreateSnapshot(r.ctx(), api.CreateSnapshot{Name: "of-" + id, SandboxID: id})
		return err
	},
}

func TestACallResumes(t *testing.T) {
	r := newRig(t)
	for name, call := range reaching {
		t.Run(name, func(t *testing.T) {
			id := r.create()
			r.pause(id)
			if err := call(r, id); err != nil {
				t.Fatalf("into a paused one: %v", err)
			}
			if got := r.get(id); got.State != "running" || got.StartedBy != "resume" {
				t.Errorf("afterwards it is %+v", got)
			}
		})
	}
}

func TestACallIsToldHowToResume(t *testing.T) {
	r := newRig(t)
	for name, call := range reaching {
		t.Run(name, func(t *testing.T) {
			id := r.createWith(api.CreateSandbox{AutoResume: ptr(false)})
			r.pause(id)
			err := call(r, id)
			if !sandbox.Is(err, sandbox.KindPaused) || !strings.Contains(err.Error(), "/v1/sandboxes/"+id+"/resume") || !strings.Contains(err.Error(), "dormouse resume") {
				t.Errorf("into a paused one: %s: %v", sandbox.KindOf(err), err)
			}
			if got := r.get(id).State; got != "paused" {
				t.Errorf("afterwards it is %s", got)
			}
		})
	}
	if r.host.Count("ResumeSandbox") > 0 {
		t.Error("somebody resumed")
	}
}

// TestLookingResumesNothing: what only looks, or only changes the record, leaves a
// paused sandbox paused.
func TestLookingResumesNothing(t *testing.T) {
	r := newRig(t)
	id := r.create()
	r.pause(id)
	if _, err := r.c.OpenPort(r.ctx(), id, api.OpenPort{Port: 80}); err != nil {
		t.Errorf("a token for its ports: %v", err)
	}
	if _, _, err := r.c.Logs(r.ctx(), id, client.LogOptions{}); err != nil {
		t.Errorf("its logs: %v", err)
	}
	_, err := r.c.Metrics(r.ctx(), id)
	r.wantKind(err, sandbox.KindPaused)
	limited, err := r.c.SetLimits(r.ctx(), id, api.Timeout{TimeoutSeconds: 7, AutoPauseSeconds: ptr(9.0), AutoResume: ptr(false)})
	if err != nil || limited.Deadline != nil || limited.TimeoutSeconds != 7 || limited.AutoPauseSeconds != 9 || limited.AutoResume {
		t.Errorf("limits of a paused one: %+v, %v", limited, err)
	}
	if r.get(id).State != "paused" || r.host.Count("ResumeSandbox") > 0 {
		t.Fatal("it was resumed")
	}
	resumed, err := r.c.Resume(r.ctx(), id, api.Resume{})
	if err != nil || time.Until(*resumed.Deadline) > 8*time.Second {
		t.Errorf("its deadline is %v, want the limit from before: %v", resumed.Deadline, err)
	}
	if got := r.host.Status(id).GetSpec().GetAutoPauseNanos(); got != int64(9*time.Second) {
		t.Errorf("the host pauses it after %v", time.Duration(got))
	}
}

func TestLimitsOfARunningSandbox(t *testing.T) {
	r := newRig(t)
	id := r.create()
	before := r.get(id)
	after, err := r.c.SetLimits(r.ctx(), id, api.Timeout{AutoPauseSeconds: ptr(60.0)})
	if err != nil || !after.Deadline.Equal(*before.Deadline) || after.TimeoutSeconds != before.TimeoutSeconds || after.AutoPauseSeconds != 60 {
		t.Errorf("with an idle policy: %+v, %v", after, err)
	}
	if got := r.host.Status(id).GetSpec().GetAutoPauseNanos(); got != int64(time.Minute) {
		t.Errorf("the host pauses it after %v", time.Duration(got))
	}
	after, err = r.c.SetLimits(r.ctx(), id, api.Timeout{AutoPauseSeconds: ptr(0.0)})
	if err != nil || after.AutoPauseSeconds != 0 || r.host.Status(id).GetSpec().GetAutoPauseNanos() != 0 {
		t.Errorf("without: %+v, %v", after, err)
	}
	after, err = r.c.SetTimeout(r.ctx(), id, time.Hour)
	if err != nil || after.TimeoutSeconds != 3600 {
		t.Errorf("with another timeout: %+v, %v", after, err)
	}
}

// TestAnIdleSandbox: a host pauses it by itself, and a call that comes finds it
// awake, whatever the database knows of that.
func TestAnIdleSandbox(t *testing.T) {
	r := newRig(t)
	id := r.createWith(api.CreateSandbox{AutoPauseSeconds: 60})
	if got := r.get(id); got.TimeoutSeconds != sandbox.MaxTimeout.Seconds() {
		t.Errorf("it has %v s to live, want the most: it costs nothing while it is idle", got.TimeoutSeconds)
	}
	if got := r.createWith(api.CreateSandbox{AutoPauseSeconds: 60, TimeoutSeconds: ptr(30.0)}); r.get(got).TimeoutSeconds != 30 {
		t.Error("a timeout that was asked for is another one")
	}
	if !r.host.PauseIdle(t.Context(), id) {
		t.Fatal("it is not idle")
	}
	testkit.Eventually(t, limit, "paused on record", func() bool { return r.get(id).State == "paused" })
	if got := r.get(id); got.PauseReason != "idle" || got.Saved == nil || got.Deadline != nil {
		t.Errorf("paused for being idle: %+v", got)
	}
	if _, err := r.c.Exec(r.ctx(), id, api.Exec{Shell: "echo"}); err != nil {
		t.Fatal(err)
	}
	if r.host.PauseIdle(t.Context(), id) {
		t.Error("it was paused right after a call")
	}
}

// TestACallMeetsAnIdlePause: the host pauses the sandbox after the database was
// read and before it is called.
func TestACallMeetsAnIdlePause(t *testing.T) {
	r := newRig(t, func(c *server.Config) { c.Reconcile.Interval = time.Hour })
	for name, call := range reaching {
		t.Run(name, func(t *testing.T) {
			id := r.createWith(api.CreateSandbox{AutoPauseSeconds: 1})
			var once sync.Once
			r.host.SetHook(func(ctx context.Context, method, box string) error {
				if method == "TouchSandbox" && box == id {
					once.Do(func() {
						if !r.host.PauseIdle(context.WithoutCancel(ctx), id) {
							t.Error("it is not idle")
						}
					})
				}
				return nil
			})
			defer r.host.SetHook(nil)
			if err := call(r, id); err != nil {
				t.Fatalf("%s: %v", sandbox.KindOf(err), err)
			}
			if got := r.host.Status(id); got.GetStart() != "resume" {
				t.Errorf("it was not paused in between: %v", got)
			}
		})
	}
}

func TestARunningCommandIsNoIdleness(t *testing.T) {
	r := newRig(t)
	id := r.createWith(api.CreateSandbox{AutoPauseSeconds: 1})
	ctx, cancel := context.WithCancel(r.ctx())
	ended := make(chan error, 1)
	go func() {
		_, err := r.c.Exec(ctx, id, api.Exec{Shell: "sleep"})
		ended <- err
	}()
	testkit.Eventually(t, limit, "running", func() bool { return r.host.Processes() == 1 })
	if r.host.PauseIdle(t.Context(), id) {
		t.Error("it was paused under a command")
	}
	cancel()
	if err := <-ended; err == nil {
		t.Error("the command ended by itself")
	}
}

// TestAnAutomaticPauseThatFails ends nothing, and is told.
func TestAnAutomaticPauseThatFails(t *testing.T) {
	r := newRig(t)
	id := r.createWith(api.CreateSandbox{AutoPauseSeconds: 1})
	r.host.Refuse(sandbox.Errorf(sandbox.KindNoSpace, "the host's disk is full"))
	if r.host.PauseIdle(t.Context(), id) {
		t.Fatal("it did not fail")
	}
	testkit.Eventually(t, limit, "told", func() bool { return r.get(id).AutoPauseError != "" })
	if got := r.get(id); got.State != "running" || !strings.Contains(got.AutoPauseError, "disk is full") {
		t.Errorf("afterwards: %+v", got)
	}
	r.host.Refuse(nil)
	r.pause(id)
	if got := r.get(id); got.State != "paused" || got.AutoPauseError != "" {
		t.Errorf("after a pause that did not fail: %+v", got)
	}
}

// TestAPauseInterrupts: what is under way ends with a conflict that says so.
func TestAPauseInterrupts(t *testing.T) {
	r := newRig(t)
	id := r.create()
	ended := make(chan error, 1)
	go func() {
		_, err := r.c.Exec(r.ctx(), id, api.Exec{Shell: "sleep"})
		ended <- err
	}()
	testkit.Eventually(t, limit, "running", func() bool { return r.host.Processes() == 1 })
	r.pause(id)
	err := <-ended
	r.wantKind(err, sandbox.KindConflict)
	if !strings.Contains(err.Error(), "was paused") {
		t.Errorf("the command ended with %v", err)
	}
}

// Each step of a pause and of a resume fails once: the sandbox is running or
// paused, as the host says, nobody has lost it, and the next try succeeds.
func TestChangesFailAt(t *testing.T) {
	full := sandbox.Errorf(sandbox.KindNoSpace, "the host's disk is full")
	for _, tt := range []struct {
		name  string
		step  string // of the host's, or a failpoint of ours
		err   error
		kind  sandbox.Kind
		pause string // what it is after a pause failed there
		woken string // and after a resume
	}{
		{"before the host was asked", "control/%s/marked", nil, sandbox.KindInternal, "running", "paused"},
		{"after the host has done it", "control/%s/%sd", nil, sandbox.KindInternal, "paused", "running"},
		{"the host refuses", "%sSandbox", full, sandbox.KindNoSpace, "running", "paused"},
		{"the host fails in the middle", "%sSandbox.%s", full, sandbox.KindNoSpace, "running", "paused"},
		{"the host cannot be reached", "%sSandbox", sandbox.Errorf(sandbox.KindTransient, "no route"), sandbox.KindTransient, "running", "paused"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, func(c *server.Config) { c.Reconcile.SettleFor = 50 * time.Millisecond })
			id := r.create()
			r.write(id, "/a", "kept")
			for _, verb := range []string{"pause", "resume"} {
				want, call := tt.pause, func() error { _, err := r.c.Pause(r.ctx(), id); return err }
				if verb == "resume" {
					want, call = tt.woken, func() error { _, err := r.c.Resume(r.ctx(), id, api.Resume{}); return err }
				}
				disarm := r.breakAt(verb, tt.step, tt.err)
				err := call()
				disarm()
				if !sandbox.Is(err, tt.kind) {
					t.Errorf("%s: %s: %v, want kind %s", verb, sandbox.KindOf(err), err, tt.kind)
				}
				testkit.Eventually(t, limit, verb+" settled", func() bool { return r.get(id).State == want })
				if err := call(); err != nil {
					t.Fatalf("the next %s: %v", verb, err)
				}
			}
			if got := r.read(id, "/a"); got != "kept" {
				t.Errorf("its file has %q", got)
			}
		})
	}
}

// breakAt makes one step of a verb fail.
func (r *rig) breakAt(verb, step string, err error) (disarm func()) {
	upper := strings.ToUpper(verb[:1]) + verb[1:]
	middle := map[string]string{"pause": "save", "resume": "restore"}[verb]
	switch {
	case strings.HasPrefix(step, "control/"):
		step = strings.ReplaceAll(strings.ReplaceAll(step, "%sd", verb+"d"), "%s", verb)
		return fault.Set(step, fault.Fail)
	case strings.Contains(step, "."):
		step = upper + "Sandbox." + middle
	default:
		step = upper + "Sandbox"
	}
	r.host.SetHook(func(_ context.Context, method, _ string) error {
		if method == step {
			return err
		}
		return nil
	})
	return func() { r.host.SetHook(nil) }
}
