package host

import (
	"context"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Bounds on a command. The kernel's own are a little higher.
const (
	maxArgs     = 4096
	maxArgBytes = 128 << 10
	maxCwdBytes = 4096
)

// keepAlive is how often the agent says that a silent stream lives.
const keepAlive = 15 * time.Second

// silenceKept is after how long a stream that stays silent has lost its guest;
// tests shorten it.
var silenceKept = 2 * time.Minute

// startGrace is how long a command may take to say its PID whose caller has gone
// away; tests lengthen it.
var startGrace = 2 * time.Second

// killLimit bounds the killing of a command whose caller went away or whose time
// is up.
const killLimit = 30 * time.Second

// endGrace is how long a broken stream waits for the news that its sandbox has
// ended.
const endGrace = time.Second

// watchSilence returns a context that ends when its timer has not been reset or
// stopped for too long.
func watchSilence(ctx context.Context) (context.Context, *time.Timer) {
	ctx, stop := context.WithCancelCause(ctx)
	return ctx, time.AfterFunc(silenceKept, func() {
		stop(sandbox.Errorf(sandbox.KindTransient, "the guest agent is silent for too long"))
	})
}

// Command is a program to run in a sandbox.
type Command struct {
	Cmd     string
	Args    []string
	Env     map[string]string
	Cwd     string        // empty: the default
	User    string        // empty: the default
	Timeout time.Duration // 0: none

	// Terminal gives it a terminal of that size; nil gives it pipes.
	Terminal *Terminal

	record string // the name under which the guest keeps its output; empty: it does not
}

func (c Command) check() error {
	if c.Cmd == "" {
		return sandbox.Errorf(sandbox.KindInvalid, "command is empty")
	}
	if len(c.Args) > maxArgs {
		return sandbox.Errorf(sandbox.KindInvalid, "command has %d arguments, at most %d are allowed", len(c.Args), maxArgs)
	}
	for _, s := range append([]string{c.Cmd, c.Cwd}, c.Args...) {
		if len(s) > maxArgBytes {
			return sandbox.Errorf(sandbox.KindInvalid, "command has an argument of %d bytes, at most %d are allowed", len(s), maxArgBytes)
		}
		if strings.ContainsRune(s, 0) {
			return sandbox.Errorf(sandbox.KindInvalid, "command has an argument with a NUL byte")
		}
	}
	if len(c.Cwd) > maxCwdBytes {
		return sandbox.Errorf(sandbox.KindInvalid, "cwd has %d bytes, at most %d are allowed", len(c.Cwd), maxCwdBytes)
	}
	if c.Timeout < 0 || c.Timeout > sandbox.MaxTimeout {
		return sandbox.Errorf(sandbox.KindInvalid, "command timeout is %v, must be from 0 to %v", c.Timeout, sandbox.MaxTimeout)
	}
	if c.User != "" {
		if err := sandbox.CheckUser(c.User); err != nil {
			return err
		}
	}
	if c.Terminal != nil {
		if err := c.Terminal.check(); err != nil {
			return err
		}
	}
	return sandbox.CheckEnv(c.Env)
}

// ExecEnd says how a command ended.
type ExecEnd struct {
	ExitCode int
	Exited   bool // false: it died by a signal
	Status   string
	TimedOut bool
}

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

// Start starts a command; the caller must call Finish.
func (a *Agent) Start(ctx context.Context, id string, c Command, stdin bool) (*Process, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	return a.follow(ctx, id, c.User, func(ctx context.Context, r *Process) error { return r.start(ctx, c, stdin) })
}

// follow follows the command that open starts or finds.
func (a *Agent) follow(ctx context.Context, id, user string, open func(caller context.Context, r *Process) error) (*Process, error) {
	b, err := a.box(id)
	if err != nil {
		return nil, err
	}
	g, ctx, cancel, err := a.guestOf(ctx, b)
	if err != nil {
		return nil, err
	}
	done, err := a.commands.begin()
	if err != nil {
		cancel()
		return nil, err
	}
	return launch(ctx, b.alive, &Process{g: g, gone: b.alive, user: user, cancel: cancel, done: done}, open)
}

// launch starts or finds a command for a caller who may go away, in a sandbox that
// may end: it hangs up on that at once. What r was made with ends with it, also on
// an error.
func launch(ctx, life context.Context, r *Process, open func(caller context.Context, r *Process) error) (*Process, error) {
	r.timedOut = make(chan struct{})
	var hangUp context.CancelCauseFunc
	r.ctx, hangUp = context.WithCancelCause(context.WithoutCancel(ctx))
	release := r.cancel
	r.cancel = func() { release(); hangUp(nil) }
	defer context.AfterFunc(life, func() { hangUp(context.Cause(life)) })()
	if err := open(ctx, r); err != nil {
		r.cancel()
		r.done()
		return nil, err
	}
	context.AfterFunc(ctx, func() { hangUp(context.Cause(ctx)) })
	return r, nil
}

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

// Signal is Kill for a command that somebody else may follow.
func (a *Agent) Signal(ctx context.Context, id string, pid uint32, signal int32) error {
	sig, err := signalOf(signal)
	if err != nil {
		return err
	}
	b, err := a.box(id)
	if err != nil {
		return err
	}
	g, ctx, cancel, err := a.guestOf(ctx, b)
	if err != nil {
		return err
	}
	defer cancel()
	ctx, stop := context.WithTimeout(ctx, killLimit)
	defer stop()
	return g.signal(ctx, pid, sig)
}

func signalOf(number int32) (process.Signal, error) {
	switch s := process.Signal(number); s {
	case process.Signal_SIGNAL_SIGKILL, process.Signal_SIGNAL_SIGTERM:
		return s, nil
	}
	return 0, sandbox.Errorf(sandbox.KindInvalid, "signal %d: only 9 and 15 can be sent", number)
}

func (r *Process) signal(ctx context.Context, sig process.Signal) error {
	return r.g.signal(ctx, r.pid, sig)
}

func (g *guest) signal(ctx context.Context, pid uint32, sig process.Signal) error {
	req := connect.NewRequest(&process.SendSignalRequest{Process: selector(pid), Signal: sig})
	g.sign(req.Header(), "")
	_, err := g.processes.SendSignal(ctx, req)
	return rpcError(ctx, err)
}

func selector(pid uint32) *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: pid}}
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

// ExecResult is what a command left that ran to its end.
type ExecResult struct {
	Stdout, Stderr                   []byte
	StdoutTruncated, StderrTruncated bool
	End                              ExecEnd
}

// Exec runs a command to its end and keeps the first max bytes of each of its
// outputs.
func (a *Agent) Exec(ctx context.Context, id string, c Command, stdin []byte, max int) (ExecResult, error) {
	r, err := a.Start(ctx, id, c, len(stdin) > 0)
	if err != nil {
		return ExecResult{}, err
	}
	ended := false
	defer func() { r.Finish(ended) }()
	fed := make(chan struct{})
	go func() {
		defer close(fed)
		r.feed(stdin)
	}()
	defer func() { r.cancel(); <-fed }()
	var out ExecResult
	out.End, err = r.Output(func(stdout, stderr []byte) error {
		out.StdoutTruncated = keep(&out.Stdout, stdout, max) || out.StdoutTruncated
		out.StderrTruncated = keep(&out.Stderr, stderr, max) || out.StderrTruncated
		return nil
	})
	ended = err == nil
	return out, err
}

// feed writes all of stdin. A command that does not read it, or has ended, is
// no error: its exit says what happened.
func (r *Process) feed(stdin []byte) {
	const piece = 64 << 10
	for len(stdin) > 0 {
		n := min(len(stdin), piece)
		if r.Input(stdin[:n]) != nil {
			return
		}
		stdin = stdin[n:]
	}
	_ = r.CloseInput() // as above
}

// keep appends what fits and says whether something did not.
func keep(to *[]byte, data []byte, max int) (cut bool) {
	room := max - len(*to)
	if len(data) > room {
		data, cut = data[:room], true
	}
	*to = append(*to, data...)
	return cut
}
