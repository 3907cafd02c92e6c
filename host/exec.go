package host

import (
	"context"
	"strings"
	"time"

	"connectrpc.com/connect"

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
