package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// CreateCopies adds the copies that one fork makes, all or none, in state
// Creating. They share the first one's ID as their group. When idem's key was used
// before with the same request, it adds nothing and returns the copies of that
// time, with made false.
func (d *DB) CreateCopies(ctx context.Context, copies []Sandbox, idem *Idempotency) (_ []Sandbox, made bool, err error) {
	if len(copies) == 0 {
		return nil, false, errors.New("add copies: there are none")
	}
	out := make([]Sandbox, len(copies))
	for i, s := range copies {
		if s.State != sandbox.Creating {
			return nil, false, fmt.Errorf("add copies: the state of one is %s, a new one is %s", s.State, sandbox.Creating)
		}
		s.Version, s.ForkGroup, s.ForkIndex = 1, copies[0].ID, i
		out[i] = s
	}
	err = d.inTx(ctx, func(tx *sql.Tx) error {
		if idem != nil {
			earlier, err := findIdempotent(ctx, tx, *idem, out[0].CreatedAt)
			if err != nil {
				return err
			}
			if earlier != "" {
				out, err = copiesOf(ctx, tx, earlier)
				return err
			}
		}
		made = true
		for _, s := range out {
			if err := insertSandbox(ctx, tx, s); err != nil {
				return err
			}
		}
		return insertIdempotent(ctx, tx, idem, out[0])
	})
	if err != nil {
		return nil, false, err
	}
	return out, made, nil
}

// RepeatedFork returns the copies that an earlier fork with this key and this
// request made, in their order, and whether there was one.
func (d *DB) RepeatedFork(ctx context.Context, idem Idempotency, now time.Time) (_ []Sandbox, _ bool, err error) {
	defer d.kind(&err)
	id, err := findIdempotent(ctx, d.read, idem, now)
	if err != nil || id == "" {
		return nil, false, err
	}
	copies, err := copiesOf(ctx, d.read, id)
	return copies, err == nil, err
}

// Copies lists the copies that one fork made, in their order.
func (d *DB) Copies(ctx context.Context, group sandbox.ID) (_ []Sandbox, err error) {
	defer d.kind(&err)
	return copiesOf(ctx, d.read, group)
}

func copiesOf(ctx context.Context, q querier, group sandbox.ID) ([]Sandbox, error) {
	rows, err := q.QueryContext(ctx,
		`SELECT `+sandboxColumns+` FROM sandboxes WHERE fork_group = ? AND fork_group <> '' ORDER BY fork_index`, string(group))
	if err != nil {
		return nil, fmt.Errorf("list copies: %w", err)
	}
	return scanAll(rows, "list copies", func() (Sandbox, error) { return scanSandbox(rows) })
}

// scanAll reads every row, and closes them.
func scanAll[T any](rows *sql.Rows, what string, scan func() (T, error)) ([]T, error) {
	defer func() { _ = rows.Close() }() // Err below reports what went wrong
	var out []T
	for rows.Next() {
		one, err := scan()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		out = append(out, one)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return out, nil
}
