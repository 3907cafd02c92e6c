package store

import (
	"context"
	"database/sql"
	"fmt"
	"maps"
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

// Begin moves the sandbox to a state in which somebody works on it: Pausing or
// Resuming. Whatever state comes next takes the work off the record.
func (d *DB) Begin(ctx context.Context, s Sandbox, next sandbox.State, w Work) (Sandbox, error) {
	return d.change(ctx, s, func(n *Sandbox) { n.State, n.Work = next, w })
}

// Run is what is recorded of a sandbox that has come to run. What is zero stays
// as it was.
type Run struct {
	Deadline time.Time // that the host keeps
	Timeout  time.Duration
	Start    sandbox.Start
	Env      map[string]string // added to what it had
}

// Running moves a sandbox whose create has succeeded to Running, with the
// deadline that the host keeps.
func (d *DB) Running(ctx context.Context, s Sandbox, deadline time.Time) (Sandbox, error) {
	return d.Runs(ctx, s, Run{Deadline: deadline})
}

// Runs moves a sandbox that runs to Running, through the states that lie between
// if the host has gone ahead of the database.
func (d *DB) Runs(ctx context.Context, s Sandbox, r Run) (Sandbox, error) {
	edits := through(s.State, sandbox.Running)
	return d.change(ctx, s, append(edits, func(n *Sandbox) {
		n.State, n.PausedAt, n.PauseReason = sandbox.Running, time.Time{}, ""
		if !r.Deadline.IsZero() {
			n.Deadline = r.Deadline
		}
		if r.Timeout > 0 {
			n.Timeout = r.Timeout
		}
		if r.Start != "" {
			n.Start = r.Start
		}
		n.Spec.Env = merged(n.Spec.Env, r.Env)
	})...)
}

// Pause is what is recorded of a sandbox that is paused.
type Pause struct {
	Saved  Saved
	At     time.Time
	Reason sandbox.PauseReason
}

// Paused moves the sandbox to Paused, through the states that lie between if its
// host has paused it by itself. A paused sandbox has no deadline.
func (d *DB) Paused(ctx context.Context, s Sandbox, p Pause) (Sandbox, error) {
	edits := through(s.State, sandbox.Paused)
	return d.change(ctx, s, append(edits, func(n *Sandbox) {
		n.State, n.Saved, n.PausedAt, n.PauseReason = sandbox.Paused, p.Saved, p.At, p.Reason
		n.Deadline, n.PauseError, n.Frozen = time.Time{}, "", ""
	})...)
}

// through lists the steps that the state machine wants between two states of a
// sandbox whose host has gone ahead of its record.
func through(from, to sandbox.State) (edits []func(*Sandbox)) {
	var between []sandbox.State
	switch {
	case to == sandbox.Running && from == sandbox.Paused:
		between = []sandbox.State{sandbox.Resuming}
	case to == sandbox.Paused && from == sandbox.Creating:
		between = []sandbox.State{sandbox.Running, sandbox.Pausing}
	case to == sandbox.Paused && from == sandbox.Running:
		between = []sandbox.State{sandbox.Pausing}
	}
	for _, state := range between {
		edits = append(edits, func(n *Sandbox) { n.State = state })
	}
	return edits
}

// StillPaused moves a sandbox whose resume came to nothing back to Paused; its
// pause point is what it was.
func (d *DB) StillPaused(ctx context.Context, s Sandbox) (Sandbox, error) {
	return d.change(ctx, s, func(n *Sandbox) { n.State = sandbox.Paused })
}

// Destroying moves the sandbox to Destroying and notes what for.
func (d *DB) Destroying(ctx context.Context, s Sandbox, cause sandbox.Cause) (Sandbox, error) {
	return d.change(ctx, s, func(n *Sandbox) { n.State, n.Cause = sandbox.Destroying, cause })
}

// SetDeadline records when the host will destroy the sandbox.
func (d *DB) SetDeadline(ctx context.Context, s Sandbox, deadline time.Time) (Sandbox, error) {
	return d.change(ctx, s, func(n *Sandbox) { n.Deadline = deadline })
}

// Limits are what a sandbox may do by itself. What is nil stays as it was.
type Limits struct {
	Deadline   *time.Time
	Timeout    *time.Duration
	AutoPause  *time.Duration
	AutoResume *bool
}

// SetLimits records limits.
func (d *DB) SetLimits(ctx context.Context, s Sandbox, l Limits) (Sandbox, error) {
	return d.change(ctx, s, func(n *Sandbox) {
		set(&n.Deadline, l.Deadline)
		set(&n.Timeout, l.Timeout)
		set(&n.AutoPause, l.AutoPause)
		set(&n.AutoResume, l.AutoResume)
	})
}

func set[T any](field, value *T) {
	if value != nil {
		*field = *value
	}
}

// SetFrozen records that a running sandbox stands still, and why, or that it
// goes on.
func (d *DB) SetFrozen(ctx context.Context, s Sandbox, why sandbox.Freeze) (Sandbox, error) {
	return d.change(ctx, s, func(n *Sandbox) { n.Frozen = why })
}

// SetSaved records which pause point is kept, and why the last automatic pause
// failed, if it did.
func (d *DB) SetSaved(ctx context.Context, s Sandbox, saved Saved, pauseError string) (Sandbox, error) {
	return d.change(ctx, s, func(n *Sandbox) { n.Saved, n.PauseError = saved, cutDetail(pauseError) })
}

// End moves the sandbox to the state in which one with this cause rests, and
// records the cause for as long as the row is kept. One that is to rest in Gone
// passes through Destroying in the same transaction. Its environment, which may
// hold secrets, is wiped from the row: nothing starts it again, and a repeated
// create is recognised by the hash of its request.
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
			n.Spec.Env, n.Frozen = map[string]string{}, ""
			n.Saved, n.PausedAt, n.PauseReason, n.PauseError = Saved{}, time.Time{}, "", "" // nothing of it is kept
		})
}

// change applies edits one after the other, each a step that the state machine
// must allow, and writes the outcome if nobody else changed the row.
func (d *DB) change(ctx context.Context, s Sandbox, edits ...func(*Sandbox)) (Sandbox, error) {
	next, err := edited(s, edits)
	if err != nil {
		return Sandbox{}, err
	}
	err = d.inTx(ctx, func(tx *sql.Tx) error {
		changed, err := updateSandbox(ctx, tx, s, next)
		if err != nil || changed {
			return err
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

func edited(s Sandbox, edits []func(*Sandbox)) (Sandbox, error) {
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
	if next.State != s.State && next.Work == s.Work {
		next.Work = Work{}
	}
	next.Version = s.Version + 1
	return next, nil
}

// updateSandbox writes what can change of a row, if it is still the one that was
// read.
func updateSandbox(ctx context.Context, tx *sql.Tx, was, next Sandbox) (bool, error) {
	env, err := encodeMap("environment", next.Spec.Env)
	if err != nil {
		return false, err
	}
	newEnv := next.State.Ended() || !maps.Equal(was.Spec.Env, next.Spec.Env)
	saved, err := encodeSaved(next.Saved)
	if err != nil {
		return false, err
	}
	res, err := tx.ExecContext(ctx,
		`UPDATE sandboxes SET state = ?, version = ?, cause = ?, cause_detail = ?, deadline = ?, ended_at = ?, frozen = ?,
			env = CASE WHEN ? THEN ? ELSE env END,
			timeout = ?, auto_pause = ?, auto_resume = ?, owner = ?, until = ?,
			saved = ?, paused_at = ?, pause_reason = ?, pause_error = ?, started_by = ?
		 WHERE id = ? AND state = ? AND version = ?`,
		string(next.State), next.Version, string(next.Cause), next.CauseDetail, nanos(next.Deadline), nanos(next.EndedAt), string(next.Frozen), newEnv, env,
		int64(next.Timeout), int64(next.AutoPause), flag(next.AutoResume), next.Owner, nanos(next.Until),
		saved, nanos(next.PausedAt), string(next.PauseReason), next.PauseError, string(next.Start),
		string(was.ID), string(was.State), was.Version)
	if err != nil {
		return false, fmt.Errorf("change sandbox %s: %w", was.ID, err)
	}
	n, err := res.RowsAffected()
	if err != nil {
		return false, fmt.Errorf("change sandbox %s: %w", was.ID, err)
	}
	return n == 1, nil
}

// merged is a map with another one on top; neither is changed.
func merged(under, over map[string]string) map[string]string {
	if len(over) == 0 {
		return under
	}
	out := maps.Clone(orEmpty(under))
	maps.Copy(out, over)
	return out
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
