package store_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pressly/goose/v3"

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

// holds says in which of a database's files a secret is.
func holds(t *testing.T, path, secret string) (in []string) {
	t.Helper()
	for _, name := range []string{path, path + "-wal"} {
		b, err := os.ReadFile(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte(secret)) {
			in = append(in, name)
		}
	}
	return in
}

func withEnv(t *testing.T, db *store.DB, env map[string]string) store.Sandbox {
	t.Helper()
	s, _, err := db.CreateSandbox(t.Context(), store.Sandbox{
		ID: sandbox.NewID(), State: sandbox.Creating, Host: "h", CreatedAt: time.Now(), Spec: sandbox.Spec{Template: "base", Env: env},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSQLiteKeepsNoSecretOfWhatEnded(t *testing.T) {
	const secret = "hunter2hunter2"
	path := filepath.Join(t.TempDir(), "db")
	db := open(t, path)
	for _, env := range []string{secret, strings.Repeat(secret, 4000)} { // within a page, and over several
		s := withEnv(t, db, map[string]string{"TOKEN": env})
		if err := db.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		if len(holds(t, path, secret)) == 0 {
			t.Fatal("this test does not see what is in the file")
		}
		if _, err := db.End(t.Context(), s, sandbox.CauseUser, "", time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := db.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		if in := holds(t, path, secret); len(in) > 0 {
			t.Errorf("after the end the secret is in %v", in)
		}
	}
}

// A database of the version before kept environments for as long as the rows.
func TestSQLiteMigrationWipesWhatHasEnded(t *testing.T) {
	const secret, kept = "hunter2hunter2", "still-needed"
	path := filepath.Join(t.TempDir(), "db")
	db := open(t, path)
	ended, running := withEnv(t, db, nil), withEnv(t, db, map[string]string{"A": kept})
	if _, err := db.End(t.Context(), ended, sandbox.CauseVMMCrash, "", time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	schema, err := goose.NewProvider(goose.DialectSQLite3, raw, os.DirFS("migrations/sqlite"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := schema.DownTo(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if _, err := raw.Exec(`UPDATE sandboxes SET env = '{"TOKEN":"` + secret + `"}' WHERE id = '` + string(ended.ID) + `'`); err != nil {
		t.Fatal(err)
	}
	if err := raw.Close(); err != nil {
		t.Fatal(err)
	}
	db = open(t, path)
	if err := db.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	if in := holds(t, path, secret); len(in) > 0 {
		t.Errorf("after the migration the secret is in %v", in)
	}
	if s, err := db.Sandbox(t.Context(), running.ID); err != nil || s.Spec.Env["A"] != kept {
		t.Errorf("what has not ended has the environment %v, %v", s.Spec.Env, err)
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
