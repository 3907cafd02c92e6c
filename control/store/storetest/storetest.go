// Package storetest says what a database of package store must do. Every kind
// of database runs the whole of it.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Open opens an empty database, or, when called again with the same name within
// one test, the same one.
type Open func(t *testing.T, name string) *store.DB

// Run runs the suite.
func Run(t *testing.T, open Open) {
	for name, fn := range map[string]func(*testing.T, Open){
		"a sandbox comes back as it was":           testRoundTrip,
		"only allowed transitions":                 testTransitions,
		"what is frozen says so until it ends":     testFrozen,
		"one of many writers wins":                 testCompareAndSet,
		"an end is kept":                           testEnd,
		"pages are stable":                         testPages,
		"filters":                                  testFilters,
		"one key, one sandbox":                     testIdempotency,
		"what is too old goes, within a bound":     testForget,
		"API keys":                                 testKeys,
		"what was written is there after an open":  testReopen,
		"a cancelled context writes nothing":       testCancelled,
		"readers do not wait for a writer's queue": testConcurrency,
		"a pause and a resume are kept":            testPause,
		"a host may be ahead of the record":        testThrough,
		"work is known, and over with its state":   testWork,
		"limits":                                   testLimits,
		"a fork is added whole":                    testFork,
		"a snapshot comes back as it was":          testSnapshot,
		"a snapshot changes by compare-and-set":    testSnapshotStates,
		"what is needed is not deleted":            testDependants,
	} {
		t.Run(name, func(t *testing.T) { fn(t, open) })
	}
}

// saved is the pause point of a generation.
func saved(generation int) store.Saved {
	return store.Saved{
		At: epoch.Add(time.Duration(generation) * time.Hour), Generation: generation, MemoryBytes: 3 << 20, DiskBytes: 2 << 20, OwnBytes: 1 << 20,
		MemoryDigest: fmt.Sprintf("m%d", generation), DiskDigest: "d", ParentDigest: "p", Compat: "fake 1", Durability: sandbox.DurableLocal,
	}
}

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 678901234, time.UTC)

func row(at time.Time) store.Sandbox {
	return store.Sandbox{
		ID: sandbox.NewID(), State: sandbox.Creating, Host: "h", CreatedAt: at,
		Spec:     sandbox.Spec{Template: "base", VCPUs: 1, MemMiB: 512, DiskMiB: 4096, Env: map[string]string{}},
		Metadata: map[string]string{},
	}
}

func add(t *testing.T, db *store.DB, s store.Sandbox) store.Sandbox {
	t.Helper()
	got, made, err := db.CreateSandbox(t.Context(), s, nil)
	if err != nil || !made {
		t.Fatalf("add: %v, %v", made, err)
	}
	return got
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func testRoundTrip(t *testing.T, open Open) {
	db := open(t, "a")
	want := row(epoch)
	want.Spec = sandbox.Spec{
		Template: "t", VCPUs: 2, MemMiB: 3, DiskMiB: 4, Env: map[string]string{"A": "ü\n\"'", "B": ""},
		Network: sandbox.Network{Internet: true},
	}
	want.Metadata = map[string]string{"k": "v", "'; DROP TABLE sandboxes; --": "x"}
	want.Deadline = epoch.Add(time.Hour)
	want.Timeout, want.AutoPause, want.AutoResume = time.Minute, 7*time.Second, true
	want.Work = store.Work{Owner: "me", Until: epoch.Add(time.Minute)}
	want.Saved = saved(3)
	want.PausedAt, want.PauseReason, want.PauseError, want.Start = epoch, sandbox.PauseIdle, "no space", sandbox.StartFork
	want.ForkedFrom, want.ForkGroup, want.ForkIndex = sandbox.NewID(), want.ID, 9
	add(t, db, want)
	want.Version = 1
	if diff := cmp.Diff(want, must[store.Sandbox](t)(db.Sandbox(t.Context(), want.ID))); diff != "" {
		t.Errorf("(-put +got):\n%s", diff)
	}
	if _, err := db.Sandbox(t.Context(), sandbox.NewID()); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("an unknown ID: %v", err)
	}
	if _, _, err := db.CreateSandbox(t.Context(), want, nil); err == nil {
		t.Error("the same ID was added twice")
	}
}

func testFrozen(t *testing.T, open Open) {
	db := open(t, "a")
	s := must[store.Sandbox](t)(db.Running(t.Context(), add(t, db, row(epoch)), epoch))
	frozen := must[store.Sandbox](t)(db.SetFrozen(t.Context(), s, sandbox.FreezeNoSpace))
	if got := must[store.Sandbox](t)(db.Sandbox(t.Context(), s.ID)); got.Frozen != sandbox.FreezeNoSpace || got.State != sandbox.Running {
		t.Errorf("after it was frozen: %+v", got)
	}
	if _, err := db.SetFrozen(t.Context(), s, ""); !errors.Is(err, store.ErrStale) {
		t.Errorf("an old version: %v", err)
	}
	ended := must[store.Sandbox](t)(db.End(t.Context(), frozen, sandbox.CauseVMMCrash, "", epoch))
	if got := must[store.Sandbox](t)(db.Sandbox(t.Context(), s.ID)); got.Frozen != "" || ended.Frozen != "" {
		t.Errorf("an ended one still says %q", got.Frozen)
	}
}

func testTransitions(t *testing.T, open Open) {
	db := open(t, "a")
	for _, next := range sandbox.States() {
		s := add(t, db, row(epoch))
		after, err := db.SetState(t.Context(), s, next)
		if allowed := sandbox.Creating.CanBecome(next); allowed != (err == nil) && next != sandbox.Creating {
			t.Errorf("creating → %s: %v, allowed is %v", next, err, allowed)
		}
		if err == nil && (after.State != next || after.Version != s.Version+1) {
			t.Errorf("creating → %s gave %s version %d", next, after.State, after.Version)
		}
		if err != nil && !sandbox.Is(err, sandbox.KindConflict) {
			t.Errorf("creating → %s: %v is no conflict", next, err)
		}
	}
}

func testCompareAndSet(t *testing.T, open Open) {
	db := open(t, "a")
	s := add(t, db, row(epoch))
	var won, stale atomic.Int32
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			_, err := db.Running(t.Context(), s, epoch)
			switch {
			case err == nil:
				won.Add(1)
			case errors.Is(err, store.ErrStale):
				stale.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 || stale.Load() != 15 {
		t.Errorf("%d writers won and %d were told that they are late", won.Load(), stale.Load())
	}
	// The state alone is not enough: it may have left and come back.
	now := must[store.Sandbox](t)(db.Sandbox(t.Context(), s.ID))
	away := must[store.Sandbox](t)(db.SetState(t.Context(), now, sandbox.Unreachable))
	must[store.Sandbox](t)(db.SetState(t.Context(), away, sandbox.Running))
	if _, err := db.SetState(t.Context(), now, sandbox.Unreachable); !errors.Is(err, store.ErrStale) {
		t.Errorf("an old version was taken: %v", err)
	}
	if _, err := db.SetState(t.Context(), store.Sandbox{ID: sandbox.NewID(), State: sandbox.Creating, Version: 1}, sandbox.Running); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("a change of what is not there: %v", err)
	}
}

func testEnd(t *testing.T, open Open) {
	db := open(t, "a")
	for _, cause := range []sandbox.Cause{sandbox.CauseUser, sandbox.CauseTTL, sandbox.CauseVMMCrash, sandbox.CauseCreateFailed} {
		secret := row(epoch)
		secret.Spec.Env["TOKEN"] = "secret"
		s := add(t, db, secret)
		long := string(make([]byte, 100_000)) + "the reason"
		after := must[store.Sandbox](t)(db.End(t.Context(), s, cause, long, epoch.Add(time.Minute)))
		if after.State != cause.End() || after.Cause != cause || !after.EndedAt.Equal(epoch.Add(time.Minute)) {
			t.Errorf("%s: %+v", cause, after)
		}
		kept := must[store.Sandbox](t)(db.Sandbox(t.Context(), s.ID))
		if diff := cmp.Diff(after, kept); diff != "" || len(kept.Spec.Env) > 0 {
			t.Errorf("%s: the row has the environment %v and differs (-returned +kept):\n%s", cause, kept.Spec.Env, diff)
		}
		if n := len(after.CauseDetail); n > store.MaxCauseDetail || after.CauseDetail[n-len("the reason"):] != "the reason" {
			t.Errorf("%s: the detail has %d bytes and ends in %q", cause, n, after.CauseDetail[max(0, n-20):])
		}
		if _, err := db.End(t.Context(), after, cause, "", epoch); !sandbox.Is(err, sandbox.KindConflict) {
			t.Errorf("%s: it ended twice: %v", cause, err)
		}
		if _, err := db.SetState(t.Context(), after, sandbox.Running); !sandbox.Is(err, sandbox.KindConflict) {
			t.Errorf("%s: it came back: %v", cause, err)
		}
	}
	s := add(t, db, row(epoch))
	if _, err := db.End(t.Context(), s, "because", "", epoch); err == nil {
		t.Error("an unknown cause was taken")
	}
	d := must[store.Sandbox](t)(db.Destroying(t.Context(), s, sandbox.CauseUser))
	if after, err := db.End(t.Context(), d, sandbox.CauseUser, "", epoch); err != nil || after.State != sandbox.Gone {
		t.Errorf("the end of a destroy: %+v, %v", after, err)
	}
}

func testPages(t *testing.T, open Open) {
	db := open(t, "a")
	var want []sandbox.ID
	for i := range 25 {
		s := add(t, db, row(epoch.Add(time.Duration(i/5)*time.Second))) // five share a time
		want = append(want, s.ID)
	}
	var got []sandbox.ID
	var after store.Cursor
	for {
		page := must[[]store.Sandbox](t)(db.Sandboxes(t.Context(), store.Filter{After: after, Limit: 4}))
		if len(page) == 0 {
			break
		}
		for _, s := range page {
			got = append(got, s.ID)
		}
		after = must[store.Cursor](t)(store.ParseCursor(store.CursorOf(page[len(page)-1]).String()))
		add(t, db, row(epoch.Add(time.Hour))) // newer ones do not disturb
	}
	slices.Sort(want)
	sorted := slices.Sorted(slices.Values(got))
	if diff := cmp.Diff(want, sorted); diff != "" {
		t.Errorf("the pages together (-want +got):\n%s", diff)
	}
}

func testFilters(t *testing.T, open Open) {
	db := open(t, "a")
	a := row(epoch)
	a.Metadata = map[string]string{"x": "1", "y": "2"}
	b := row(epoch.Add(time.Second))
	b.Spec.Template, b.Host, b.Metadata = "other", "g", map[string]string{"x": "1"}
	a, b = add(t, db, a), add(t, db, b)
	a = must[store.Sandbox](t)(db.Running(t.Context(), a, epoch))
	for _, tt := range []struct {
		name   string
		filter store.Filter
		want   []sandbox.ID
	}{
		{"all", store.Filter{}, []sandbox.ID{b.ID, a.ID}},
		{"state", store.Filter{States: []sandbox.State{sandbox.Running}}, []sandbox.ID{a.ID}},
		{"states", store.Filter{States: []sandbox.State{sandbox.Running, sandbox.Creating}}, []sandbox.ID{b.ID, a.ID}},
		{"template", store.Filter{Template: "other"}, []sandbox.ID{b.ID}},
		{"host", store.Filter{Host: "h"}, []sandbox.ID{a.ID}},
		{"label", store.Filter{Metadata: map[string]string{"x": "1"}}, []sandbox.ID{b.ID, a.ID}},
		{"labels", store.Filter{Metadata: map[string]string{"x": "1", "y": "2"}}, []sandbox.ID{a.ID}},
		{"other value", store.Filter{Metadata: map[string]string{"x": "2"}}, nil},
		{"limit", store.Filter{Limit: 1}, []sandbox.ID{b.ID}},
	} {
		var got []sandbox.ID
		for _, s := range must[[]store.Sandbox](t)(db.Sandboxes(t.Context(), tt.filter)) {
			got = append(got, s.ID)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
	counts := must[map[sandbox.State]int](t)(db.CountByState(t.Context()))
	if diff := cmp.Diff(map[sandbox.State]int{sandbox.Running: 1, sandbox.Creating: 1}, counts); diff != "" {
		t.Errorf("counts (-want +got):\n%s", diff)
	}
}

func testIdempotency(t *testing.T, open Open) {
	db := open(t, "a")
	key := store.Idempotency{Owner: "o", Key: "k", Hash: []byte("h"), TTL: time.Hour}
	var made atomic.Int32
	ids := make([]sandbox.ID, 16)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			s, first, err := db.CreateSandbox(t.Context(), row(epoch), &key)
			if err != nil {
				t.Error(err)
			}
			if first {
				made.Add(1)
			}
			ids[i] = s.ID
		})
	}
	wg.Wait()
	if made.Load() != 1 || len(slices.Compact(slices.Clone(ids))) != 1 {
		t.Errorf("%d were made: %v", made.Load(), ids)
	}
	other := key
	other.Hash = []byte("another request")
	if _, _, err := db.CreateSandbox(t.Context(), row(epoch), &other); !errors.Is(err, store.ErrReused) {
		t.Errorf("the same key for another request: %v", err)
	}
	if _, _, err := db.Repeated(t.Context(), other, epoch); !errors.Is(err, store.ErrReused) {
		t.Errorf("looking up the same key for another request: %v", err)
	}
	other.Owner = "somebody else"
	if _, first, err := db.CreateSandbox(t.Context(), row(epoch), &other); err != nil || !first {
		t.Errorf("the same key of another owner: %v, %v", first, err)
	}
	if s, found, err := db.Repeated(t.Context(), key, epoch.Add(59*time.Minute)); err != nil || !found || s.ID != ids[0] {
		t.Errorf("look-up: %v, %v, %v", s.ID, found, err)
	}
	if _, found, err := db.Repeated(t.Context(), key, epoch.Add(time.Hour)); err != nil || found {
		t.Errorf("an expired key was found: %v", err)
	}
	if s, first, err := db.CreateSandbox(t.Context(), row(epoch.Add(time.Hour)), &key); err != nil || !first || s.ID == ids[0] {
		t.Errorf("an expired key: %v, %v", first, err)
	}
}

func testForget(t *testing.T, open Open) {
	db := open(t, "a")
	live := add(t, db, row(epoch))
	for i := range 10 {
		s := row(epoch)
		s.Metadata = map[string]string{"a": "b"}
		key := &store.Idempotency{Owner: "o", Key: fmt.Sprint(i), Hash: []byte("h"), TTL: time.Hour}
		s, _, err := db.CreateSandbox(t.Context(), s, key)
		if err != nil {
			t.Fatal(err)
		}
		must[store.Sandbox](t)(db.End(t.Context(), s, sandbox.CauseUser, "", epoch.Add(time.Duration(i)*time.Minute)))
	}
	if n := must[int64](t)(db.Forget(t.Context(), epoch.Add(6*time.Minute), 4)); n != 4 {
		t.Errorf("forgot %d, want the 4 that the bound allows", n)
	}
	if n := must[int64](t)(db.Forget(t.Context(), epoch.Add(6*time.Minute), 4)); n != 2 {
		t.Errorf("forgot %d, want the other 2", n)
	}
	if n := must[int64](t)(db.ForgetIdempotency(t.Context(), epoch.Add(time.Second), 3)); n != 3 {
		t.Errorf("forgot %d keys, want 3", n)
	}
	if n := must[int64](t)(db.ForgetIdempotency(t.Context(), epoch.Add(time.Second), 100)); n != 1 {
		t.Errorf("forgot %d keys, want 1: the others went with their sandboxes", n)
	}
	if got := must[[]store.Sandbox](t)(db.Sandboxes(t.Context(), store.Filter{})); len(got) != 5 {
		t.Errorf("%d are left, want 4 and the living one", len(got))
	}
	must[store.Sandbox](t)(db.Sandbox(t.Context(), live.ID))
}

func testKeys(t *testing.T, open Open) {
	db := open(t, "a")
	k := store.Key{ID: "k1", Name: "n", Prefix: "dm_a", Hash: []byte("hash"), CreatedAt: epoch}
	if err := db.AddKey(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(k, must[store.Key](t)(db.KeyByHash(t.Context(), []byte("hash")))); diff != "" {
		t.Errorf("(-put +got):\n%s", diff)
	}
	if diff := cmp.Diff(k, must[store.Key](t)(db.Key(t.Context(), k.ID))); diff != "" {
		t.Errorf("by its ID (-added +read):\n%s", diff)
	}
	if _, err := db.Key(t.Context(), "other"); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("another key's ID: %v", err)
	}
	if _, err := db.KeyByHash(t.Context(), []byte("other")); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("an unknown hash: %v", err)
	}
	for _, at := range []time.Time{epoch.Add(time.Hour), epoch.Add(time.Minute)} { // the later first
		if err := db.TouchKey(t.Context(), "k1", at); err != nil {
			t.Fatal(err)
		}
	}
	if got := must[[]store.Key](t)(db.Keys(t.Context())); len(got) != 1 || !got[0].LastUsedAt.Equal(epoch.Add(time.Hour)) {
		t.Errorf("keys are %+v", got)
	}
	if err := db.ReplaceKey(t.Context(), store.Key{ID: "k2", Name: "n", Hash: []byte("new"), CreatedAt: epoch}); err != nil {
		t.Fatal(err)
	}
	if got := must[[]store.Key](t)(db.Keys(t.Context())); len(got) != 1 || got[0].ID != "k2" {
		t.Errorf("after a replacement: %+v", got)
	}
	if err := db.DeleteKey(t.Context(), "k2"); err != nil {
		t.Fatal(err)
	}
	if err := db.DeleteKey(t.Context(), "k2"); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("a second delete: %v", err)
	}
}

func testReopen(t *testing.T, open Open) {
	db := open(t, "a")
	s := add(t, db, row(epoch))
	second := open(t, "a") // while the first is open still, as after a kill
	if got := must[store.Sandbox](t)(second.Sandbox(t.Context(), s.ID)); got.Version != 1 {
		t.Errorf("it came back as %+v", got)
	}
	must[store.Sandbox](t)(second.Running(t.Context(), s, epoch))
	if _, err := db.SetState(t.Context(), s, sandbox.Failed); !errors.Is(err, store.ErrStale) {
		t.Errorf("a writer that was thought dead wrote: %v", err)
	}
}

func testCancelled(t *testing.T, open Open) {
	db := open(t, "a")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := row(epoch)
	if _, _, err := db.CreateSandbox(ctx, s, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("add: %v", err)
	}
	if _, err := db.Sandbox(t.Context(), s.ID); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("it is there: %v", err)
	}
}

func testConcurrency(t *testing.T, open Open) {
	db := open(t, "a")
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			s := row(epoch.Add(time.Duration(i)))
			s, _, err := db.CreateSandbox(t.Context(), s, nil)
			if err == nil {
				s, err = db.Running(t.Context(), s, epoch)
			}
			if err == nil {
				_, err = db.End(t.Context(), s, sandbox.CauseTTL, "", epoch)
			}
			if err == nil {
				_, err = db.Sandboxes(t.Context(), store.Filter{Limit: 10})
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := must[map[sandbox.State]int](t)(db.CountByState(t.Context())); got[sandbox.Gone] != 40 {
		t.Errorf("counts are %v", got)
	}
}
