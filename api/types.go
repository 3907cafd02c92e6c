package api

import "time"

// CreateSandbox is the body of POST /v1/sandboxes. Zero fields get defaults.
type CreateSandbox struct {
	Template       string            `json:"template,omitempty"`
	VCPUs          int               `json:"vcpus,omitempty"`
	MemMiB         int               `json:"mem_mib,omitempty"`
	DiskMiB        int               `json:"disk_mib,omitempty"`
	TimeoutSeconds *float64          `json:"timeout_seconds,omitempty"` // absent: the default, or with AutoPauseSeconds the most
	Env            map[string]string `json:"env,omitempty"`
	Metadata       map[string]string `json:"metadata,omitempty"`
	Network        *Network          `json:"network,omitempty"` // absent: the internet is reachable

	AutoPauseSeconds float64 `json:"auto_pause_seconds,omitempty"` // pause after so long without activity; 0: never
	AutoResume       *bool   `json:"auto_resume,omitempty"`        // whether a call resumes it; absent: it does
	Start            *bool   `json:"start,omitempty"`              // false leaves the template's start command and health check alone; absent: true
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
	Phases      []Phase           `json:"phases,omitempty"` // of the request that this answers
	Frozen      string            `json:"frozen,omitempty"` // why it stands still although it is running: "no_space"

	TimeoutSeconds   float64 `json:"timeout_seconds"` // how long it may run after a create or a resume
	AutoPauseSeconds float64 `json:"auto_pause_seconds,omitempty"`
	AutoResume       bool    `json:"auto_resume"`

	Saved          *Saved      `json:"saved,omitempty"`            // its pause point, if one is kept
	Report         *SaveReport `json:"report,omitempty"`           // of the pause that this answers
	PausedAt       *time.Time  `json:"paused_at,omitempty"`        // of a paused one
	PauseReason    string      `json:"pause_reason,omitempty"`     // of a paused one: "user" or "idle"
	AutoPauseError string      `json:"auto_pause_error,omitempty"` // why the last automatic pause failed: it runs on
	StartedBy      string      `json:"started_by,omitempty"`       // how it came to run: "boot", "warm", "snapshot", "fork" or "resume"
	ForkedFrom     string      `json:"forked_from,omitempty"`      // the sandbox that it is a copy of
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

// The stream of GET /v1/sandboxes/{id}/pty is a WebSocket to a command in a
// terminal. Text messages are StreamMessage in JSON; binary messages are bytes:
// what is typed, and what is shown.
//
// The client sends start, whose exec may be absent, or name neither command nor
// shell: that is the login shell of the user. With keep, the command goes on when
// its client goes away; connect follows it again, or beside others, by the pid of
// started. What was shown before that is not repeated. Without keep it is killed,
// as one of an exec stream is. A client that resizes sends both sides.
const MaxTerminalSide = 65535

// TerminalSize is how many characters fit.
type TerminalSize struct {
	Cols int `json:"cols"`
	Rows int `json:"rows"`
}

// DefaultTERM is the TERM of a command in a terminal whose exec names none.
const DefaultTERM = "xterm-256color"

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
	StreamConnect    = "connect" // of a terminal, as is resize
	StreamResize     = "resize"
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
	PID      uint32       `json:"pid,omitempty"`       // started, connect
	ExitCode *int         `json:"exit_code,omitempty"` // exit
	Status   string       `json:"status,omitempty"`    // exit
	TimedOut bool         `json:"timed_out,omitempty"` // exit
	Bytes    int64        `json:"bytes,omitempty"`     // stdin_ack: how much of the input the command's pipe has taken so far
	Error    *ErrorDetail `json:"error,omitempty"`     // error

	Size *TerminalSize `json:"size,omitempty"` // start and connect of a terminal, resize
	Keep bool          `json:"keep,omitempty"` // start of a terminal: the command outlives its client
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

// The stream of GET …/files/watch is server-sent events (text/event-stream). Each
// has one of these names and a JSON value as its data. The first is start, when
// everything that happens from then on is told; its data is an empty object. Each
// file event has a FileEvent. At last comes overflow, when events came faster than
// they were read and some are lost, or error, with an ErrorDetail; a stream that
// ends without was cut off. An idle one gets comments. A client must ignore names
// that it does not know.
const (
	WatchStart    = "start"
	WatchFile     = "file"
	WatchOverflow = "overflow"
	WatchError    = "error"
)

// FileEvent is one thing that happened in a watched directory.
type FileEvent struct {
	Type string `json:"type"` // "create", "write", "remove", "rename" or "chmod"
	Name string `json:"name"` // from the directory on; "." is itself
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

// Tree answers PUT …/files/tree: what was unpacked below a directory.
type Tree struct {
	Path         string `json:"path"`
	Files        int64  `json:"files"` // and links
	Directories  int64  `json:"directories"`
	Bytes        int64  `json:"bytes"`                   // of the files' content
	Skipped      int64  `json:"skipped"`                 // devices, pipes and sockets
	FirstSkipped string `json:"first_skipped,omitempty"` // the name of the first one
}

// TreeType is the media type of a directory as a tar stream.
const TreeType = "application/x-tar"

// OpenPort is the body of POST …/ports.
type OpenPort struct {
	Port           int      `json:"port"`
	TimeoutSeconds *float64 `json:"timeout_seconds,omitempty"` // how long the token is good; absent: a day
}

// Port answers POST …/ports: how to reach a port of the sandbox.
type Port struct {
	Port int `json:"port"`
	// URL is where it is. Under a domain that is a host name of its own.
	URL string `json:"url"`
	// Link is the same for a browser, which gets its token from it. It is good for
	// five minutes. Absent without a domain.
	Link string `json:"link,omitempty"`
	// Token opens all ports of this sandbox, and nothing else, in X-Dormouse-Token.
	Token     string    `json:"token"`
	ExpiresAt time.Time `json:"expires_at"` // of the token
}

// The stream of GET …/tcp/{port} is a WebSocket: binary messages carry bytes of a
// TCP connection, text messages are a StreamMessage. Each side says end when it
// sends no more; the server says error when the connection is lost, and keepalive
// on an idle one.
const StreamEnd = "end"

// Timeout is the body of POST …/timeout: the sandbox lives this long from now, and
// pauses by itself anew. What is left out stays as it is. A paused sandbox lives
// this long from its next resume on.
type Timeout struct {
	TimeoutSeconds   float64  `json:"timeout_seconds,omitempty"`
	AutoPauseSeconds *float64 `json:"auto_pause_seconds,omitempty"` // 0: never
	AutoResume       *bool    `json:"auto_resume,omitempty"`
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
	Source         string    `json:"source,omitempty"` // what it was made from, for people
	// Start is what its image runs by itself: what a create starts.
	Start []string `json:"start,omitempty"`
	// Healthcheck says when that is ready: what a create waits for.
	Healthcheck  *Healthcheck `json:"healthcheck,omitempty"`
	ExposedPorts []string     `json:"exposed_ports,omitempty"` // "8080/tcp"
}

// Healthcheck is how to find out whether something is ready. Absent fields mean
// 30, 30 and 0 seconds, and 3 retries.
type Healthcheck struct {
	Test               []string `json:"test"` // "CMD" and a command, or "CMD-SHELL" and a line
	IntervalSeconds    float64  `json:"interval_seconds,omitempty"`
	TimeoutSeconds     float64  `json:"timeout_seconds,omitempty"`
	StartPeriodSeconds float64  `json:"start_period_seconds,omitempty"`
	Retries            int      `json:"retries,omitempty"`
}

// The sources of a BuildTemplate. All but the first two are uploads.
const (
	SourceImage      = "image"      // in a registry
	SourcePackages   = "packages"   // of a Debian suite
	SourceArchive    = "archive"    // of an image, OCI's or that of "docker save"
	SourceRootFS     = "rootfs"     // a tar file of a root file system
	SourceDockerfile = "dockerfile" // a tar file of a Dockerfile and the files beside it
)

// BuildTemplate is the body of POST /v1/templates for the sources image and
// packages, and the part "request" of a multipart/form-data body for the others,
// whose second part, "upload", is the tar file.
type BuildTemplate struct {
	Name       string                   `json:"name"`
	Source     string                   `json:"source,omitempty"` // absent: image, or packages where there are any, or of an upload dockerfile
	Image      string                   `json:"image,omitempty"`  // a reference, or which image of an archive
	Dockerfile string                   `json:"dockerfile,omitempty"`
	Target     string                   `json:"target,omitempty"`
	Args       map[string]string        `json:"args,omitempty"`
	Suite      string                   `json:"suite,omitempty"` // of Debian; absent: bookworm
	Packages   []string                 `json:"packages,omitempty"`
	Registries map[string]RegistryLogin `json:"registries,omitempty"` // by their names in references; used and not kept
	ImageMiB   int                      `json:"image_mib,omitempty"`
}

// RegistryLogin is what a registry wants to know.
type RegistryLogin struct {
	Username string `json:"username,omitempty"`
	Password string `json:"password,omitempty"`
	Token    string `json:"token,omitempty"` // a bearer token, instead of the two
}

// BuildEvent is one line of the answer to POST /v1/templates, which is a stream
// of JSON values (application/x-ndjson). The last one has a template or an error;
// a stream that ends without was cut off. A client must ignore fields and lines
// that it does not know.
type BuildEvent struct {
	Step     string       `json:"step,omitempty"`
	Fraction float64      `json:"fraction,omitempty"` // of the step, where it is known
	Line     string       `json:"line,omitempty"`     // of the step's log
	Template *Template    `json:"template,omitempty"`
	Error    *ErrorDetail `json:"error,omitempty"`
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
	// DiskDriver makes the disks of new sandboxes: "dm" or "qcow".
	DiskDriver string `json:"disk_driver"`
	DiskReason string `json:"disk_reason"`
	// Cgroup says whether each VMM is bounded by a control group of its own.
	Cgroup       bool   `json:"cgroup"`
	CgroupReason string `json:"cgroup_reason,omitempty"` // why not
	// Damage names blocks of images that are not what they were.
	Damage          []string `json:"damage,omitempty"`
	CPUs            int      `json:"cpus"`
	MemTotalMiB     int      `json:"mem_total_mib"`
	MemAvailableMiB int      `json:"mem_available_mib"`
	MemCommittedMiB int      `json:"mem_committed_mib"`
	DiskFreeMiB     int      `json:"disk_free_mib"`
	Sandboxes       int      `json:"sandboxes"`
	MaxSandboxes    int      `json:"max_sandboxes"`
	Instance        string   `json:"instance"`
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
