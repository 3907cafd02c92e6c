package reconcile_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/control/hostfake"
	"github.com/dormouse-sandbox/dormouse/control/reconcile"
	"github.com/dormouse-sandbox/dormouse/control/store"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

type world struct {
	t    *testing.T
	host *hostfake.Host
	db   *store.DB
	r    *reconcile.Reconciler
	now  time.Time
}

func newWorld(t *testing.T, change ...func(*reconcile.Config)) *world {
	t.Helper()
	db, err := store.OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, host: hostfake.New(), db: db, now: time.Now()}
	cfg := reconcile.Config{Host: w.host.Serve(t), HostName: "h", Store: db, Now: func() time.Time { return w.now }}
	for _, fn := range change {
		fn(&cfg)
	}
	w.r = reconcile.New(cfg)
	t.Cleanup(func() {
		if err := w.r.Close(); err != nil {
			t.Error(err)
		}
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// put makes a row in a state, and the host's view of it; a zero host state means
// that the host has no record.
func (w *world) put(state sandbox.State, host hostv1.State) sandbox.ID {
	w.t.Helper()
	s, _, err := w.db.CreateSandbox(w.t.Context(), store.Sandbox{
		ID: sandbox.NewID(), State: sandbox.Creating, Host: "h", CreatedAt: w.now, Spec: sandbox.Spec{Template: "base"},
	}, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	switch state {
	case sandbox.Creating:
	case sandbox.Gone:
		_, err = w.db.End(w.t.Context(), s, sandbox.CauseUser, "", w.now)
	case sandbox.Destroying:
		_, err = w.db.Destroying(w.t.Context(), s, sandbox.CauseUser)
	case sandbox.Pausing, sandbox.Paused, sandbox.Resuming:
		if s, err = w.db.Paused(w.t.Context(), s, store.Pause{At: w.now, Reason: sandbox.PauseUser}); err != nil || state == sandbox.Paused {
			break
		}
		work := store.Work{Owner: "dead", Until: w.now.Add(time.Minute)}
		if state == sandbox.Resuming {
			_, err = w.db.Begin(w.t.Context(), s, state, work)
			break
		}
		if s, err = w.db.Running(w.t.Context(), s, w.now.Add(time.Hour)); err == nil {
			_, err = w.db.Begin(w.t.Context(), s, state, work)
		}
	default:
		_, err = w.db.SetState(w.t.Context(), s, state)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	if host != hostv1.State_STATE_UNSPECIFIED {
		status := &hostv1.SandboxStatus{Spec: &hostv1.SandboxSpec{Id: string(s.ID)}, State: host}
		if host == hostv1.State_STATE_ENDED {
			status.Cause = string(sandbox.CauseVMMCrash)
		}
		w.host.Plant(status)
	}
	return s.ID
}

func (w *world) once() {
	w.t.Helper()
	if err := w.r.Once(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) state(id sandbox.ID) sandbox.State {
	w.t.Helper()
	s, err := w.db.Sandbox(w.t.Context(), id)
	if err != nil {
		w.t.Fatal(err)
	}
	return s.State
}

func TestTenPassesChangeNothingAfterTheFirst(t *testing.T) {
	w := newWorld(t)
	want := map[sandbox.ID]sandbox.State{
		w.put(sandbox.Running, hostv1.State_STATE_RUNNING):     sandbox.Running,
		w.put(sandbox.Running, hostv1.State_STATE_ENDED):       sandbox.Failed,
		w.put(sandbox.Creating, hostv1.State_STATE_RUNNING):    sandbox.Running,
		w.put(sandbox.Creating, 0):                             sandbox.Failed,
		w.put(sandbox.Destroying, hostv1.State_STATE_RUNNING):  sandbox.Gone,
		w.put(sandbox.Destroying, 0):                           sandbox.Gone,
		w.put(sandbox.Unreachable, hostv1.State_STATE_RUNNING): sandbox.Running,
		w.put(sandbox.Gone, hostv1.State_STATE_RUNNING):        sandbox.Gone, // and destroyed on the host
	}
	w.once()
	for id, state := range want {
		if got := w.state(id); got != state {
			t.Errorf("%s is %s, want %s", id, got, state)
		}
	}
	if got := len(w.host.Running()); got != 3 {
		t.Errorf("the host has %d, want 3", got)
	}
	before, err := w.db.Sandboxes(t.Context(), store.Filter{})
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		w.once()
	}
	after, err := w.db.Sandboxes(t.Context(), store.Filter{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("ten more passes changed (-before +after):\n%s", diff)
	}
	if got := w.host.Count("DestroySandbox"); got != 2 {
		t.Errorf("the host was asked to destroy %d times, want 2", got)
	}
}

func TestASilentHostEndsNothing(t *testing.T) {
	w := newWorld(t)
	id, making := w.put(sandbox.Running, hostv1.State_STATE_RUNNING), w.put(sandbox.Creating, hostv1.State_STATE_CREATING)
	w.host.SetHook(func(context.Context, string, string) error { return sandbox.Errorf(sandbox.KindTransient, "no route") })
	if err := w.r.Once(t.Context()); !sandbox.Is(err, sandbox.KindTransient) {
		t.Errorf("a silent host: %v", err)
	}
	if got := w.state(id); got != sandbox.Running {
		t.Errorf("after a moment of silence it is %s", got)
	}
	w.now = w.now.Add(30 * 24 * time.Hour)
	_ = w.r.Once(t.Context()) // the same error
	if got := w.state(id); got != sandbox.Unreachable {
		t.Errorf("after a month of silence it is %s", got)
	}
	if got := w.state(making); got != sandbox.Creating {
		t.Errorf("the one being created is %s", got)
	}
	w.host.SetHook(nil)
	w.once()
	if got := w.state(id); got != sandbox.Running {
		t.Errorf("after the silence it is %s", got)
	}
}

func TestAbsenceCountsOnlyWhenItLasts(t *testing.T) {
	w := newWorld(t)
	id := w.put(sandbox.Running, 0)
	w.once()
	w.now = w.now.Add(5 * time.Second)
	w.once()
	if got := w.state(id); got != sandbox.Running {
		t.Fatalf("after 5 s it is %s", got)
	}
	w.host.Plant(&hostv1.SandboxStatus{Spec: &hostv1.SandboxSpec{Id: string(id)}, State: hostv1.State_STATE_RUNNING})
	w.once()
	w.host.Forget()
	w.now = w.now.Add(8 * time.Second)
	w.once()
	if got := w.state(id); got != sandbox.Running {
		t.Fatalf("absent anew, it is %s at once", got)
	}
	w.now = w.now.Add(11 * time.Second)
	w.once()
	if got := w.state(id); got != sandbox.Failed {
		t.Errorf("after 11 s it is %s", got)
	}
}

func TestARowOfAnotherHostIsNotOurs(t *testing.T) {
	w := newWorld(t)
	s, _, err := w.db.CreateSandbox(t.Context(), store.Sandbox{
		ID: sandbox.NewID(), State: sandbox.Creating, Host: "another", CreatedAt: w.now, Spec: sandbox.Spec{Template: "base"},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	w.now = w.now.Add(time.Hour)
	w.once()
	if got := w.state(s.ID); got != sandbox.Creating {
		t.Errorf("it is %s", got)
	}
}

// waiter is a context that says when somebody waits for its end.
type waiter struct {
	context.Context
	waits chan struct{} // buffered
}

func (w waiter) Done() <-chan struct{} {
	w.waits <- struct{}{}
	return w.Context.Done()
}

func TestAHostThatHangsHoldsNobody(t *testing.T) {
	w := newWorld(t)
	release := make(chan struct{})
	w.host.SetHook(func(ctx context.Context, method, _ string) error {
		if method == "ListSandboxes" {
			select {
			case <-release:
			case <-ctx.Done():
			}
		}
		return nil
	})
	first := make(chan error, 1)
	go func() { first <- w.r.Check(t.Context()) }()
	testkit.Eventually(t, 10*time.Second, "asked", func() bool { return w.host.Count("ListSandboxes") == 1 })

	const callers = 10
	check := func(ctx context.Context) <-chan error {
		waits, errs := make(chan struct{}, 10*callers), make(chan error, callers)
		for range callers {
			go func() { errs <- w.r.Check(waiter{ctx, waits}) }()
		}
		for range callers {
			<-waits
		}
		return errs
	}
	ctx, cancel := context.WithCancel(t.Context())
	gone := check(ctx)
	cancel()
	for range callers {
		if err := <-gone; !errors.Is(err, context.Canceled) {
			t.Errorf("a caller that does not wait got %v", err)
		}
	}

	id := w.put(sandbox.Running, hostv1.State_STATE_ENDED) // after the pass under way has read the rows
	stay := check(t.Context())
	close(release)
	for range callers {
		if err := <-stay; err != nil {
			t.Errorf("a caller that waits got %v", err)
		}
	}
	if got := w.state(id); got != sandbox.Failed {
		t.Errorf("what ended before the call is %s after it", got)
	}
	if err := <-first; err != nil {
		t.Error(err)
	}
	if got := w.host.Count("ListSandboxes"); got != 2 {
		t.Errorf("%d callers made %d passes, want 2", 2*callers+1, got)
	}
	if err := w.r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.r.Check(t.Context()); !sandbox.Is(err, sandbox.KindTransient) {
		t.Errorf("after Close: %v", err)
	}
}

// counter counts the log's warnings.
type counter struct {
	slog.Handler
	warnings *atomic.Int64
}

func (c counter) Handle(_ context.Context, rec slog.Record) error {
	if rec.Level == slog.LevelWarn {
		c.warnings.Add(1)
	}
	return nil
}

func TestAStrangerIsForgottenWithTheHost(t *testing.T) {
	var warnings atomic.Int64
	w := newWorld(t, func(c *reconcile.Config) {
		c.Log = slog.New(counter{slog.NewTextHandler(io.Discard, nil), &warnings})
	})
	stranger := func() *hostv1.SandboxStatus {
		return &hostv1.SandboxStatus{Spec: &hostv1.SandboxSpec{Id: "aaaaaaaaaaaaaaaaaaaaaaaa"}, State: hostv1.State_STATE_RUNNING}
	}
	w.host.Plant(stranger())
	w.once()
	w.once()
	if got := warnings.Load(); got != 1 {
		t.Errorf("one stranger was logged %d times", got)
	}
	w.host.Forget()
	w.once()
	w.host.Plant(stranger())
	w.once()
	if got := warnings.Load(); got != 2 {
		t.Errorf("a stranger that came back was remembered: %d lines, want 2", got)
	}
}

// TestStuckChangesAreSettled from what the host says, and a second pass has nothing
// left to do.
func TestStuckChangesAreSettled(t *testing.T) {
	w := newWorld(t)
	want := map[sandbox.ID]sandbox.State{
		w.put(sandbox.Pausing, hostv1.State_STATE_PAUSED):     sandbox.Paused,
		w.put(sandbox.Pausing, hostv1.State_STATE_RUNNING):    sandbox.Running,
		w.put(sandbox.Pausing, hostv1.State_STATE_PAUSING):    sandbox.Pausing,
		w.put(sandbox.Pausing, hostv1.State_STATE_ENDED):      sandbox.Failed,
		w.put(sandbox.Pausing, 0):                             sandbox.Failed,
		w.put(sandbox.Resuming, hostv1.State_STATE_RUNNING):   sandbox.Running,
		w.put(sandbox.Resuming, hostv1.State_STATE_PAUSED):    sandbox.Paused,
		w.put(sandbox.Resuming, hostv1.State_STATE_RESUMING):  sandbox.Resuming,
		w.put(sandbox.Resuming, hostv1.State_STATE_ENDED):     sandbox.Failed,
		w.put(sandbox.Resuming, 0):                            sandbox.Paused,
		w.put(sandbox.Paused, 0):                              sandbox.Paused,
		w.put(sandbox.Paused, hostv1.State_STATE_PAUSED):      sandbox.Paused,
		w.put(sandbox.Paused, hostv1.State_STATE_RUNNING):     sandbox.Running,
		w.put(sandbox.Running, hostv1.State_STATE_PAUSED):     sandbox.Paused,
		w.put(sandbox.Unreachable, hostv1.State_STATE_PAUSED): sandbox.Paused,
		w.put(sandbox.Creating, hostv1.State_STATE_PAUSED):    sandbox.Paused,
	}
	w.once() // nobody may be about to ask the host just now
	w.now = w.now.Add(11 * time.Second)
	w.once()
	for id, state := range want {
		if got := w.state(id); got != state {
			t.Errorf("%s is %s, want %s", id, got, state)
		}
	}
	before, err := w.db.Sandboxes(t.Context(), store.Filter{})
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		w.now = w.now.Add(time.Minute)
		w.once()
	}
	after, err := w.db.Sandboxes(t.Context(), store.Filter{})
	if diff := cmp.Diff(before, after); diff != "" || err != nil {
		t.Errorf("ten more passes changed, %v (-before +after):\n%s", err, diff)
	}
	if n := w.host.Count("DestroySandbox"); n > 0 {
		t.Errorf("the host was asked to destroy %d times", n)
	}
}

// TestASilentHostAndChanges: what is under way is unreachable when its time is
// over, and what is paused is paused.
func TestASilentHostAndChanges(t *testing.T) {
	w := newWorld(t)
	pausing, resuming := w.put(sandbox.Pausing, hostv1.State_STATE_PAUSED), w.put(sandbox.Resuming, hostv1.State_STATE_RUNNING)
	paused := w.put(sandbox.Paused, hostv1.State_STATE_PAUSED)
	w.host.SetHook(func(context.Context, string, string) error { return sandbox.Errorf(sandbox.KindTransient, "no route") })
	for _, tt := range []struct {
		after time.Duration
		want  []sandbox.State
	}{
		{30 * time.Second, []sandbox.State{sandbox.Pausing, sandbox.Resuming, sandbox.Paused}},
		{30 * 24 * time.Hour, []sandbox.State{sandbox.Unreachable, sandbox.Unreachable, sandbox.Paused}},
	} {
		w.now = w.now.Add(tt.after)
		_ = w.r.Once(t.Context()) // the host's error
		if diff := cmp.Diff(tt.want, []sandbox.State{w.state(pausing), w.state(resuming), w.state(paused)}); diff != "" {
			t.Errorf("after %v of silence (-want +got):\n%s", tt.after, diff)
		}
	}
	w.host.SetHook(nil)
	w.once()
	if diff := cmp.Diff([]sandbox.State{sandbox.Paused, sandbox.Running, sandbox.Paused}, []sandbox.State{w.state(pausing), w.state(resuming), w.state(paused)}); diff != "" {
		t.Errorf("after the silence (-want +got):\n%s", diff)
	}
}

// TestASnapshotThatCameAndWentIsNotFound: it was made after the records were read,
// and is deleted before what the host says is looked at.
func TestASnapshotThatCameAndWentIsNotFound(t *testing.T) {
	var w *world
	w = newWorld(t, func(c *reconcile.Config) {
		c.OwnedSnapshot = func(name string) bool {
			if name == "short" { // whoever owned it is done just now
				w.host.LoseSnapshot(name)
			}
			return false
		}
	})
	for _, name := range []string{"short", "stays"} {
		w.host.KeepSnapshot(&hostv1.Snapshot{Name: name})
	}
	w.once()
	rows, err := w.db.Snapshots(t.Context(), "h")
	if err != nil || len(rows) != 1 || rows[0].Name != "stays" {
		t.Errorf("on record are %+v, %v", rows, err)
	}
}
