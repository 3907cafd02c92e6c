package store_test

import (
	"context"
	"database/sql"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/control/store/storetest"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func open(t *testing.T, path string) *store.DB {
	t.Helper()
	db, err := store.OpenSQLite(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for range 2 { // Close may be called twice
			if err := db.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return db
}

func TestSQLite(t *testing.T) {
	dirs := map[*testing.T]string{}
	storetest.Run(t, func(t *testing.T, name string) *store.DB {
		if dirs[t] == "" {
			dirs[t] = t.TempDir()
		}
		return open(t, filepath.Join(dirs[t], "a b?#%41 "+name))
	})
}

func TestSQLiteIsDurableAndPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	db := open(t, path)
	if err := db.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{path, path + "-wal", path + "-shm"} {
		info, err := os.Stat(name)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v, want mode 0600", name, info, err)
		}
	}
	raw, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = raw.Close() }() // nothing was written to it
	var mode string
	if err := raw.QueryRow("PRAGMA journal_mode").Scan(&mode); err != nil || mode != "wal" {
		t.Errorf("journal mode is %q, %v", mode, err)
	}
}

func TestSQLiteRefusesANewerSchema(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	open(t, path)
	raw, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = raw.Close() }() // nothing was written to it
	if _, err := raw.Exec("INSERT INTO goose_db_version (version_id, is_applied) VALUES (99, 1)"); err != nil {
		t.Fatal(err)
	}
	if _, err := store.OpenSQLite(context.Background(), path); !sandbox.Is(err, sandbox.KindUnsupported) {
		t.Errorf("a newer schema: %v", err)
	}
}

func FuzzCursor(f *testing.F) {
	f.Add("")
	f.Add("abc")
	f.Add(store.Cursor{CreatedAt: time.Unix(1, 2), ID: sandbox.NewID()}.String())
	f.Fuzz(func(t *testing.T, s string) {
		c, err := store.ParseCursor(s)
		if err != nil {
			if !sandbox.Is(err, sandbox.KindInvalid) {
				t.Errorf("%q: %v", s, err)
			}
			return
		}
		if c.String() != s {
			t.Errorf("%q came back as %q", s, c)
		}
	})
}
