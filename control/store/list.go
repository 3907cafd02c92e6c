package store

import (
	"context"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Filter says which sandboxes to list.
type Filter struct {
	States   []sandbox.State // any of these; empty: every state
	Template string          // empty: any
	Metadata map[string]string
	Host     string // empty: any
	After    Cursor // where the page before ended
	Limit    int    // 0: no limit
}

// Cursor is a place in the list, which is sorted by age, newest first. It stays
// valid whatever is added or removed. The zero value is before everything.
type Cursor struct {
	CreatedAt time.Time
	ID        sandbox.ID
}

// String is the form in which a cursor travels.
func (c Cursor) String() string {
	if c.ID == "" {
		return ""
	}
	return base64.RawURLEncoding.EncodeToString([]byte(strconv.FormatInt(nanos(c.CreatedAt), 36) + "." + string(c.ID)))
}

// ParseCursor reads what String wrote, and nothing else.
func ParseCursor(s string) (Cursor, error) {
	if s == "" {
		return Cursor{}, nil
	}
	bad := sandbox.Errorf(sandbox.KindInvalid, "cursor is not one that a list has returned")
	const most = 128
	if len(s) > most {
		return Cursor{}, bad
	}
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		return Cursor{}, bad
	}
	at, id, ok := strings.Cut(string(b), ".")
	if !ok {
		return Cursor{}, bad
	}
	n, err := strconv.ParseInt(at, 36, 64)
	if err != nil || n <= 0 {
		return Cursor{}, bad
	}
	c := Cursor{CreatedAt: fromNanos(n)}
	if c.ID, err = sandbox.ParseID(id); err != nil || c.String() != s {
		return Cursor{}, bad
	}
	return c, nil
}

// CursorOf is the place of one sandbox.
func CursorOf(s Sandbox) Cursor { return Cursor{CreatedAt: s.CreatedAt, ID: s.ID} }

// Sandboxes lists what passes the filter, newest first.
func (d *DB) Sandboxes(ctx context.Context, f Filter) (_ []Sandbox, err error) {
	defer d.kind(&err)
	where, args := f.where()
	query := `SELECT ` + sandboxColumns + ` FROM sandboxes`
	if len(where) > 0 {
		query += ` WHERE ` + strings.Join(where, ` AND `)
	}
	query += ` ORDER BY created_at DESC, id DESC`
	if f.Limit > 0 {
		query += ` LIMIT ?`
		args = append(args, f.Limit)
	}
	rows, err := d.read.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	return scanAll(rows, "list sandboxes", func() (Sandbox, error) { return scanSandbox(rows) })
}

func (f Filter) where() (where []string, args []any) {
	if len(f.States) > 0 {
		where = append(where, `state IN (?`+strings.Repeat(`, ?`, len(f.States)-1)+`)`)
		for _, s := range f.States {
			args = append(args, string(s))
		}
	}
	if f.Template != "" {
		where, args = append(where, `template = ?`), append(args, f.Template)
	}
	if f.Host != "" {
		where, args = append(where, `host = ?`), append(args, f.Host)
	}
	for _, name := range slices.Sorted(maps.Keys(f.Metadata)) {
		where = append(where, `EXISTS (SELECT 1 FROM sandbox_metadata m WHERE m.sandbox_id = sandboxes.id AND m.name = ? AND m.value = ?)`)
		args = append(args, name, f.Metadata[name])
	}
	if f.After.ID != "" {
		at := nanos(f.After.CreatedAt)
		where = append(where, `(created_at < ? OR (created_at = ? AND id < ?))`)
		args = append(args, at, at, string(f.After.ID))
	}
	return where, args
}

// CountByState says how many sandboxes are in each state that occurs.
func (d *DB) CountByState(ctx context.Context) (_ map[sandbox.State]int, err error) {
	defer d.kind(&err)
	rows, err := d.read.QueryContext(ctx, `SELECT state, count(*) FROM sandboxes GROUP BY state`)
	if err != nil {
		return nil, fmt.Errorf("count sandboxes: %w", err)
	}
	defer func() { _ = rows.Close() }() // Err below reports what went wrong
	out := map[sandbox.State]int{}
	for rows.Next() {
		var state string
		var n int
		if err := rows.Scan(&state, &n); err != nil {
			return nil, fmt.Errorf("count sandboxes: %w", err)
		}
		out[sandbox.State(state)] = n
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("count sandboxes: %w", err)
	}
	return out, nil
}

// Forget deletes sandboxes that ended before then, oldest first and at most so
// many, and says how many it deleted.
func (d *DB) Forget(ctx context.Context, before time.Time, most int) (_ int64, err error) {
	defer d.kind(&err)
	res, err := d.write.ExecContext(ctx, `DELETE FROM sandboxes WHERE id IN (
		SELECT id FROM sandboxes WHERE ended_at > 0 AND ended_at < ? ORDER BY ended_at LIMIT ?)`, nanos(before), most)
	if err != nil {
		return 0, fmt.Errorf("forget ended sandboxes: %w", err)
	}
	return res.RowsAffected()
}

// ForgetIdempotency deletes idempotency keys made before then, at most so many.
func (d *DB) ForgetIdempotency(ctx context.Context, before time.Time, most int) (_ int64, err error) {
	defer d.kind(&err)
	res, err := d.write.ExecContext(ctx, `DELETE FROM idempotency WHERE (owner, key) IN (
		SELECT owner, key FROM idempotency WHERE created_at < ? ORDER BY created_at LIMIT ?)`, nanos(before), most)
	if err != nil {
		return 0, fmt.Errorf("forget idempotency keys: %w", err)
	}
	return res.RowsAffected()
}
