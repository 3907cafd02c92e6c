// Package store is the database of the control plane: the sandboxes and snapshots
// that were asked for, the API keys, and which idempotency key made what.
//
// It promises that a state changes only by compare-and-set on (state, version)
// and only along sandbox.State.CanBecome; that every method is one transaction,
// durable when it returns, so that a process killed between any two of them
// leaves a state that the reconciler can go on from; and that the record of an
// ended sandbox stays until its retention is over. On a full disk it answers
// no_space, keeps what it has, and goes on once there is room. It knows nothing of
// hosts or HTTP.
//
// SQLite is the one database for now. What differs between databases is in
// sqlite.go and migrations/; package storetest says what another one must do.
package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// DB is an open database. It is safe for concurrent use.
type DB struct {
	write *sql.DB // one connection, so that writers queue here and not in busy loops
	read  *sql.DB
	path  string // of the file
}

// Close closes the database. It may be called twice.
func (d *DB) Close() error {
	return errors.Join(d.read.Close(), d.write.Close())
}

// Ping reports whether the database can be read.
func (d *DB) Ping(ctx context.Context) error { return d.read.PingContext(ctx) }

// inTx runs fn in one transaction. fn's error undoes it.
func (d *DB) inTx(ctx context.Context, fn func(*sql.Tx) error) (err error) {
	defer d.kind(&err)
	tx, err := d.write.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("begin transaction: %w", err)
	}
	if err := fn(tx); err != nil {
		_ = tx.Rollback() // fn's error says what went wrong
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("commit transaction: %w", err)
	}
	return nil
}

// Conditions that callers look for with errors.Is.
var (
	// ErrStale means that somebody else changed the row since it was read.
	ErrStale = sandbox.Errorf(sandbox.KindConflict, "it was changed by somebody else meanwhile")
	// ErrReused means that an idempotency key came back with another request.
	ErrReused = sandbox.Errorf(sandbox.KindConflict, "the idempotency key was used before, with another request")
)

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromNanos(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}
