// Package exec runs commands for the process service of the guest's contract.
//
// What it promises:
//   - No output is lost between a start and its first reader, and none is dropped
//     to a slow one: a reader that does not read stops the process at its pipe.
//     Nothing is buffered here, so an endless producer costs no memory. Output
//     that nobody reads any more, because every reader has left, is thrown away.
//   - A reader that leaves does not end its process. A call's timeout does, with
//     all that the process started.
//   - The end comes when the process has ended and what it had written is
//     delivered. A background job that still holds the pipe delays it by
//     lingerQuiet of silence, lingerMax at most; from then on its output is read
//     and thrown away, so that it neither blocks nor dies of a closed pipe.
//   - A signal goes to the process group, and to the one in the foreground of the
//     process's terminal.
//
// With a terminal all of this holds for the one stream that it is.
package exec

import (
	"log/slog"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process/processconnect"
	"github.com/dormouse-sandbox/dormouse/guest/identity"
	"github.com/dormouse-sandbox/dormouse/guest/reap"
)

const (
	// Retention is how long Connect still finds a process that has ended.
	Retention = 30 * time.Second
	// MaxMessage bounds one request message, in bytes. It is what one SendInput
	// may cost in memory; more input comes in several messages.
	MaxMessage = 16 << 20

	lingerQuiet = 100 * time.Millisecond
	lingerMax   = 2 * time.Second
	maxChunk    = 256 << 10 // bytes; the size of an output pipe
)

// Config is what commands run with.
type Config struct {
	Identity *identity.Current
	Reaper   *reap.Reaper
	// Cgroup is a cgroup v2 directory; every command gets one of its own below
	// it. Without it, a timeout finds only descendants whose parents live.
	Cgroup string
	// Records is the directory for the output of processes whose start has a
	// HeaderRecord; empty keeps none.
	Records string
	Log     *slog.Logger
}

// Server is the process service. Its processes outlive their requests.
type Server struct {
	cfg     Config
	started time.Time
	gate    gate // every start passes it

	mu    sync.Mutex
	procs []*process // in order of their start; ended ones for Retention
}

var _ processconnect.ProcessHandler = (*Server)(nil)

// New builds a server.
func New(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Reaper == nil {
		cfg.Reaper = &reap.Reaper{}
	}
	return &Server{cfg: cfg, started: time.Now()}
}

// find looks a process up: the newest with that tag or number, and one that
// runs before one that has ended.
func (s *Server) find(sel *processv1.ProcessSelector) (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ended *process
	for _, p := range slices.Backward(s.procs) {
		if !p.matches(sel) {
			continue
		}
		if !p.ended() {
			return p, nil
		}
		if ended == nil {
			ended = p
		}
	}
	if ended != nil {
		return ended, nil
	}
	switch sel.GetSelector().(type) {
	case *processv1.ProcessSelector_Pid:
		return nil, errorf(connect.CodeNotFound, "no process with pid %d", sel.GetPid())
	case *processv1.ProcessSelector_Tag:
		return nil, errorf(connect.CodeNotFound, "no process with tag %q", sel.GetTag())
	}
	return nil, errorf(connect.CodeInvalidArgument, "a process is selected by its pid or its tag")
}

// findRunning is find for what only a living process can do.
func (s *Server) findRunning(sel *processv1.ProcessSelector) (*process, error) {
	p, err := s.find(sel)
	if err == nil && p.ended() {
		return nil, errorf(connect.CodeNotFound, "process %d has ended", p.child.PID)
	}
	return p, err
}

func (s *Server) add(p *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.procs = append(s.procs, p)
}

func (s *Server) remove(p *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.procs = slices.DeleteFunc(s.procs, func(q *process) bool { return q == p })
}

func (s *Server) running() []*process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.procs), (*process).ended)
}
