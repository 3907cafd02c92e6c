package storetest

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// in brings a new sandbox to a state.
func in(t *testing.T, db *store.DB, state sandbox.State) store.Sandbox {
	t.Helper()
	s := add(t, db, row(epoch))
	path := map[sandbox.State][]sandbox.State{
		sandbox.Running:     {sandbox.Running},
		sandbox.Unreachable: {sandbox.Unreachable},
		sandbox.Pausing:     {sandbox.Running, sandbox.Pausing},
		sandbox.Paused:      {sandbox.Running, sandbox.Pausing, sandbox.Paused},
		sandbox.Resuming:    {sandbox.Running, sandbox.Pausing, sandbox.Paused, sandbox.Resuming},
		sandbox.Destroying:  {sandbox.Destroying},
	}
	for _, next := range path[state] {
		s = must[store.Sandbox](t)(db.SetState(t.Context(), s, next))
	}
	return s
}

// reread fails unless the row is as it was returned.
func reread(t *testing.T, db *store.DB, s store.Sandbox) store.Sandbox {
	t.Helper()
	if diff := cmp.Diff(s, must[store.Sandbox](t)(db.Sandbox(t.Context(), s.ID))); diff != "" {
		t.Errorf("the row differs (-returned +kept):\n%s", diff)
	}
	return s
}

func testPause(t *testing.T, open Open) {
	db := open(t, "a")
	s := row(epoch)
	s.Spec.Env = map[string]string{"A": "1", "B": "1"}
	s = must[store.Sandbox](t)(db.Runs(t.Context(), add(t, db, s), store.Run{
		Deadline: epoch.Add(time.Hour), Timeout: time.Hour, Start: sandbox.StartWarm,
	}))
	s = must[store.Sandbox](t)(db.SetFrozen(t.Context(), s, sandbox.FreezeNoSpace))
	s = must[store.Sandbox](t)(db.SetSaved(t.Context(), s, store.Saved{}, "the disk was full"))
	if s.PauseError == "" || s.Deadline.IsZero() || s.Start != sandbox.StartWarm {
		t.Errorf("running: %+v", s)
	}
	s = must[store.Sandbox](t)(db.Begin(t.Context(), s, sandbox.Pausing, store.Work{Owner: "me", Until: epoch.Add(time.Minute)}))
	s = must[store.Sandbox](t)(db.Paused(t.Context(), s, store.Pause{Saved: saved(1), At: epoch.Add(time.Second), Reason: sandbox.PauseUser}))
	if s.State != sandbox.Paused || s.Saved != saved(1) || !s.PausedAt.Equal(epoch.Add(time.Second)) || s.PauseReason != sandbox.PauseUser ||
		!s.Deadline.IsZero() || s.PauseError != "" || s.Frozen != "" || s.Timeout != time.Hour {
		t.Errorf("paused: %+v", s)
	}
	reread(t, db, s)
	s = must[store.Sandbox](t)(db.Begin(t.Context(), s, sandbox.Resuming, store.Work{Owner: "me", Until: epoch.Add(time.Minute)}))
	back := must[store.Sandbox](t)(db.StillPaused(t.Context(), s))
	if back.State != sandbox.Paused || back.Saved != saved(1) || !back.PausedAt.Equal(epoch.Add(time.Second)) {
		t.Errorf("a resume that failed: %+v", back)
	}
	s = must[store.Sandbox](t)(db.Begin(t.Context(), back, sandbox.Resuming, store.Work{Owner: "me", Until: epoch.Add(time.Minute)}))
	s = must[store.Sandbox](t)(db.Runs(t.Context(), s, store.Run{
		Deadline: epoch.Add(2 * time.Hour), Timeout: time.Minute, Start: sandbox.StartResume, Env: map[string]string{"B": "2", "C": "3"},
	}))
	if s.State != sandbox.Running || !s.PausedAt.IsZero() || s.PauseReason != "" || s.Saved != saved(1) || s.Timeout != time.Minute ||
		s.Start != sandbox.StartResume || !s.Deadline.Equal(epoch.Add(2*time.Hour)) {
		t.Errorf("resumed: %+v", s)
	}
	if diff := cmp.Diff(map[string]string{"A": "1", "B": "2", "C": "3"}, s.Spec.Env); diff != "" {
		t.Errorf("its environment (-want +got):\n%s", diff)
	}
	reread(t, db, s)
	ended := must[store.Sandbox](t)(db.End(t.Context(), s, sandbox.CauseUser, "", epoch))
	if ended.Saved.Kept() || len(ended.Spec.Env) > 0 {
		t.Errorf("an ended one keeps %+v", ended)
	}
	reread(t, db, ended)
}

// testThrough: the host has paused a sandbox by itself, or resumed one for a
// process that died.
func testThrough(t *testing.T, open Open) {
	db := open(t, "a")
	for _, tt := range []struct {
		from    sandbox.State
		paused  bool
		running bool
	}{
		{sandbox.Creating, true, true},
		{sandbox.Running, true, true},
		{sandbox.Pausing, true, true},
		{sandbox.Paused, true, true},
		{sandbox.Resuming, true, true},
		{sandbox.Unreachable, true, true},
		{sandbox.Destroying, false, false},
	} {
		s := in(t, db, tt.from)
		after, err := db.Paused(t.Context(), s, store.Pause{Saved: saved(1), At: epoch, Reason: sandbox.PauseIdle})
		if (err == nil) != tt.paused || err == nil && (after.State != sandbox.Paused || after.Version != s.Version+1) {
			t.Errorf("%s → paused: %+v, %v", tt.from, after, err)
		}
		s = in(t, db, tt.from)
		after, err = db.Running(t.Context(), s, epoch)
		if (err == nil) != tt.running || err == nil && (after.State != sandbox.Running || after.Version != s.Version+1) {
			t.Errorf("%s → running: %+v, %v", tt.from, after, err)
		}
	}
	s := in(t, db, sandbox.Running)
	must[store.Sandbox](t)(db.SetDeadline(t.Context(), s, epoch))
	if _, err := db.Paused(t.Context(), s, store.Pause{}); !errors.Is(err, store.ErrStale) {
		t.Errorf("a pause of an old version: %v", err)
	}
}

func testWork(t *testing.T, open Open) {
	db := open(t, "a")
	w := store.Work{Owner: "me", Until: epoch.Add(time.Minute)}
	s := must[store.Sandbox](t)(db.Begin(t.Context(), in(t, db, sandbox.Running), sandbox.Pausing, w))
	if s.Work != w {
		t.Errorf("the work is %+v", s.Work)
	}
	reread(t, db, s)
	if _, err := db.Begin(t.Context(), s, sandbox.Resuming, w); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("pausing → resuming: %v", err)
	}
	s = must[store.Sandbox](t)(db.SetDeadline(t.Context(), s, epoch)) // no change of state
	if s.Work != w {
		t.Errorf("after a change of something else the work is %+v", s.Work)
	}
	s = must[store.Sandbox](t)(db.SetState(t.Context(), s, sandbox.Running))
	if s.Work != (store.Work{}) {
		t.Errorf("it runs, and somebody still works on it: %+v", s.Work)
	}
	reread(t, db, s)
	made := row(epoch)
	made.Work = w
	if s := must[store.Sandbox](t)(db.Running(t.Context(), add(t, db, made), epoch)); s.Work != (store.Work{}) {
		t.Errorf("created, and somebody still works on it: %+v", s.Work)
	}
}

func testLimits(t *testing.T, open Open) {
	db := open(t, "a")
	s := in(t, db, sandbox.Running)
	at, timeout, idle, no := epoch.Add(time.Hour), time.Minute, time.Second, false
	s = must[store.Sandbox](t)(db.SetLimits(t.Context(), s, store.Limits{Deadline: &at, Timeout: &timeout, AutoPause: &idle}))
	if !s.Deadline.Equal(at) || s.Timeout != timeout || s.AutoPause != idle || s.AutoResume {
		t.Errorf("limits are %+v", s)
	}
	s = must[store.Sandbox](t)(db.SetLimits(t.Context(), s, store.Limits{AutoResume: &no}))
	if !s.Deadline.Equal(at) || s.Timeout != timeout || s.AutoPause != idle {
		t.Errorf("what was not given has changed: %+v", s)
	}
	reread(t, db, s)
}

// asks makes n copies of a sandbox.
func asks(of sandbox.ID, n int) (copies []store.Sandbox) {
	for range n {
		s := row(epoch)
		s.ForkedFrom = of
		copies = append(copies, s)
	}
	return copies
}

func testFork(t *testing.T, open Open) {
	db := open(t, "a")
	of := add(t, db, row(epoch))
	key := store.Idempotency{Owner: "o", Key: "k", Hash: []byte("h"), TTL: time.Hour}
	made, first, err := db.CreateCopies(t.Context(), asks(of.ID, 3), &key)
	if err != nil || !first || len(made) != 3 {
		t.Fatalf("%v, %v, %v", made, first, err)
	}
	for i, s := range made {
		if s.ForkGroup != made[0].ID || s.ForkIndex != i || s.ForkedFrom != of.ID || s.Version != 1 {
			t.Errorf("copy %d is %+v", i, s)
		}
		reread(t, db, s)
	}
	again, first, err := db.CreateCopies(t.Context(), asks(of.ID, 3), &key)
	if diff := cmp.Diff(made, again); diff != "" || first || err != nil {
		t.Errorf("the same again: %v, %v (-first +second):\n%s", first, err, diff)
	}
	found, ok, err := db.RepeatedFork(t.Context(), key, epoch)
	if diff := cmp.Diff(made, found); diff != "" || !ok || err != nil {
		t.Errorf("looked up: %v, %v (-first +found):\n%s", ok, err, diff)
	}
	if diff := cmp.Diff(made, must[[]store.Sandbox](t)(db.Copies(t.Context(), made[0].ID))); diff != "" {
		t.Errorf("by their group (-made +listed):\n%s", diff)
	}
	if got := must[[]store.Sandbox](t)(db.Copies(t.Context(), "")); len(got) > 0 {
		t.Errorf("what no fork made counts as copies: %v", got)
	}
	if _, ok, err := db.RepeatedFork(t.Context(), key, epoch.Add(time.Hour)); ok || err != nil {
		t.Errorf("an expired key: %v, %v", ok, err)
	}
	other := key
	other.Hash = []byte("another")
	if _, _, err := db.CreateCopies(t.Context(), asks(of.ID, 3), &other); !errors.Is(err, store.ErrReused) {
		t.Errorf("the key of another request: %v", err)
	}
	half := asks(of.ID, 3)
	half[2].ID = half[1].ID
	if _, _, err := db.CreateCopies(t.Context(), half, nil); err == nil {
		t.Error("two copies with one ID were taken")
	}
	if _, err := db.Sandbox(t.Context(), half[0].ID); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("half a fork was added: %v", err)
	}
	if _, _, err := db.CreateCopies(t.Context(), nil, nil); err == nil {
		t.Error("a fork of no copies was taken")
	}
}

// shot is a snapshot as it is asked for.
func shot(name string) store.Template {
	return store.Template{
		Name: name, State: sandbox.SnapshotCreating, Work: store.Work{Owner: "me", Until: epoch.Add(time.Minute)}, Host: "h",
		Image: "base", Sandbox: "abc", VCPUs: 1, MemMiB: 512, DiskMiB: 4096, Metadata: map[string]string{"a": "b"}, CreatedAt: epoch,
	}
}

// ready is one that is there, below a parent.
func ready(t *testing.T, db *store.DB, name, parent string) store.Template {
	t.Helper()
	as := shot(name)
	as.Parent, as.Saved = parent, saved(2)
	return must[store.Template](t)(db.Made(t.Context(), must[store.Template](t)(db.AddSnapshot(t.Context(), shot(name))), as))
}

func testSnapshot(t *testing.T, open Open) {
	db := open(t, "a")
	asked := must[store.Template](t)(db.AddSnapshot(t.Context(), shot("one")))
	if asked.Kind != sandbox.TemplateSnapshot || asked.Version != 1 {
		t.Errorf("added: %+v", asked)
	}
	if diff := cmp.Diff(asked, must[store.Template](t)(db.Snapshot(t.Context(), "one"))); diff != "" {
		t.Errorf("(-added +kept):\n%s", diff)
	}
	if _, err := db.AddSnapshot(t.Context(), shot("one")); !sandbox.Is(err, sandbox.KindExists) {
		t.Errorf("the same name again: %v", err)
	}
	if _, err := db.Snapshot(t.Context(), "two"); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("an unknown name: %v", err)
	}
	as := shot("one")
	as.Image, as.Parent, as.Saved, as.VCPUs, as.MemMiB, as.DiskMiB = "debian", "zero", saved(5), 2, 3, 4
	made := must[store.Template](t)(db.Made(t.Context(), asked, as))
	if made.State != sandbox.SnapshotReady || made.Saved != saved(5) || made.Image != "debian" || made.Parent != "zero" ||
		made.VCPUs != 2 || made.MemMiB != 3 || made.DiskMiB != 4 || made.Work != (store.Work{}) {
		t.Errorf("made: %+v", made)
	}
	later := shot("a-later-one")
	later.CreatedAt, later.Host = epoch.Add(time.Second), "g"
	later = must[store.Template](t)(db.AddSnapshot(t.Context(), later))
	if diff := cmp.Diff([]store.Template{made, later}, must[[]store.Template](t)(db.Snapshots(t.Context(), ""))); diff != "" {
		t.Errorf("the list (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]store.Template{later}, must[[]store.Template](t)(db.Snapshots(t.Context(), "g"))); diff != "" {
		t.Errorf("of one host (-want +got):\n%s", diff)
	}
}

func testSnapshotStates(t *testing.T, open Open) {
	db := open(t, "a")
	w := store.Work{Owner: "me", Until: epoch}
	s := ready(t, db, "one", "")
	lost := must[store.Template](t)(db.SetSnapshotState(t.Context(), s, sandbox.SnapshotLost))
	if _, err := db.SetSnapshotState(t.Context(), s, sandbox.SnapshotLost); !errors.Is(err, store.ErrStale) {
		t.Errorf("a change of an old version: %v", err)
	}
	if err := db.RemoveSnapshot(t.Context(), s); !errors.Is(err, store.ErrStale) {
		t.Errorf("a removal of an old version: %v", err)
	}
	back := must[store.Template](t)(db.SetSnapshotState(t.Context(), lost, sandbox.SnapshotReady))
	going := must[store.Template](t)(db.DeletingSnapshot(t.Context(), back, w))
	if going.State != sandbox.SnapshotDeleting || going.Work != w {
		t.Errorf("deleting: %+v", going)
	}
	kept := must[store.Template](t)(db.SetSnapshotState(t.Context(), going, sandbox.SnapshotReady))
	if kept.Work != (store.Work{}) || kept.Saved != saved(2) {
		t.Errorf("a deletion that was refused: %+v", kept)
	}
	if _, err := db.SetSnapshotState(t.Context(), kept, sandbox.SnapshotCreating); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("ready → creating: %v", err)
	}
	if err := db.RemoveSnapshot(t.Context(), kept); err != nil {
		t.Fatal(err)
	}
	if err := db.RemoveSnapshot(t.Context(), kept); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("a second removal: %v", err)
	}
	if _, err := db.SetSnapshotState(t.Context(), kept, sandbox.SnapshotLost); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("a change of what is removed: %v", err)
	}
	if _, err := db.AddSnapshot(t.Context(), shot("one")); err != nil {
		t.Errorf("the name is not free again: %v", err)
	}
}

func testDependants(t *testing.T, open Open) {
	db := open(t, "a")
	w := store.Work{Owner: "me", Until: epoch}
	one := ready(t, db, "one", "")
	two := ready(t, db, "two", "one")
	from := row(epoch)
	from.Spec.Template = "one"
	user := must[store.Sandbox](t)(db.Running(t.Context(), add(t, db, from), epoch))
	_, err := db.DeletingSnapshot(t.Context(), one, w)
	for _, part := range []string{"snapshot one is needed by", string(user.ID), "two"} {
		if !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), part) {
			t.Errorf("the error is %v, want %q in it", err, part)
		}
	}
	if got := must[store.Template](t)(db.Snapshot(t.Context(), "one")); got.State != sandbox.SnapshotReady || got.Version != one.Version {
		t.Errorf("a refused deletion has changed it: %+v", got)
	}
	going := must[store.Template](t)(db.DeletingSnapshot(t.Context(), two, w))
	if err := db.RemoveSnapshot(t.Context(), going); err != nil {
		t.Fatal(err)
	}
	must[store.Sandbox](t)(db.End(t.Context(), user, sandbox.CauseUser, "", epoch))
	if err := db.KeepsImage(t.Context(), "base"); !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), "snapshots one") {
		t.Errorf("the image of a snapshot: %v", err)
	}
	going = must[store.Template](t)(db.DeletingSnapshot(t.Context(), one, w))
	if err := db.RemoveSnapshot(t.Context(), going); err != nil {
		t.Fatal(err)
	}
	in(t, db, sandbox.Running) // whether it lies on the image its host knows
	if err := db.KeepsImage(t.Context(), "base"); err != nil {
		t.Errorf("an image that nothing keeps: %v", err)
	}
	paused := in(t, db, sandbox.Paused)
	if err := db.KeepsImage(t.Context(), "base"); !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), string(paused.ID)) {
		t.Errorf("the image of a paused sandbox: %v", err)
	}
	for range 30 {
		in(t, db, sandbox.Paused)
	}
	if err := db.KeepsImage(t.Context(), "base"); err == nil || !strings.Contains(err.Error(), "and 11 more") || len(err.Error()) > 1000 {
		t.Errorf("many: %v", err)
	}
}
