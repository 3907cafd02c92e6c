package api

import "time"

// CreateSandbox is the body of POST /v1/sandboxes. Zero fields get defaults.
type CreateSandbox struct {
	Template       string            `json:"template,omitempty"`
	VCPUs          int               `json:"vcpus,omitempty"`
	MemMiB         int               `json:"mem_mib,omitempty"`
	DiskMiB        int               `json:"disk_mib,omitempty"`
	TimeoutSeconds *float64          `json:"timeout_seconds,omitempty"` // absent: the default
	Env            map[string]string `json:"env,omitempty"`
	Metadata       map[string]string `json:"metadata,omitempty"`
	Network        *Network          `json:"network,omitempty"` // absent: the internet is reachable
}

// Network is what a sandbox may reach.
type Network struct {
	Internet bool `json:"internet"`
}

// Sandbox is what the API answers about one sandbox, also after its end.
type Sandbox struct {
	ID          string            `json:"id"`
	State       string            `json:"state"`
	Template    string            `json:"template"`
	VCPUs       int               `json:"vcpus"`
	MemMiB      int               `json:"mem_mib"`
	DiskMiB     int               `json:"disk_mib"`
	Metadata    map[string]string `json:"metadata,omitempty"`
	Network     Network           `json:"network"`
	CreatedAt   time.Time         `json:"created_at"`
	Deadline    *time.Time        `json:"deadline,omitempty"` // when the host destroys it by itself
	EndedAt     *time.Time        `json:"ended_at,omitempty"`
	Cause       string            `json:"cause,omitempty"` // why it ended: one of the documented causes
	CauseDetail string            `json:"cause_detail,omitempty"`
	Phases      []Phase           `json:"phases,omitempty"` // of the create that this answers
}

// Phase is how long one step took.
type Phase struct {
	Name   string  `json:"name"`
	Millis float64 `json:"ms"`
}

// SandboxList is a page of GET /v1/sandboxes.
type SandboxList struct {
	Sandboxes  []Sandbox `json:"sandboxes"`
	NextCursor string    `json:"next_cursor,omitempty"` // absent on the last page
}

// Exec is the body of POST /v1/sandboxes/{id}/exec, and within ExecStart the
// first message of the stream. Exactly one of Command and Shell is given.
type Exec struct {
	Command        []string          `json:"command,omitempty"` // a program and its arguments
	Shell          string            `json:"shell,omitempty"`   // a line for /bin/sh -c
	Env            map[string]string `json:"env,omitempty"`
	Cwd            string            `json:"cwd,omitempty"`
	User           string            `json:"user,omitempty"`
	TimeoutSeconds float64           `json:"timeout_seconds,omitempty"` // 0: none of its own
	Stdin          string            `json:"stdin,omitempty"`           // not in a stream
}

// ExecResult is the answer to an exec. Output that is not UTF-8 has its bad
// bytes replaced; use the stream for binary output.
type ExecResult struct {
	ExitCode        int     `json:"exit_code"`
	Status          string  `json:"status"` // "exit status 3", "signal: killed"
	Stdout          string  `json:"stdout"`
	Stderr          string  `json:"stderr"`
	StdoutTruncated bool    `json:"stdout_truncated,omitempty"` // there was more than MaxExecOutput
	StderrTruncated bool    `json:"stderr_truncated,omitempty"`
	TimedOut        bool    `json:"timed_out,omitempty"`
	Millis          float64 `json:"ms"`
}

// The stream of GET /v1/sandboxes/{id}/exec/stream is a WebSocket. Text
// messages are StreamMessage in JSON; binary messages are one byte that names
// the channel, then bytes of it.
const (
	ChannelStdin  byte = 0 // client to server
	ChannelStdout byte = 1
	ChannelStderr byte = 2
)

// StdinWindow is how much input a careful client leaves unacknowledged: the
// server then always has room for it, and so always hears a kill behind it. A
// client may ignore the window; TCP slows it down instead.
const StdinWindow = 256 << 10

// The types of a StreamMessage. The client sends auth first (unless the request
// had an Authorization header), then start; later close_stdin or kill. The
// server sends started, then exit or error as its last message; in between
// stdin_ack, and keepalive on an idle stream, which a client may both ignore.
// A client must ignore types it does not know. When the client goes away, its
// command is killed.
const (
	StreamAuth       = "auth"
	StreamStart      = "start"
	StreamCloseStdin = "close_stdin"
	StreamKill       = "kill"
	StreamStarted    = "started"
	StreamExit       = "exit"
	StreamError      = "error"
	StreamStdinAck   = "stdin_ack"
	StreamKeepAlive  = "keepalive"
)

// The signals of a StreamMessage of type kill.
const (
	SignalTerm = "TERM"
	SignalKill = "KILL"
)

// StreamMessage is one text message of an exec stream.
type StreamMessage struct {
	Type     string       `json:"type"`
	Key      string       `json:"key,omitempty"`       // auth
	Exec     *Exec        `json:"exec,omitempty"`      // start
	Stdin    bool         `json:"stdin,omitempty"`     // start: the client will send input
	Signal   string       `json:"signal,omitempty"`    // kill: "TERM" or "KILL"
	PID      uint32       `json:"pid,omitempty"`       // started
	ExitCode *int         `json:"exit_code,omitempty"` // exit
	Status   string       `json:"status,omitempty"`    // exit
	TimedOut bool         `json:"timed_out,omitempty"` // exit
	Bytes    int64        `json:"bytes,omitempty"`     // stdin_ack: how much of the input the command's pipe has taken so far
	Error    *ErrorDetail `json:"error,omitempty"`     // error
}

// File is one entry of a sandbox's file system.
type File struct {
	Name          string    `json:"name"`
	Path          string    `json:"path"`
	Type          string    `json:"type"` // "file", "directory", "symlink" or "other"
	Size          int64     `json:"size"`
	Mode          uint32    `json:"mode"`
	Permissions   string    `json:"permissions"`
	Owner         string    `json:"owner"`
	Group         string    `json:"group"`
	ModifiedAt    time.Time `json:"modified_at"`
	SymlinkTarget string    `json:"symlink_target,omitempty"`
}

// FileList answers GET …/files/list.
type FileList struct {
	Entries []File `json:"entries"`
}

// PathRequest is the body of POST …/files/mkdir and …/files/remove.
type PathRequest struct {
	Path string `json:"path"`
	User string `json:"user,omitempty"`
}

// MoveRequest is the body of POST …/files/move.
type MoveRequest struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
	User        string `json:"user,omitempty"`
}

// Written answers PUT …/files/write.
type Written struct {
	Path string `json:"path"`
	Size int64  `json:"size"`
}

// Timeout is the body of POST …/timeout: the sandbox lives this long from now.
type Timeout struct {
	TimeoutSeconds float64 `json:"timeout_seconds"`
}

// Ping answers POST …/ping.
type Ping struct {
	Millis float64 `json:"ms"` // from the host to the guest agent and back
}

// Metrics answers GET …/metrics.
type Metrics struct {
	At               time.Time `json:"at"`
	CPUCount         int       `json:"cpu_count"`
	CPUUsedPct       float64   `json:"cpu_used_pct"`
	MemTotalBytes    uint64    `json:"mem_total_bytes"`
	MemUsedBytes     uint64    `json:"mem_used_bytes"`
	MemCacheBytes    uint64    `json:"mem_cache_bytes"`
	DiskUsedBytes    uint64    `json:"disk_used_bytes"`
	DiskTotalBytes   uint64    `json:"disk_total_bytes"`
	HostRSSBytes     uint64    `json:"host_rss_bytes"`
	HostOverlayBytes uint64    `json:"host_overlay_bytes"` // allocated blocks
}

// Template is what a sandbox can be made from.
type Template struct {
	Name           string    `json:"name"`
	Digest         string    `json:"digest"`
	SizeBytes      uint64    `json:"size_bytes"` // allocated blocks
	MinDiskMiB     int       `json:"min_disk_mib"`
	DefaultUser    string    `json:"default_user"`
	DefaultWorkdir string    `json:"default_workdir,omitempty"`
	BuiltAt        time.Time `json:"built_at"`
}

// TemplateList answers GET /v1/templates.
type TemplateList struct {
	Templates []Template `json:"templates"`
}

// Host answers GET /v1/host: the machine that runs the sandboxes.
type Host struct {
	Name              string `json:"name"`
	Version           string `json:"version"`
	VMM               string `json:"vmm"`
	Accelerator       string `json:"accelerator"` // "kvm" or "tcg"
	AcceleratorReason string `json:"accelerator_reason"`
	CPUs              int    `json:"cpus"`
	MemTotalMiB       int    `json:"mem_total_mib"`
	MemAvailableMiB   int    `json:"mem_available_mib"`
	MemCommittedMiB   int    `json:"mem_committed_mib"`
	DiskFreeMiB       int    `json:"disk_free_mib"`
	Sandboxes         int    `json:"sandboxes"`
	MaxSandboxes      int    `json:"max_sandboxes"`
	Instance          string `json:"instance"`
}

// CreateKey is the body of POST /v1/api-keys.
type CreateKey struct {
	Name string `json:"name"`
}

// Key is an API key. The secret is in the answer to its creation and never again.
type Key struct {
	ID         string     `json:"id"`
	Name       string     `json:"name"`
	Prefix     string     `json:"prefix"` // its first characters, to tell keys apart
	Secret     string     `json:"secret,omitempty"`
	CreatedAt  time.Time  `json:"created_at"`
	LastUsedAt *time.Time `json:"last_used_at,omitempty"`
}

// KeyList answers GET /v1/api-keys.
type KeyList struct {
	Keys []Key `json:"keys"`
}

// Health answers GET /healthz.
type Health struct {
	Status  string `json:"status"` // "ok"
	Version string `json:"version"`
}
