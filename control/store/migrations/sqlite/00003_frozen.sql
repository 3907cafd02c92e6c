-- +goose Up
ALTER TABLE sandboxes ADD COLUMN frozen TEXT NOT NULL DEFAULT ''; -- why a running sandbox stands still; empty: it does not

-- +goose Down
ALTER TABLE sandboxes DROP COLUMN frozen;
