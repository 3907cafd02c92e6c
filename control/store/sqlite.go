package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"

	"github.com/pressly/goose/v3"
	_ "modernc.org/sqlite" // the driver "sqlite"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

//go:embed migrations
var migrations embed.FS

// readers is how many queries SQLite answers at once; in WAL mode none of them
// waits for the writer.
const readers = 8

// OpenSQLite opens the database in a file, making it if it is not there, and
// brings it to the newest schema. Another process may have it open too, to make
// a key for example: SQLite's locks put the writers in order.
func OpenSQLite(ctx context.Context, path string) (_ *DB, err error) {
	d := &DB{path: path}
	defer d.kind(&err)
	if err := ownFile(path); err != nil {
		return nil, err
	}
	write, err := sql.Open("sqlite", sqliteURL(path, "rwc"))
	if err != nil {
		return nil, fmt.Errorf("open database %s: %w", path, err)
	}
	d.write, d.read = write, write
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	write.SetMaxOpenConns(1)
	if err := migrate(ctx, write); err != nil {
		return nil, fmt.Errorf("open database %s: %w", path, err)
	}
	read, err := sql.Open("sqlite", sqliteURL(path, "ro"))
	if err != nil {
		return nil, fmt.Errorf("open database %s: %w", path, err)
	}
	read.SetMaxOpenConns(readers)
	read.SetMaxIdleConns(readers)
	d.read = read
	return d, nil
}

// ownFile makes the file if need be. It holds the hashes of keys and the
// environments of sandboxes, so nobody else reads it; SQLite gives its -wal and
// -shm files the same mode.
func ownFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open database: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("open database: %w", err)
	}
	return nil
}

// sqliteURL asks for a log that is on disk before a commit returns
// (synchronous=FULL in WAL mode), for real foreign keys, and for transactions
// that take the write lock when they begin. What is deleted is overwritten with
// zeros, so that no secret stays in a free page.
func sqliteURL(path, mode string) string {
	q := url.Values{
		"mode":    {mode},
		"_txlock": {"immediate"},
		"_pragma": {"busy_timeout(10000)", "foreign_keys(1)", "synchronous(FULL)"},
	}
	if mode == "ro" {
		q.Set("_txlock", "deferred")
		q["_pragma"] = append(q["_pragma"], "query_only(1)")
	} else {
		q["_pragma"] = append(q["_pragma"], "journal_mode(WAL)", "secure_delete(1)")
	}
	u := url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: q.Encode()}
	return u.String()
}

// Checkpoint moves what is in the log into the database and empties the log,
// which has old pages in it: also those with what was wiped since.
func (d *DB) Checkpoint(ctx context.Context) (err error) {
	defer d.kind(&err)
	var busy, frames, moved int
	if err := d.write.QueryRowContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)").Scan(&busy, &frames, &moved); err != nil {
		return fmt.Errorf("checkpoint database: %w", err)
	}
	return nil // a reader that is in the way now is not the next time
}

// migrate refuses a database that a newer version of us has already changed.
func migrate(ctx context.Context, db *sql.DB) error {
	dir, err := fs.Sub(migrations, "migrations/sqlite")
	if err != nil {
		return fmt.Errorf("find migrations: %w", err)
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, db, dir)
	if err != nil {
		return fmt.Errorf("read migrations: %w", err)
	}
	have, want, err := p.GetVersions(ctx)
	if err != nil {
		return fmt.Errorf("read schema version: %w", err)
	}
	if have > want {
		return sandbox.Errorf(sandbox.KindUnsupported,
			"its schema has version %d and this program knows versions up to %d: use a newer program", have, want)
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("change schema: %w", err)
	}
	return nil
}
