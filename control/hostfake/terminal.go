package hostfake

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

type execStream = connect.BidiStream[hostv1.ExecStreamRequest, hostv1.ExecStreamResponse]

// terminal is a command in a made-up terminal, of which there is a size, and what
// is shown to everybody who follows it. It echoes nothing.
type terminal struct {
	pid     uint32
	ctx     context.Context // of the command: kill ends it
	typed   *io.PipeWriter
	kill    context.CancelFunc
	resized chan struct{}

	done chan struct{} // closed when the fields below are set
	end  *hostv1.ExecEnd
	err  error

	mu        sync.Mutex
	size      [2]uint32 // columns and rows
	followers map[*follower]struct{}
}

type follower struct {
	shown chan []byte
	gone  chan struct{}
}

// Write shows something to all followers, as fast as the slowest.
func (t *terminal) Write(p []byte) (int, error) {
	if err := t.ctx.Err(); err != nil {
		return 0, err
	}
	t.mu.Lock()
	var all []*follower
	for f := range t.followers {
		all = append(all, f)
	}
	t.mu.Unlock()
	for _, f := range all {
		select {
		case f.shown <- append([]byte(nil), p...):
		case <-f.gone:
		case <-t.ctx.Done():
		}
	}
	return len(p), nil
}

func (t *terminal) follow() (f *follower, leave func()) {
	f = &follower{make(chan []byte), make(chan struct{})}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.followers[f] = struct{}{}
	return f, func() {
		close(f.gone)
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.followers, f)
	}
}

// resize leaves a side as it is whose size is zero.
func (t *terminal) resize(to *hostv1.Terminal) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, n := range [2]uint32{to.GetCols(), to.GetRows()} {
		if n > 0 {
			t.size[i] = n
		}
	}
	select {
	case t.resized <- struct{}{}:
	default:
	}
}

// runSize writes the size of the terminal, and again after each change.
func runSize(p process) (int, error) {
	if p.tty == nil {
		return 1, nil
	}
	for {
		p.tty.mu.Lock()
		cols, rows := p.tty.size[0], p.tty.size[1]
		p.tty.mu.Unlock()
		if _, err := fmt.Fprintf(p.stdout, "%dx%d\n", cols, rows); err != nil {
			return 1, err
		}
		select {
		case <-p.tty.resized:
		case <-p.ctx.Done():
			return 0, p.ctx.Err()
		}
	}
}

// openTerminal makes a terminal, and what starts its command.
func (h *Host) openTerminal(b *box, start *hostv1.ExecStreamRequest_Start) (t *terminal, run func()) {
	ctx, kill := context.WithCancel(b.life)
	pr, pw := io.Pipe()
	context.AfterFunc(ctx, func() { _ = pr.CloseWithError(errors.New("the command has ended")) }) // it never fails
	t = &terminal{
		ctx: ctx, typed: pw, kill: kill, resized: make(chan struct{}, 1), done: make(chan struct{}),
		size: [2]uint32{80, 24}, followers: map[*follower]struct{}{},
	}
	t.resize(start.GetTerminal())
	<-t.resized
	h.mu.Lock()
	h.pids++
	h.started = start
	t.pid = h.pids
	if b.terminals == nil {
		b.terminals = map[uint32]*terminal{}
	}
	b.terminals[t.pid] = t
	h.mu.Unlock()
	return t, func() {
		defer close(t.done)
		defer kill()
		t.end, t.err = h.run(b, start.GetCommand(), process{ctx: ctx, stdin: pr, stdout: t, stderr: t, tty: t})
	}
}

// Terminal is what the last command in a terminal was started with.
func (h *Host) Terminal() *hostv1.ExecStreamRequest_Start {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.started
}

func (h *Host) findTerminal(b *box, pid uint32) (*terminal, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if t := b.terminals[pid]; t != nil {
		return t, nil
	}
	return nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindNotFound, "no process with pid %d", pid))
}

// serve serves one that follows a terminal, from before its command runs if he
// started it. When he goes away it is killed, unless it is kept.
func (t *terminal) serve(ctx context.Context, stream *execStream, run func(), keep bool) error {
	f, leave := t.follow()
	defer leave()
	if run != nil {
		go run()
	}
	if !keep {
		defer t.kill()
	}
	if err := stream.Send(&hostv1.ExecStreamResponse{Message: &hostv1.ExecStreamResponse_Started_{
		Started: &hostv1.ExecStreamResponse_Started{Pid: t.pid},
	}}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer cancel() // whoever sends no more has gone
		typing(stream, t)
	}()
	for {
		select {
		case piece := <-f.shown:
			if err := stream.Send(&hostv1.ExecStreamResponse{Message: &hostv1.ExecStreamResponse_Stdout{Stdout: piece}}); err != nil {
				return err
			}
		case <-t.done:
			if t.err != nil {
				return t.err
			}
			return stream.Send(&hostv1.ExecStreamResponse{Message: &hostv1.ExecStreamResponse_End{End: t.end}})
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func typing(stream *execStream, t *terminal) {
	for {
		msg, err := stream.Receive()
		if err != nil {
			return
		}
		switch m := msg.GetMessage().(type) {
		case *hostv1.ExecStreamRequest_Stdin:
			_, _ = t.typed.Write(m.Stdin) // a command that has ended needs none
		case *hostv1.ExecStreamRequest_Resize:
			t.resize(m.Resize)
		case *hostv1.ExecStreamRequest_Kill_:
			t.kill()
		}
	}
}

// SignalCommand implements the contract, for commands in terminals.
func (h *Host) SignalCommand(ctx context.Context, req *connect.Request[hostv1.SignalCommandRequest]) (*connect.Response[hostv1.SignalCommandResponse], error) {
	if err := h.enter(ctx, "SignalCommand", req.Msg.GetId()); err != nil {
		return nil, err
	}
	b, err := h.running(req.Msg.GetId())
	if err != nil {
		return nil, err
	}
	t, err := h.findTerminal(b, req.Msg.GetPid())
	if err != nil {
		return nil, err
	}
	t.kill()
	return connect.NewResponse(&hostv1.SignalCommandResponse{}), nil
}
