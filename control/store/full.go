package store

import (
	"errors"
	"path/filepath"
	"syscall"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// kind gives *err the kind no_space if it is SQLite's way to say that the disk
// is full. Methods defer it. The transaction has been undone by then.
func (d *DB) kind(err *error) {
	var e *sqlite.Error
	if !errors.As(*err, &e) || !d.noSpace(e.Code()) {
		return
	}
	*err = sandbox.Errorf(sandbox.KindNoSpace, "the disk of the control plane's database is full: %w", *err)
}

// noSpace asks the disk where the code leaves it open: SQLite reports ENOSPC as
// SQLITE_FULL only when a write into its files failed with it, not when the
// shared memory of the log could not grow or a file could not be made.
func (d *DB) noSpace(code int) bool {
	const primary = 0xff // the rest is detail
	switch code & primary {
	case sqlite3.SQLITE_FULL:
		return true
	case sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN:
		var st syscall.Statfs_t
		return syscall.Statfs(filepath.Dir(d.path), &st) == nil && (st.Bavail == 0 || (st.Files > 0 && st.Ffree == 0))
	}
	return false
}
