package reconcile_test

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/control/hostfake"
	"github.com/dormouse-sandbox/dormouse/control/reconcile"
	"github.com/dormouse-sandbox/dormouse/control/store"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

type world struct {
	t    *testing.T
	host *hostfake.Host
	db   *store.DB
	r    *reconcile.Reconciler
	now  time.Time
}

func newWorld(t *testing.T) *world {
	t.Helper()
	db, err := store.OpenSQLite(t.Context(), filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, host: hostfake.New(), db: db, now: time.Now()}
	w.r = reconcile.New(reconcile.Config{
		Host: w.host.Serve(t), HostName: "h", Store: db, Now: func() time.Time { return w.now },
	})
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
