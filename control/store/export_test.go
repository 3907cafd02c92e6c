package store

import (
	"context"
	"strconv"
)

// LimitPages bounds the database file, as a full disk does; 0 lifts the bound.
func (d *DB) LimitPages(ctx context.Context, pages int) error {
	if pages == 0 {
		pages = 1 << 30
	}
	_, err := d.write.ExecContext(ctx, "PRAGMA max_page_count = "+strconv.Itoa(pages))
	return err
}
