-- +goose Up
-- The environment of a sandbox may hold secrets and is of no use once it has
-- ended. From this version on it is wiped with the end; this wipes the rest.
UPDATE sandboxes SET env = '{}' WHERE state IN ('gone', 'failed');

-- +goose Down
SELECT 1; -- what was wiped stays so
