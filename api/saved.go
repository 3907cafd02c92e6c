package api

import "time"

// Saved is a memory and a disk that are kept: a pause point or a snapshot. Sizes
// are allocated blocks.
type Saved struct {
	At           time.Time `json:"at"`         // the moment that it holds
	Generation   int       `json:"generation"` // how many diffs lie between it and the first of its line
	MemoryBytes  int64     `json:"memory_bytes"`
	DiskBytes    int64     `json:"disk_bytes"`
	OwnBytes     int64     `json:"own_bytes"`  // of these, what was written for it; the rest it shares with others
	Durability   string    `json:"durability"` // "local": on the host's disk, and fsynced
	MemoryDigest string    `json:"memory_digest"`
	DiskDigest   string    `json:"disk_digest"`
	ParentDigest string    `json:"parent_digest,omitempty"`
	Compat       string    `json:"compat"` // the VMM that can run it again
}

// SaveReport says what saving cost.
type SaveReport struct {
	StoppedMillis float64 `json:"stopped_ms"` // how long the guest stood still, where it runs on
	ChangedPages  int64   `json:"changed_pages"`
	ChangedBlocks int64   `json:"changed_blocks"`
	DirtyPages    int64   `json:"dirty_pages"` // that were looked at to find these
	DirtyBlocks   int64   `json:"dirty_blocks"`
	BytesWritten  int64   `json:"bytes_written"`
}

// Resume is the body of POST …/resume, which may be left out. Zero fields mean
// what the sandbox had.
type Resume struct {
	TimeoutSeconds *float64          `json:"timeout_seconds,omitempty"`
	Env            map[string]string `json:"env,omitempty"` // added to its environment
}

// Fork is the body of POST …/fork. What is left out the copies have from the
// original.
type Fork struct {
	Count            *int              `json:"count,omitempty"` // absent: 1
	TimeoutSeconds   *float64          `json:"timeout_seconds,omitempty"`
	Env              map[string]string `json:"env,omitempty"` // added
	Metadata         map[string]string `json:"metadata,omitempty"`
	AutoPauseSeconds *float64          `json:"auto_pause_seconds,omitempty"`
	AutoResume       *bool             `json:"auto_resume,omitempty"`
}

// Forked answers POST …/fork: as many copies as were asked for, each with its
// sandbox or with its error.
type Forked struct {
	Copies []Copy      `json:"copies"`
	Phases []Phase     `json:"phases,omitempty"` // of the original's share; absent in a repeated answer
	Report *SaveReport `json:"report,omitempty"`
}

// Copy is one copy of a fork. One that failed is on record: its error names it.
type Copy struct {
	Sandbox *Sandbox     `json:"sandbox,omitempty"`
	Error   *ErrorDetail `json:"error,omitempty"`
}

// CreateSnapshot is the body of POST /v1/snapshots.
type CreateSnapshot struct {
	Name      string            `json:"name"`
	SandboxID string            `json:"sandbox_id"`
	Metadata  map[string]string `json:"metadata,omitempty"`
}

// Snapshot is a template with memory: sandboxes made from it go on where it was
// taken, with its vCPUs and its memory.
type Snapshot struct {
	Name      string            `json:"name"`
	State     string            `json:"state"` // creating, ready, deleting, or lost: its host does not have it
	Template  string            `json:"template"`
	Parent    string            `json:"parent,omitempty"` // the nearest snapshot above it
	SandboxID string            `json:"sandbox_id"`       // which it was taken of
	VCPUs     int               `json:"vcpus"`
	MemMiB    int               `json:"mem_mib"`
	DiskMiB   int               `json:"disk_mib"`
	Saved     *Saved            `json:"saved,omitempty"` // absent while it is being made
	Metadata  map[string]string `json:"metadata,omitempty"`
	CreatedAt time.Time         `json:"created_at"`
	Phases    []Phase           `json:"phases,omitempty"` // of the request that this answers
	Report    *SaveReport       `json:"report,omitempty"`
}

// SnapshotList answers GET /v1/snapshots.
type SnapshotList struct {
	Snapshots []Snapshot `json:"snapshots"`
}

// Verified answers POST /v1/snapshots/{name}/verify.
type Verified struct {
	Whole  bool     `json:"whole"` // there is no damage
	Files  int      `json:"files"`
	Bytes  int64    `json:"bytes"` // that were read
	Damage []Damage `json:"damage,omitempty"`
	Phases []Phase  `json:"phases,omitempty"`
}

// Damage is one place where a snapshot is not what it was.
type Damage struct {
	File    string `json:"file"`
	Offset  int64  `json:"offset"` // in it; negative: all of it
	Message string `json:"message"`
}

// SnapshotTree answers GET /v1/snapshots/{name}/tree: what the snapshot descends
// from and what descends from it, parents first.
type SnapshotTree struct {
	Nodes []SnapshotNode `json:"nodes"`
}

// SnapshotNode is one point of a line. Its kind is template (an image), snapshot,
// pause (where a sandbox is paused), or point: one without a name, at which
// sandboxes were forked.
type SnapshotNode struct {
	Digest     string     `json:"digest"`
	Parent     string     `json:"parent,omitempty"` // the digest of another node
	Kind       string     `json:"kind"`
	Name       string     `json:"name,omitempty"`
	SandboxID  string     `json:"sandbox_id,omitempty"`
	Generation int        `json:"generation"`
	OwnBytes   int64      `json:"own_bytes"` // allocated
	At         *time.Time `json:"at,omitempty"`
	Running    []string   `json:"running,omitempty"` // the sandboxes that started here
}
