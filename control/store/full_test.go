package store_test

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/control/store/storetest"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// big is a sandbox that takes 40 kB.
func big() store.Sandbox {
	return store.Sandbox{
		ID: sandbox.NewID(), State: sandbox.Creating, Host: "h", CreatedAt: time.Now().UTC(), Metadata: map[string]string{},
		Spec: sandbox.Spec{Template: "base", Env: map[string]string{"A": strings.Repeat("x", 40_000)}},
	}
}

// fillUp adds sandboxes until there is no room, and returns those that are on
// record.
func fillUp(t *testing.T, db *store.DB) (have []store.Sandbox) {
	t.Helper()
	for range 1000 {
		s, made, err := db.CreateSandbox(t.Context(), big(), nil)
		if err == nil && made {
			have = append([]store.Sandbox{s}, have...)
			continue
		}
		if !sandbox.Is(err, sandbox.KindNoSpace) || !strings.Contains(err.Error(), "disk of the control plane's database is full") {
			t.Fatalf("a full disk is %s: %v", sandbox.KindOf(err), err)
		}
		return have
	}
	t.Fatal("the disk was never full")
	return nil
}

func wantRows(t *testing.T, db *store.DB, want []store.Sandbox) {
	t.Helper()
	got, err := db.Sandboxes(t.Context(), store.Filter{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rows (-want +got):\n%s", diff)
	}
}

func TestAFullDatabaseLosesNothing(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "db"))
	if err := db.LimitPages(t.Context(), 200); err != nil {
		t.Fatal(err)
	}
	have := fillUp(t, db)
	wantRows(t, db, have)
	if err := db.LimitPages(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	s, _, err := db.CreateSandbox(t.Context(), big(), nil)
	if err != nil {
		t.Fatal(err)
	}
	wantRows(t, db, append([]store.Sandbox{s}, have...))
}

func TestAFullDiskLosesNothing(t *testing.T) {
	dir := storetest.SmallDisk(t, 4<<20)
	path := filepath.Join(dir, "db")
	db := open(t, path)
	first, _, err := db.CreateSandbox(t.Context(), big(), nil)
	if err != nil {
		t.Fatal(err)
	}
	empty := storetest.Fill(t, dir)
	have := append(fillUp(t, db), first)
	wantRows(t, db, have)
	for range 3 { // SQLite undoes the transaction by itself; the next one must not suffer from it
		if more := fillUp(t, db); len(more) > 0 {
			have = append(more, have...)
		}
	}
	if _, err := store.OpenSQLite(t.Context(), filepath.Join(dir, "another")); !sandbox.Is(err, sandbox.KindNoSpace) {
		t.Errorf("a new database on a full disk is %s: %v", sandbox.KindOf(err), err)
	}
	empty()
	s, _, err := db.CreateSandbox(t.Context(), big(), nil)
	if err != nil {
		t.Fatal(err)
	}
	have = append([]store.Sandbox{s}, have...)
	wantRows(t, db, have)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	wantRows(t, open(t, path), have)
}
