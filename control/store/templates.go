package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Template is a row of what sandboxes can be made from. Snapshots are recorded
// here; of images a host tells by itself.
type Template struct {
	Name    string
	Kind    sandbox.TemplateKind
	State   sandbox.SnapshotState
	Version int64 // grows by one with every change
	Work          // on its creation or deletion
	Host    string

	Image   string     // at the beginning of its line
	Parent  string     // the nearest snapshot above it that has a name; empty: none
	Sandbox sandbox.ID // which it was taken of

	VCPUs     int
	MemMiB    int
	DiskMiB   int
	Saved     Saved // nothing while it is being made
	Metadata  map[string]string
	CreatedAt time.Time
}

const templateColumns = `name, kind, state, version, owner, until, host, template, parent, sandbox_id,
	vcpus, mem_mib, disk_mib, saved, metadata, created_at`

// AddSnapshot adds a snapshot: one that is being made, or one that its host was
// found to have. A name that is taken is kind exists.
func (d *DB) AddSnapshot(ctx context.Context, t Template) (Template, error) {
	t.Kind, t.Version = sandbox.TemplateSnapshot, 1
	meta, err := encodeMap("metadata", t.Metadata)
	if err != nil {
		return Template{}, err
	}
	saved, err := encodeSaved(t.Saved)
	if err != nil {
		return Template{}, err
	}
	err = d.inTx(ctx, func(tx *sql.Tx) error {
		if _, err := getTemplate(ctx, tx, t.Name); !sandbox.Is(err, sandbox.KindNotFound) {
			if err == nil {
				err = sandbox.Errorf(sandbox.KindExists, "there is a snapshot %s already", t.Name)
			}
			return err
		}
		_, err := tx.ExecContext(ctx, `INSERT INTO templates (`+templateColumns+`)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
			t.Name, string(t.Kind), string(t.State), t.Version, t.Owner, nanos(t.Until), t.Host, t.Image, t.Parent, string(t.Sandbox),
			t.VCPUs, t.MemMiB, t.DiskMiB, saved, meta, nanos(t.CreatedAt))
		if err != nil {
			return fmt.Errorf("add snapshot %s: %w", t.Name, err)
		}
		return nil
	})
	if err != nil {
		return Template{}, err
	}
	return t, nil
}

// Snapshot returns one snapshot.
func (d *DB) Snapshot(ctx context.Context, name string) (_ Template, err error) {
	defer d.kind(&err)
	return getTemplate(ctx, d.read, name)
}

func getTemplate(ctx context.Context, q querier, name string) (Template, error) {
	t, err := scanTemplate(q.QueryRowContext(ctx, `SELECT `+templateColumns+` FROM templates WHERE name = ?`, name))
	if errors.Is(err, sql.ErrNoRows) {
		return Template{}, sandbox.Errorf(sandbox.KindNotFound, "there is no snapshot %s", name)
	}
	if err != nil {
		return Template{}, fmt.Errorf("read snapshot %s: %w", name, err)
	}
	return t, nil
}

func scanTemplate(row interface{ Scan(dest ...any) error }) (Template, error) {
	var t Template
	var saved, meta string
	var until, created int64
	err := row.Scan(&t.Name, &t.Kind, &t.State, &t.Version, &t.Owner, &until, &t.Host, &t.Image, &t.Parent, &t.Sandbox,
		&t.VCPUs, &t.MemMiB, &t.DiskMiB, &saved, &meta, &created)
	if err != nil {
		return Template{}, err
	}
	t.Until, t.CreatedAt = fromNanos(until), fromNanos(created)
	if t.Saved, err = decodeSaved(saved); err != nil {
		return Template{}, err
	}
	if err := json.Unmarshal([]byte(meta), &t.Metadata); err != nil {
		return Template{}, fmt.Errorf("decode metadata: %w", err)
	}
	return t, nil
}

// Snapshots lists every snapshot, or those of one host, oldest first.
func (d *DB) Snapshots(ctx context.Context, host string) (_ []Template, err error) {
	defer d.kind(&err)
	rows, err := d.read.QueryContext(ctx, `SELECT `+templateColumns+` FROM templates
		WHERE kind = ? AND (? = '' OR host = ?) ORDER BY created_at, name`, string(sandbox.TemplateSnapshot), host, host)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	return scanAll(rows, "list snapshots", func() (Template, error) { return scanTemplate(rows) })
}

// Made moves a snapshot to Ready, with what its host says of it.
func (d *DB) Made(ctx context.Context, t Template, as Template) (Template, error) {
	return d.changeTemplate(ctx, t, func(n *Template) {
		n.State, n.Image, n.Parent, n.Saved = sandbox.SnapshotReady, as.Image, as.Parent, as.Saved
		n.VCPUs, n.MemMiB, n.DiskMiB = as.VCPUs, as.MemMiB, as.DiskMiB
	})
}

// SetSnapshotState moves a snapshot to another state.
func (d *DB) SetSnapshotState(ctx context.Context, t Template, next sandbox.SnapshotState) (Template, error) {
	return d.changeTemplate(ctx, t, func(n *Template) { n.State = next })
}

// DeletingSnapshot moves a snapshot to Deleting, unless something depends on it:
// sandboxes that were made from it and have not ended, and snapshots whose parent
// it is. The error names them.
func (d *DB) DeletingSnapshot(ctx context.Context, t Template, w Work) (Template, error) {
	return d.changeTemplateIf(ctx, t, func(n *Template) { n.State, n.Work = sandbox.SnapshotDeleting, w }, func(tx *sql.Tx) error {
		users, err := dependants(ctx, tx, t.Name, live())
		if err != nil {
			return err
		}
		return users.refuse("snapshot", t.Name)
	})
}

// RemoveSnapshot takes a snapshot off the record: it is no more, or never came to
// be.
func (d *DB) RemoveSnapshot(ctx context.Context, t Template) error {
	return d.inTx(ctx, func(tx *sql.Tx) error {
		res, err := tx.ExecContext(ctx, `DELETE FROM templates WHERE name = ? AND state = ? AND version = ?`, t.Name, string(t.State), t.Version)
		if err != nil {
			return fmt.Errorf("remove snapshot %s: %w", t.Name, err)
		}
		n, err := res.RowsAffected()
		if err != nil {
			return fmt.Errorf("remove snapshot %s: %w", t.Name, err)
		}
		if n == 0 {
			return staleTemplate(ctx, tx, t.Name)
		}
		return nil
	})
}

func (d *DB) changeTemplate(ctx context.Context, t Template, edit func(*Template)) (Template, error) {
	return d.changeTemplateIf(ctx, t, edit, func(*sql.Tx) error { return nil })
}

// changeTemplateIf writes an edit that the states allow, if nobody else has
// changed the row and allowed says so too.
func (d *DB) changeTemplateIf(ctx context.Context, t Template, edit func(*Template), allowed func(*sql.Tx) error) (Template, error) {
	next := t
	edit(&next)
	if next.State != t.State && !t.State.CanBecome(next.State) {
		return Template{}, sandbox.Errorf(sandbox.KindConflict, "snapshot %s is %s and cannot become %s", t.Name, t.State, next.State)
	}
	if next.State != t.State && next.Work == t.Work {
		next.Work = Work{}
	}
	next.Version = t.Version + 1
	saved, err := encodeSaved(next.Saved)
	if err != nil {
		return Template{}, err
	}
	err = d.inTx(ctx, func(tx *sql.Tx) error {
		if err := allowed(tx); err != nil {
			return err
		}
		res, err := tx.ExecContext(ctx, `UPDATE templates SET state = ?, version = ?, owner = ?, until = ?, template = ?, parent = ?,
				vcpus = ?, mem_mib = ?, disk_mib = ?, saved = ?
			WHERE name = ? AND state = ? AND version = ?`,
			string(next.State), next.Version, next.Owner, nanos(next.Until), next.Image, next.Parent,
			next.VCPUs, next.MemMiB, next.DiskMiB, saved,
			t.Name, string(t.State), t.Version)
		if err != nil {
			return fmt.Errorf("change snapshot %s: %w", t.Name, err)
		}
		n, err := res.RowsAffected()
		if err != nil {
			return fmt.Errorf("change snapshot %s: %w", t.Name, err)
		}
		if n == 0 {
			return staleTemplate(ctx, tx, t.Name)
		}
		return nil
	})
	if err != nil {
		return Template{}, err
	}
	return next, nil
}

// staleTemplate says why a row that was to be changed was not.
func staleTemplate(ctx context.Context, tx *sql.Tx, name string) error {
	if _, err := getTemplate(ctx, tx, name); err != nil {
		return err
	}
	return ErrStale
}

// users are what needs a template: it cannot be deleted before they are.
type users struct {
	sandboxes []string
	snapshots []string
}

// KeepsImage is the error for deleting an image that snapshots or paused sandboxes
// need; nil if there are none. What runs on it only its host knows: an image may
// have been replaced under its name.
func (d *DB) KeepsImage(ctx context.Context, name string) (err error) {
	defer d.kind(&err)
	users, err := dependants(ctx, d.read, name, []sandbox.State{sandbox.Pausing, sandbox.Paused, sandbox.Resuming})
	if err != nil {
		return err
	}
	return users.refuse("template", name)
}

// live are the states in which a sandbox has not ended.
func live() []sandbox.State { return slices.DeleteFunc(sandbox.States(), sandbox.State.Ended) }

func dependants(ctx context.Context, q querier, name string, states []sandbox.State) (out users, err error) {
	where, args := Filter{Template: name, States: states}.where()
	if out.sandboxes, err = names(ctx, q, `SELECT id FROM sandboxes WHERE `+strings.Join(where, ` AND `)+` ORDER BY created_at, id`, args...); err != nil {
		return out, err
	}
	out.snapshots, err = names(ctx, q, `SELECT name FROM templates WHERE (parent = ? OR template = ?) AND name <> ? ORDER BY created_at, name`,
		name, name, name)
	return out, err
}

func names(ctx context.Context, q querier, query string, args ...any) ([]string, error) {
	rows, err := q.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("find what depends on it: %w", err)
	}
	return scanAll(rows, "find what depends on it", func() (name string, err error) { return name, rows.Scan(&name) })
}

// refuse is the error for a deletion; nil if nothing depends on it.
func (u users) refuse(what, name string) error {
	var needs []string
	for _, kind := range []struct {
		word  string
		names []string
	}{{"sandboxes", u.sandboxes}, {"snapshots", u.snapshots}} {
		if len(kind.names) > 0 {
			needs = append(needs, kind.word+" "+someOf(kind.names))
		}
	}
	if len(needs) == 0 {
		return nil
	}
	return sandbox.Errorf(sandbox.KindConflict, "%s %s is needed by %s", what, name, strings.Join(needs, " and "))
}

// someOf keeps a list to what fits in a message.
func someOf(names []string) string {
	const most = 20
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}
