package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Key is an API key as it is stored: of its secret only the hash.
type Key struct {
	ID         string
	Name       string
	Prefix     string
	Hash       []byte
	CreatedAt  time.Time
	LastUsedAt time.Time // zero: never
}

const keyColumns = `id, name, prefix, hash, created_at, last_used_at`

// AddKey adds a key.
func (d *DB) AddKey(ctx context.Context, k Key) (err error) {
	defer d.kind(&err)
	return addKey(ctx, d.write, k)
}

// ReplaceKey adds a key in place of all others of the same name.
func (d *DB) ReplaceKey(ctx context.Context, k Key) error {
	return d.inTx(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `DELETE FROM api_keys WHERE name = ?`, k.Name); err != nil {
			return fmt.Errorf("replace API key: %w", err)
		}
		return addKey(ctx, tx, k)
	})
}

// execer is what a database and a transaction have in common.
type execer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}

func addKey(ctx context.Context, db execer, k Key) error {
	_, err := db.ExecContext(ctx, `INSERT INTO api_keys (`+keyColumns+`) VALUES (?, ?, ?, ?, ?, ?)`,
		k.ID, k.Name, k.Prefix, k.Hash, nanos(k.CreatedAt), nanos(k.LastUsedAt))
	if err != nil {
		return fmt.Errorf("add API key: %w", err)
	}
	return nil
}

// KeyByHash finds the key whose secret has this hash.
func (d *DB) KeyByHash(ctx context.Context, hash []byte) (_ Key, err error) {
	defer d.kind(&err)
	k, err := scanKey(d.read.QueryRowContext(ctx, `SELECT `+keyColumns+` FROM api_keys WHERE hash = ?`, hash))
	if errors.Is(err, sql.ErrNoRows) {
		return Key{}, sandbox.Errorf(sandbox.KindNotFound, "there is no such API key")
	}
	if err != nil {
		return Key{}, fmt.Errorf("read API key: %w", err)
	}
	return k, nil
}

// Keys lists every key, oldest first.
func (d *DB) Keys(ctx context.Context) (_ []Key, err error) {
	defer d.kind(&err)
	rows, err := d.read.QueryContext(ctx, `SELECT `+keyColumns+` FROM api_keys ORDER BY created_at, id`)
	if err != nil {
		return nil, fmt.Errorf("list API keys: %w", err)
	}
	defer func() { _ = rows.Close() }() // Err below reports what went wrong
	var out []Key
	for rows.Next() {
		k, err := scanKey(rows)
		if err != nil {
			return nil, fmt.Errorf("list API keys: %w", err)
		}
		out = append(out, k)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("list API keys: %w", err)
	}
	return out, nil
}

// Key finds a key by its ID.
func (d *DB) Key(ctx context.Context, id string) (_ Key, err error) {
	defer d.kind(&err)
	k, err := scanKey(d.read.QueryRowContext(ctx, `SELECT `+keyColumns+` FROM api_keys WHERE id = ?`, id))
	if errors.Is(err, sql.ErrNoRows) {
		return Key{}, sandbox.Errorf(sandbox.KindNotFound, "there is no API key %q", id)
	}
	if err != nil {
		return Key{}, fmt.Errorf("read API key: %w", err)
	}
	return k, nil
}

func scanKey(row interface{ Scan(dest ...any) error }) (Key, error) {
	var k Key
	var created, used int64
	if err := row.Scan(&k.ID, &k.Name, &k.Prefix, &k.Hash, &created, &used); err != nil {
		return Key{}, err
	}
	k.CreatedAt, k.LastUsedAt = fromNanos(created), fromNanos(used)
	return k, nil
}

// TouchKey records that a key was used. An older time never replaces a newer.
func (d *DB) TouchKey(ctx context.Context, id string, at time.Time) (err error) {
	defer d.kind(&err)
	_, err = d.write.ExecContext(ctx, `UPDATE api_keys SET last_used_at = ? WHERE id = ? AND last_used_at < ?`,
		nanos(at), id, nanos(at))
	if err != nil {
		return fmt.Errorf("touch API key: %w", err)
	}
	return nil
}

// DeleteKey removes a key.
func (d *DB) DeleteKey(ctx context.Context, id string) (err error) {
	defer d.kind(&err)
	res, err := d.write.ExecContext(ctx, `DELETE FROM api_keys WHERE id = ?`, id)
	if err != nil {
		return fmt.Errorf("delete API key: %w", err)
	}
	n, err := res.RowsAffected()
	if err != nil {
		return fmt.Errorf("delete API key: %w", err)
	}
	if n == 0 {
		return sandbox.Errorf(sandbox.KindNotFound, "there is no API key %q", id)
	}
	return nil
}
