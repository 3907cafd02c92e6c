package server

import (
	"context"
	"maps"
	"net/http"
	"sync/atomic"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/api"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// terminal is what a stream has more to it when its command has a terminal.
type terminal struct {
	keep    bool          // it shall outlive its client
	kept    atomic.Bool   // it does, from now on: its client knows its PID
	pid     uint32        // set before begun is closed
	begun   chan struct{} // closed when it runs
	sizes   chan *hostv1.Terminal
	signals chan int32
}

// pty serves the WebSocket of a command in a terminal.
func (s *Server) pty(w http.ResponseWriter, r *http.Request) error {
	return s.openStream(w, r, &terminal{
		begun: make(chan struct{}), sizes: make(chan *hostv1.Terminal, 1), signals: make(chan int32, 4),
	})
}

// loginShell becomes the shell that /etc/passwd names for the user.
const loginShell = `while IFS=: read -r name _ _ _ _ _ SHELL; do [ "$name" = "$USER" ] && break; done </etc/passwd
[ "$name" = "$USER" ] && [ -x "$SHELL" ] || SHELL=/bin/sh
export SHELL
exec "$SHELL" -l`

// opening is what the host is sent first.
func (t *terminal) opening(id sandbox.ID, msg api.StreamMessage) (*hostv1.ExecStreamRequest, error) {
	size, err := sizeOf(msg.Size)
	switch {
	case err != nil:
		return nil, err
	case msg.Type == api.StreamStart:
		return t.start(id, msg, size)
	case msg.Type != api.StreamConnect:
		return nil, sandbox.Errorf(sandbox.KindInvalid, "expected a message of type %s or %s, not %q", api.StreamStart, api.StreamConnect, cut(msg.Type, 40))
	case msg.PID == 0 || msg.Exec != nil || msg.Keep:
		return nil, sandbox.Errorf(sandbox.KindInvalid, "connect needs the pid of a command, and takes only a size beside it")
	}
	t.kept.Store(true)
	return &hostv1.ExecStreamRequest{Message: &hostv1.ExecStreamRequest_Attach_{
		Attach: &hostv1.ExecStreamRequest_Attach{Id: string(id), Pid: msg.PID, Terminal: size},
	}}, nil
}

func (t *terminal) start(id sandbox.ID, msg api.StreamMessage, size *hostv1.Terminal) (*hostv1.ExecStreamRequest, error) {
	var req api.Exec
	if msg.Exec != nil {
		req = *msg.Exec
	}
	if len(req.Command) == 0 && req.Shell == "" {
		req.Shell = loginShell
	}
	switch {
	case req.Stdin != "":
		return nil, sandbox.Errorf(sandbox.KindInvalid, "a terminal has no stdin in exec: what is typed comes in binary messages")
	case msg.Keep && req.TimeoutSeconds != 0:
		return nil, sandbox.Errorf(sandbox.KindInvalid, "keep and timeout_seconds exclude each other: the sandbox's own deadline ends what is kept")
	}
	command, err := commandOf(req)
	if err != nil {
		return nil, err
	}
	if command.Env["TERM"] == "" {
		command.Env = maps.Clone(command.Env)
		if command.Env == nil {
			command.Env = map[string]string{}
		}
		command.Env["TERM"] = api.DefaultTERM
	}
	t.keep = msg.Keep
	return startOf(&hostv1.ExecStreamRequest_Start{Id: string(id), Command: command, Stdin: true, Terminal: size, Keep: t.keep}), nil
}

// sizeOf checks a size; none is the host's own default.
func sizeOf(size *api.TerminalSize) (*hostv1.Terminal, error) {
	if size == nil {
		return &hostv1.Terminal{}, nil
	}
	for name, n := range map[string]int{"cols": size.Cols, "rows": size.Rows} {
		if n < 1 || n > api.MaxTerminalSide {
			return nil, sandbox.Errorf(sandbox.KindInvalid, "%s is %d, must be from 1 to %d", name, n, api.MaxTerminalSide)
		}
	}
	return &hostv1.Terminal{Cols: uint32(size.Cols), Rows: uint32(size.Rows)}, nil
}

// started notes that the command runs, and whether its client knows. One that is
// to be kept and that nobody knows of is kept by nobody.
func (t *terminal) started(st *stream, pid uint32, told bool) {
	t.pid = pid
	close(t.begun)
	if told && t.keep {
		t.kept.Store(true)
	}
	if !told {
		st.abandon()
	}
}

// resize leaves a size for feedSizes. Only the newest counts: one that was not
// taken yet is dropped, so that no client can fill the memory with them.
func (t *terminal) resize(to *api.TerminalSize) error {
	if to == nil {
		return sandbox.Errorf(sandbox.KindInvalid, "%s needs a size", api.StreamResize)
	}
	size, err := sizeOf(to)
	if err != nil {
		return err
	}
	select {
	case <-t.sizes:
	default:
	}
	t.sizes <- size // there is room: only the reader of the client fills it
	return nil
}

// feedSizes sends sizes on. It is a goroutine of its own, since the host's stream
// may be full of input.
func (t *terminal) feedSizes(st *stream) {
	for {
		select {
		case <-st.ctx.Done():
			return
		case size := <-t.sizes:
			msg := &hostv1.ExecStreamRequest{Message: &hostv1.ExecStreamRequest_Resize{Resize: size}}
			if st.send(msg) != nil {
				return // the receiving side has the reason
			}
		}
	}
}

// kill leaves a signal for feedSignals. A client that sends many is read no faster
// than they are sent on.
func (t *terminal) kill(st *stream, signal int32) {
	select {
	case t.signals <- signal:
	case <-st.ctx.Done():
	}
}

// feedSignals sends them when the command runs.
func (t *terminal) feedSignals(st *stream) {
	select {
	case <-t.begun:
	case <-st.ctx.Done():
		return
	}
	for {
		select {
		case <-st.ctx.Done():
			return
		case signal := <-t.signals:
			t.signal(st, signal)
		}
	}
}

// signal signals the command in a call of its own. That is not held up by input
// which the command does not take, and also ends one that is kept. A command that
// does not run yet is killed by the host, when the session ends.
func (t *terminal) signal(st *stream, signal int32) {
	select {
	case <-t.begun:
	default:
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(st.ctx), killLimit)
	defer cancel()
	_, _ = st.s.cfg.Host.SignalCommand(ctx, connect.NewRequest(&hostv1.SignalCommandRequest{ // what came of it is in the stream
		Id: string(st.id), Pid: t.pid, Signal: signal,
	}))
}
