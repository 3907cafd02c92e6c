-- +goose Up
CREATE TABLE sandboxes (
    id           TEXT    NOT NULL PRIMARY KEY,
    state        TEXT    NOT NULL,
    version      INTEGER NOT NULL,
    host         TEXT    NOT NULL,
    template     TEXT    NOT NULL,
    vcpus        INTEGER NOT NULL,
    mem_mib      INTEGER NOT NULL,
    disk_mib     INTEGER NOT NULL,
    internet     INTEGER NOT NULL,
    env          TEXT    NOT NULL, -- JSON object
    metadata     TEXT    NOT NULL, -- JSON object; the rows of sandbox_metadata again, for reading
    cause        TEXT    NOT NULL,
    cause_detail TEXT    NOT NULL,
    created_at   INTEGER NOT NULL, -- all times are nanoseconds since 1970
    deadline     INTEGER NOT NULL, -- 0: none
    ended_at     INTEGER NOT NULL  -- 0: it has not ended
) STRICT;
CREATE INDEX sandboxes_by_age ON sandboxes (created_at, id);
CREATE INDEX sandboxes_by_state ON sandboxes (state, created_at, id);
CREATE INDEX sandboxes_by_end ON sandboxes (ended_at) WHERE ended_at > 0;

CREATE TABLE sandbox_metadata (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    name       TEXT NOT NULL,
    value      TEXT NOT NULL,
    PRIMARY KEY (sandbox_id, name)
) STRICT;
CREATE INDEX sandbox_metadata_by_value ON sandbox_metadata (name, value);

CREATE TABLE idempotency (
    owner        TEXT    NOT NULL, -- the API key that asked
    key          TEXT    NOT NULL,
    request_hash BLOB    NOT NULL,
    sandbox_id   TEXT    NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    created_at   INTEGER NOT NULL,
    PRIMARY KEY (owner, key)
) STRICT;
CREATE INDEX idempotency_by_age ON idempotency (created_at);
CREATE INDEX idempotency_by_sandbox ON idempotency (sandbox_id);

CREATE TABLE api_keys (
    id           TEXT    NOT NULL PRIMARY KEY,
    name         TEXT    NOT NULL,
    prefix       TEXT    NOT NULL,
    hash         BLOB    NOT NULL UNIQUE, -- SHA-256 of the secret
    created_at   INTEGER NOT NULL,
    last_used_at INTEGER NOT NULL         -- 0: never
) STRICT;

-- +goose Down
DROP TABLE api_keys;
DROP TABLE idempotency;
DROP TABLE sandbox_metadata;
DROP TABLE sandboxes;
