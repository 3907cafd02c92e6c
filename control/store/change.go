package store

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// MaxCauseDetail bounds what is kept about an end: the tail of a console fits.
const MaxCauseDetail = 16 << 10

// SetState moves the sandbox from the state and version in s to next. It
// returns the sandbox as it is afterwards, or ErrStale.
func (d *DB) SetState(ctx context.Context, s Sandbox, next sandbox.State) (Sandbox, error) {
	return d.change(ctx, s, func(n *Sandbox) { n.State = next })
}

// Running moves a sandbox whose create has succeeded to Running, with the
// deadline that the host keeps.
func (d *DB) Running(ctx context.Context, s Sandbox, deadline time.Time) (Sandbox, error) {
	return d.change(ctx, s, func(n *Sandbox) { n.State, n.Deadline = sandbox.Running, deadline })
}

// Destroying moves the sandbox to Destroying and notes what for.
func (d *DB) Destroying(ctx context.Context, s Sandbox, cause sandbox.Cause) (Sandbox, error) {
	return d.change(ctx, s, func(n *Sandbox) { n.State, n.Cause = sandbox.Destroying, cause })
}

// SetDeadline records when the host will destroy the sandbox.
func (d *DB) SetDeadline(ctx context.Context, s Sandbox, deadline time.Time) (Sandbox, error) {
	return d.change(ctx, s, func(n *Sandbox) { n.Deadline = deadline })
}

// End moves the sandbox to the state in which one with this cause rests, and
// records the cause for as long as the row is kept. One that is to rest in Gone
// passes through Destroying in the same transaction.
func (d *DB) End(ctx context.Context, s Sandbox, cause sandbox.Cause, detail string, at time.Time) (Sandbox, error) {
	if !cause.Valid() {
		return Sandbox{}, fmt.Errorf("end sandbox %s: %q is not a cause", s.ID, cause)
	}
	return d.change(ctx, s,
		func(n *Sandbox) {
			if cause.End() == sandbox.Gone {
				n.State = sandbox.Destroying
			}
		},
		func(n *Sandbox) {
			n.State, n.Cause, n.CauseDetail, n.EndedAt = cause.End(), cause, cutDetail(detail), at
		})
}

// change applies edits one after the other, each a step that the state machine
// must allow, and writes the outcome if nobody else changed the row.
func (d *DB) change(ctx context.Context, s Sandbox, edits ...func(*Sandbox)) (Sandbox, error) {
	if s.State.Ended() {
		return Sandbox{}, sandbox.Errorf(sandbox.KindConflict, "sandbox %s is %s and stays so", s.ID, s.State)
	}
	next := s
	for _, edit := range edits {
		before := next.State
		edit(&next)
		if next.State != before && !before.CanBecome(next.State) {
			return Sandbox{}, sandbox.Errorf(sandbox.KindConflict, "sandbox %s is %s and cannot become %s", s.ID, before, next.State)
		}
	}
	next.Version = s.Version + 1
	err := d.inTx(ctx, func(tx *sql.Tx) error {
		res, err := tx.ExecContext(ctx,
			`UPDATE sandboxes SET state = ?, version = ?, cause = ?, cause_detail = ?, deadline = ?, ended_at = ?
			 WHERE id = ? AND state = ? AND version = ?`,
			string(next.State), next.Version, string(next.Cause), next.CauseDetail, nanos(next.Deadline), nanos(next.EndedAt),
			string(s.ID), string(s.State), s.Version)
		if err != nil {
			return fmt.Errorf("change sandbox %s: %w", s.ID, err)
		}
		n, err := res.RowsAffected()
		if err != nil {
			return fmt.Errorf("change sandbox %s: %w", s.ID, err)
		}
		if n == 1 {
			return nil
		}
		if _, err := getSandbox(ctx, tx, s.ID); err != nil {
			return err
		}
		return ErrStale
	})
	if err != nil {
		return Sandbox{}, err
	}
	return next, nil
}

// cutDetail keeps the end, which is where a console says why.
func cutDetail(s string) string {
	if len(s) > MaxCauseDetail {
		s = "…" + s[len(s)-MaxCauseDetail+len("…"):]
	}
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, "�")
	}
	return s
}
