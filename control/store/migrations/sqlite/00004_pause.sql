-- +goose Up
ALTER TABLE sandboxes ADD COLUMN timeout      INTEGER NOT NULL DEFAULT 300000000000; -- how long it may run after a create or a resume, in nanoseconds
ALTER TABLE sandboxes ADD COLUMN auto_pause   INTEGER NOT NULL DEFAULT 0;  -- after how long without activity its host pauses it, in nanoseconds; 0: never
ALTER TABLE sandboxes ADD COLUMN auto_resume  INTEGER NOT NULL DEFAULT 1;  -- whether a call resumes it
ALTER TABLE sandboxes ADD COLUMN owner        TEXT    NOT NULL DEFAULT ''; -- who works on the change of state that is under way
ALTER TABLE sandboxes ADD COLUMN until        INTEGER NOT NULL DEFAULT 0;  -- for how long
ALTER TABLE sandboxes ADD COLUMN saved        TEXT    NOT NULL DEFAULT ''; -- JSON object: its pause point; empty: there is none
ALTER TABLE sandboxes ADD COLUMN paused_at    INTEGER NOT NULL DEFAULT 0;  -- 0: it is not paused
ALTER TABLE sandboxes ADD COLUMN pause_reason TEXT    NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN pause_error  TEXT    NOT NULL DEFAULT ''; -- why its last automatic pause failed
ALTER TABLE sandboxes ADD COLUMN started_by   TEXT    NOT NULL DEFAULT ''; -- how it last came to run
ALTER TABLE sandboxes ADD COLUMN forked_from  TEXT    NOT NULL DEFAULT ''; -- the sandbox that it is a copy of
ALTER TABLE sandboxes ADD COLUMN fork_group   TEXT    NOT NULL DEFAULT ''; -- the first copy that the same fork made
ALTER TABLE sandboxes ADD COLUMN fork_index   INTEGER NOT NULL DEFAULT 0;  -- its place among these
CREATE INDEX sandboxes_by_fork ON sandboxes (fork_group, fork_index) WHERE fork_group <> '';
CREATE INDEX sandboxes_by_template ON sandboxes (template, state);

-- What sandboxes are made from besides the images of a host, which the host knows.
CREATE TABLE templates (
    name       TEXT    NOT NULL PRIMARY KEY,
    kind       TEXT    NOT NULL, -- 'snapshot'
    state      TEXT    NOT NULL,
    version    INTEGER NOT NULL,
    owner      TEXT    NOT NULL, -- as of sandboxes
    until      INTEGER NOT NULL,
    host       TEXT    NOT NULL,
    template   TEXT    NOT NULL, -- the image at the beginning of its line
    parent     TEXT    NOT NULL, -- the nearest snapshot above it that has a name; empty: none
    sandbox_id TEXT    NOT NULL, -- which it was taken of
    vcpus      INTEGER NOT NULL,
    mem_mib    INTEGER NOT NULL,
    disk_mib   INTEGER NOT NULL,
    saved      TEXT    NOT NULL, -- as of sandboxes; empty while it is being made
    metadata   TEXT    NOT NULL, -- JSON object
    created_at INTEGER NOT NULL
) STRICT;
CREATE INDEX templates_by_age ON templates (created_at, name);
CREATE INDEX templates_by_parent ON templates (parent);

-- +goose Down
DROP TABLE templates;
DROP INDEX sandboxes_by_template;
DROP INDEX sandboxes_by_fork;
ALTER TABLE sandboxes DROP COLUMN fork_index;
ALTER TABLE sandboxes DROP COLUMN fork_group;
ALTER TABLE sandboxes DROP COLUMN forked_from;
ALTER TABLE sandboxes DROP COLUMN started_by;
ALTER TABLE sandboxes DROP COLUMN pause_error;
ALTER TABLE sandboxes DROP COLUMN pause_reason;
ALTER TABLE sandboxes DROP COLUMN paused_at;
ALTER TABLE sandboxes DROP COLUMN saved;
ALTER TABLE sandboxes DROP COLUMN until;
ALTER TABLE sandboxes DROP COLUMN owner;
ALTER TABLE sandboxes DROP COLUMN auto_resume;
ALTER TABLE sandboxes DROP COLUMN auto_pause;
ALTER TABLE sandboxes DROP COLUMN timeout;
