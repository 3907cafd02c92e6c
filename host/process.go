package host

import (
	"context"
	"io"
	"net/http"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Process is a command in a guest.
type Process struct {
	g        *guest
	gone     context.Context // ends with the sandbox
	user     string
	pid      uint32
	tty      bool
	keep     bool // it outlives us
	ctx      context.Context
	cancel   context.CancelFunc
	done     func() // it counts no more
	stream   events
	watchdog *time.Timer
	deadline *time.Timer
	timedOut chan struct{} // closed when the deadline killed it
}

// events is what happens to a command, as the agent tells it.
type events interface {
	Receive() bool
	event() *process.ProcessEvent
	Err() error
	Close() error
}

// told are the events in the answers of one kind of call.
type told[M any] struct {
	*connect.ServerStreamForClient[M]
	of func(*M) *process.ProcessEvent
}

func (t told[M]) event() *process.ProcessEvent { return t.of(t.Msg()) }

// start sends the start request and waits for the first event.
func (r *Process) start(caller context.Context, c Command, stdin bool) error {
	req := connect.NewRequest(&process.StartRequest{
		Process: &process.ProcessConfig{Cmd: c.Cmd, Args: c.Args, Envs: c.Env},
		Stdin:   &stdin,
	})
	if c.Cwd != "" {
		req.Msg.Process.Cwd = &c.Cwd
	}
	if c.record != "" {
		req.Header().Set(guestapi.HeaderRecord, c.record)
	}
	if c.Terminal != nil {
		r.tty, req.Msg.Pty = true, c.Terminal.wire()
	}
	patience := silenceKept
	if c.Timeout > 0 {
		patience = min(silenceKept, c.Timeout+killLimit) // its caller counts on an answer by then
	}
	err := r.open(caller, req.Header(), patience, func() (events, error) {
		stream, err := r.g.processes.Start(r.ctx, req)
		return told[process.StartResponse]{stream, (*process.StartResponse).GetEvent}, err
	})
	if err == nil && c.Timeout > 0 {
		r.deadline = time.AfterFunc(c.Timeout, func() {
			close(r.timedOut)
			r.timeUp(r.ctx)
		})
	}
	return err
}

// open makes a call and waits for its first event. A caller that goes away
// meanwhile is no reason to hang up at once: the agent may have started the
// command, and it takes the PID to kill it.
func (r *Process) open(caller context.Context, header http.Header, patience time.Duration, call func() (events, error)) error {
	if caller.Err() != nil {
		return context.Cause(caller)
	}
	r.g.sign(header, r.user)
	header.Set(guestapi.HeaderKeepalive, strconv.Itoa(int(keepAlive/time.Second)))
	r.ctx, r.watchdog = watchSilence(r.ctx)
	r.watchdog.Reset(patience)
	grace := startGrace // read once: a test may undo it meanwhile
	defer context.AfterFunc(caller, func() { r.watchdog.Reset(grace) })()
	stream, err := call()
	if err != nil {
		return r.notStarted(caller, err)
	}
	r.stream = stream
	if !stream.Receive() {
		err := stream.Err()
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		_ = stream.Close() // the error is the news
		return r.notStarted(caller, err)
	}
	r.watchdog.Reset(silenceKept)
	r.pid = stream.event().GetStart().GetPid()
	return nil
}

func (r *Process) notStarted(caller context.Context, err error) error {
	r.watchdog.Stop()
	if cause := context.Cause(caller); cause != nil {
		return cause
	}
	if err := rpcError(r.ctx, err); !sandbox.Is(err, sandbox.KindTransient) {
		return err // it was refused
	}
	return r.brokenOff(err)
}

// timeUp kills the command. A guest that does not even take the signal is not
// waited for any longer.
func (r *Process) timeUp(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	_ = r.signal(ctx, process.Signal_SIGNAL_SIGKILL) // what came of it is in the stream
	if ctx.Err() != nil {
		r.watchdog.Reset(0)
	}
}

// Output hands every piece of output to fn until the command ends; what a terminal
// shows is stdout. It waits for fn: that is how a slow reader slows the command. Once its time is up, signs of
// life do not count any more: an agent that is a guest's own could send them for
// ever, and its caller was promised an end.
func (r *Process) Output(fn func(stdout, stderr []byte) error) (ExecEnd, error) {
	late := false // at the message before this one
	for r.stream.Receive() {
		if !late {
			r.watchdog.Reset(silenceKept)
		}
		late = r.isTimeUp()
		event := r.stream.event()
		if end := event.GetEnd(); end != nil {
			return r.endOf(end), nil
		}
		if data := event.GetData(); data != nil {
			r.watchdog.Stop() // a slow reader is not a silent guest
			out := data.GetStdout()
			if r.tty {
				out = data.GetPty()
			}
			if err := fn(out, data.GetStderr()); err != nil {
				return ExecEnd{}, err
			}
			r.watchdog.Reset(silenceKept)
		}
	}
	err := r.stream.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return ExecEnd{}, r.brokenOff(err)
}

// brokenOff is why a stream has ended before its command. Most often that is the
// first sign of the sandbox's end, which has a cause that says more.
func (r *Process) brokenOff(err error) error {
	select {
	case <-r.gone.Done():
		return context.Cause(r.gone)
	case <-r.ctx.Done():
	case <-time.After(endGrace):
	}
	return rpcError(r.ctx, err)
}

func (r *Process) endOf(end *process.ProcessEvent_EndEvent) ExecEnd {
	out := ExecEnd{ExitCode: int(end.ExitCode), Exited: end.Exited, Status: printable(end.Status)}
	if r.isTimeUp() {
		out.TimedOut = !end.Exited // one that ended by itself just then did not time out
	}
	return out
}

func (r *Process) isTimeUp() bool {
	select {
	case <-r.timedOut:
		return true
	default:
		return false
	}
}

// Input sends bytes to the command and waits until the agent has written them.
func (r *Process) Input(data []byte) error {
	input := &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: data}}
	if r.tty {
		input.Input = &process.ProcessInput_Pty{Pty: data}
	}
	req := connect.NewRequest(&process.SendInputRequest{Process: selector(r.pid), Input: input})
	r.g.sign(req.Header(), r.user)
	_, err := r.g.processes.SendInput(r.ctx, req)
	return rpcError(r.ctx, err)
}

// CloseInput ends the command's input.
func (r *Process) CloseInput() error {
	req := connect.NewRequest(&process.CloseStdinRequest{Process: selector(r.pid)})
	r.g.sign(req.Header(), r.user)
	_, err := r.g.processes.CloseStdin(r.ctx, req)
	return rpcError(r.ctx, err)
}

// PID is the command's process ID inside the guest.
func (r *Process) PID() uint32 { return r.pid }

// Kill sends SIGTERM (15) or SIGKILL (9).
func (r *Process) Kill(signal int32) error {
	sig, err := signalOf(signal)
	if err != nil {
		return err
	}
	return r.signal(r.ctx, sig)
}

// Finish lets go of the command. One that has not ended is killed, unless it is
// kept: whoever started it is gone.
func (r *Process) Finish(ended bool) {
	r.watchdog.Stop()
	if r.deadline != nil {
		r.deadline.Stop()
	}
	if !ended && !r.keep && r.pid != 0 {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), killLimit)
		stop := context.AfterFunc(r.gone, cancel)        // where a guest was, nobody answers
		_ = r.signal(ctx, process.Signal_SIGNAL_SIGKILL) // the guest may be gone with it
		stop()
		cancel()
	}
	r.cancel()
	_ = r.stream.Close() // cancelled: what it says is no news
	r.done()
}
