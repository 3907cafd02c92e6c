package store

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Sandbox is one row: what was asked for, and what is known of it.
type Sandbox struct {
	ID          sandbox.ID
	State       sandbox.State
	Version     int64 // grows by one with every change
	Host        string
	Spec        sandbox.Spec
	Metadata    map[string]string
	Cause       sandbox.Cause // also while destroying: what the destroy was asked for
	CauseDetail string
	CreatedAt   time.Time
	Deadline    time.Time // zero: none
	EndedAt     time.Time // zero: it has not ended
	Frozen      sandbox.Freeze

	Timeout    time.Duration // how long it may run after a create or a resume
	AutoPause  time.Duration // after how long without activity its host pauses it; 0: never
	AutoResume bool          // whether a call resumes it

	Work // on the change of state that is under way

	Saved       Saved
	PausedAt    time.Time // zero: it is not paused
	PauseReason sandbox.PauseReason
	PauseError  string        // why its last automatic pause failed
	Start       sandbox.Start // how it last came to run; empty: its host has not said

	ForkedFrom sandbox.ID // the sandbox that it is a copy of
	ForkGroup  sandbox.ID // the first copy that the same fork made
	ForkIndex  int        // its place among these
}

// Work says who is at a change of state, and until when. Whoever finds it later
// than that may undo or finish it.
type Work struct {
	Owner string
	Until time.Time
}

// Idempotency ties a create to a key that its caller chose.
type Idempotency struct {
	Owner string // the API key's ID: keys of different owners never meet
	Key   string
	Hash  []byte // of the request; the same key with another hash is ErrReused
	TTL   time.Duration
}

// CreateSandbox adds a sandbox in state Creating. When idem's key was used
// before with the same request, it adds nothing and returns the sandbox of that
// time, with made false. A nil idem always adds.
func (d *DB) CreateSandbox(ctx context.Context, s Sandbox, idem *Idempotency) (_ Sandbox, made bool, err error) {
	if s.State != sandbox.Creating {
		return Sandbox{}, false, fmt.Errorf("add sandbox: its state is %s, a new one is %s", s.State, sandbox.Creating)
	}
	s.Version = 1
	out := s
	err = d.inTx(ctx, func(tx *sql.Tx) error {
		if idem != nil {
			earlier, err := findIdempotent(ctx, tx, *idem, s.CreatedAt)
			if err != nil {
				return err
			}
			if earlier != "" {
				out, err = getSandbox(ctx, tx, earlier)
				return err
			}
		}
		made = true
		if err := insertSandbox(ctx, tx, s); err != nil {
			return err
		}
		return insertIdempotent(ctx, tx, idem, s)
	})
	if err != nil {
		return Sandbox{}, false, err
	}
	return out, made, nil
}

// Repeated returns the sandbox that an earlier create with this key and this
// request made, and whether there was one.
func (d *DB) Repeated(ctx context.Context, idem Idempotency, now time.Time) (_ Sandbox, _ bool, err error) {
	defer d.kind(&err)
	id, err := findIdempotent(ctx, d.read, idem, now)
	if err != nil || id == "" {
		return Sandbox{}, false, err
	}
	s, err := getSandbox(ctx, d.read, id)
	return s, err == nil, err
}

// findIdempotent returns no ID when the key is unknown or too old.
func findIdempotent(ctx context.Context, q querier, idem Idempotency, now time.Time) (sandbox.ID, error) {
	var id string
	var hash []byte
	var at int64
	err := q.QueryRowContext(ctx,
		`SELECT sandbox_id, request_hash, created_at FROM idempotency WHERE owner = ? AND key = ?`,
		idem.Owner, idem.Key).Scan(&id, &hash, &at)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return "", nil
	case err != nil:
		return "", fmt.Errorf("look up idempotency key: %w", err)
	case now.Sub(fromNanos(at)) >= idem.TTL:
		return "", nil
	case !bytes.Equal(hash, idem.Hash):
		return "", ErrReused
	}
	return sandbox.ID(id), nil
}

func insertIdempotent(ctx context.Context, tx *sql.Tx, idem *Idempotency, s Sandbox) error {
	if idem == nil {
		return nil
	}
	_, err := tx.ExecContext(ctx, `DELETE FROM idempotency WHERE owner = ? AND key = ?`, idem.Owner, idem.Key)
	if err != nil {
		return fmt.Errorf("expire idempotency key: %w", err)
	}
	_, err = tx.ExecContext(ctx,
		`INSERT INTO idempotency (owner, key, request_hash, sandbox_id, created_at) VALUES (?, ?, ?, ?, ?)`,
		idem.Owner, idem.Key, idem.Hash, string(s.ID), nanos(s.CreatedAt))
	if err != nil {
		return fmt.Errorf("add idempotency key: %w", err)
	}
	return nil
}

const sandboxColumns = `id, state, version, host, template, vcpus, mem_mib, disk_mib, internet, env, metadata,
	cause, cause_detail, created_at, deadline, ended_at, frozen, timeout, auto_pause, auto_resume, owner, until,
	saved, paused_at, pause_reason, pause_error, started_by, forked_from, fork_group, fork_index`

func insertSandbox(ctx context.Context, tx *sql.Tx, s Sandbox) error {
	env, err := encodeMap("environment", s.Spec.Env)
	if err != nil {
		return err
	}
	meta, err := encodeMap("metadata", s.Metadata)
	if err != nil {
		return err
	}
	saved, err := encodeSaved(s.Saved)
	if err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `INSERT INTO sandboxes (`+sandboxColumns+`)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		string(s.ID), string(s.State), s.Version, s.Host, s.Spec.Template, s.Spec.VCPUs, s.Spec.MemMiB, s.Spec.DiskMiB,
		flag(s.Spec.Network.Internet), env, meta, string(s.Cause), s.CauseDetail,
		nanos(s.CreatedAt), nanos(s.Deadline), nanos(s.EndedAt), string(s.Frozen),
		int64(s.Timeout), int64(s.AutoPause), flag(s.AutoResume), s.Owner, nanos(s.Until),
		saved, nanos(s.PausedAt), string(s.PauseReason), s.PauseError, string(s.Start),
		string(s.ForkedFrom), string(s.ForkGroup), s.ForkIndex)
	if err != nil {
		return fmt.Errorf("add sandbox: %w", err)
	}
	for name, value := range s.Metadata {
		_, err := tx.ExecContext(ctx, `INSERT INTO sandbox_metadata (sandbox_id, name, value) VALUES (?, ?, ?)`,
			string(s.ID), name, value)
		if err != nil {
			return fmt.Errorf("add metadata: %w", err)
		}
	}
	return nil
}

func encodeMap(what string, m map[string]string) (string, error) {
	b, err := json.Marshal(orEmpty(m))
	if err != nil {
		return "", fmt.Errorf("encode %s: %w", what, err)
	}
	return string(b), nil
}

// flag is how a database keeps a bool.
func flag(b bool) int {
	if b {
		return 1
	}
	return 0
}

func orEmpty(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

// querier is what a database and a transaction have in common.
type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// Sandbox returns one sandbox, also an ended one.
func (d *DB) Sandbox(ctx context.Context, id sandbox.ID) (_ Sandbox, err error) {
	defer d.kind(&err)
	return getSandbox(ctx, d.read, id)
}

func getSandbox(ctx context.Context, q querier, id sandbox.ID) (Sandbox, error) {
	s, err := scanSandbox(q.QueryRowContext(ctx, `SELECT `+sandboxColumns+` FROM sandboxes WHERE id = ?`, string(id)))
	if errors.Is(err, sql.ErrNoRows) {
		return Sandbox{}, sandbox.Errorf(sandbox.KindNotFound, "there is no sandbox %s", id)
	}
	if err != nil {
		return Sandbox{}, fmt.Errorf("read sandbox %s: %w", id, err)
	}
	return s, nil
}

func scanSandbox(row interface{ Scan(dest ...any) error }) (Sandbox, error) {
	var s Sandbox
	var env, meta, saved string
	var internet, autoResume, created, deadline, ended, until, paused int64
	err := row.Scan(&s.ID, &s.State, &s.Version, &s.Host, &s.Spec.Template, &s.Spec.VCPUs, &s.Spec.MemMiB, &s.Spec.DiskMiB,
		&internet, &env, &meta, &s.Cause, &s.CauseDetail, &created, &deadline, &ended, &s.Frozen,
		&s.Timeout, &s.AutoPause, &autoResume, &s.Owner, &until,
		&saved, &paused, &s.PauseReason, &s.PauseError, &s.Start, &s.ForkedFrom, &s.ForkGroup, &s.ForkIndex)
	if err != nil {
		return Sandbox{}, err
	}
	s.Spec.Network.Internet, s.AutoResume = internet != 0, autoResume != 0
	s.CreatedAt, s.Deadline, s.EndedAt = fromNanos(created), fromNanos(deadline), fromNanos(ended)
	s.Until, s.PausedAt = fromNanos(until), fromNanos(paused)
	if s.Saved, err = decodeSaved(saved); err != nil {
		return Sandbox{}, err
	}
	if err := json.Unmarshal([]byte(env), &s.Spec.Env); err != nil {
		return Sandbox{}, fmt.Errorf("decode environment: %w", err)
	}
	if err := json.Unmarshal([]byte(meta), &s.Metadata); err != nil {
		return Sandbox{}, fmt.Errorf("decode metadata: %w", err)
	}
	return s, nil
}
