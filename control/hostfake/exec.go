package hostfake

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// chunk is how much output one message carries.
const chunk = 64 << 10

// process is one made-up command. Its context ends when it is killed.
type process struct {
	ctx    context.Context
	stdin  io.Reader
	stdout io.Writer
	stderr io.Writer
	args   []string
	tty    *terminal               // nil without one
	mark   func(name string) error // counts in the sandbox, if it still runs
}

// commands are what the fake can run:
//
//	echo WORDS   writes them and a line end
//	warn WORDS   the same on stderr
//	exit N       ends with that code
//	cat          copies its input
//	hash         writes the SHA-256 of its input
//	spew N       writes N bytes of Pattern as fast as it can
//	sleep        runs until it is killed
//	deaf         the same, and never reads its input
//	size         writes the size of its terminal whenever that changes
//	mark NAME    adds one to the sandbox's mark of that name, see Marks
var commands = map[string]func(process) (int, error){
	"echo": func(p process) (int, error) {
		_, err := fmt.Fprintln(p.stdout, strings.Join(p.args, " "))
		return 0, err
	},
	"warn": func(p process) (int, error) {
		_, err := fmt.Fprintln(p.stderr, strings.Join(p.args, " "))
		return 0, err
	},
	"exit":  func(p process) (int, error) { return strconv.Atoi(p.args[0]) },
	"cat":   func(p process) (int, error) { _, err := io.Copy(p.stdout, p.stdin); return 0, err },
	"hash":  runHash,
	"spew":  runSpew,
	"sleep": runSleep,
	"deaf":  runSleep,
	"size":  runSize,
	"mark":  func(p process) (int, error) { return 0, p.mark(p.args[0]) },
}

func runHash(p process) (int, error) {
	sum := sha256.New()
	if _, err := io.Copy(sum, p.stdin); err != nil {
		return 1, err
	}
	_, err := fmt.Fprintln(p.stdout, hex.EncodeToString(sum.Sum(nil)))
	return 0, err
}

func runSpew(p process) (int, error) {
	n, err := strconv.ParseInt(p.args[0], 10, 64)
	if err != nil {
		return 2, err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{p.stdout}, Pattern(n), make([]byte, chunk))
	return 0, err
}

func runSleep(p process) (int, error) {
	<-p.ctx.Done()
	return 0, p.ctx.Err()
}

// Pattern returns n bytes that are the same for every n and repeat only after a
// prime number of them, so that a lost or doubled piece changes their hash.
func Pattern(n int64) io.Reader {
	const prime = 1048573
	block := make([]byte, prime)
	x := uint32(1)
	for i := range block {
		x = x*1664525 + 1013904223
		block[i] = byte(x >> 24)
	}
	return &pattern{block: block, left: n}
}

type pattern struct {
	block []byte
	at    int
	left  int64
}

func (p *pattern) Read(b []byte) (int, error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	n := copy(b[:min(int64(len(b)), p.left)], p.block[p.at:])
	p.at = (p.at + n) % len(p.block)
	p.left -= int64(n)
	return n, nil
}

// run runs a command until it ends, is killed, or its sandbox ends.
func (h *Host) run(b *box, cmd *hostv1.Command, p process) (*hostv1.ExecEnd, error) {
	command, ok := commands[cmd.GetCmd()]
	if !ok && cmd.GetCmd() == "/bin/sh" && len(cmd.GetArgs()) == 2 {
		words := append(strings.Fields(cmd.GetArgs()[1]), "") // a line may be empty
		if command, ok = commands[words[0]]; ok {
			p.args = words[1 : len(words)-1]
		}
	} else {
		p.args = cmd.GetArgs()
	}
	if !ok {
		return nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindInvalid, "start command: %s: not found", cmd.GetCmd()))
	}
	h.mu.Lock()
	h.processes++
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		h.processes--
		h.mu.Unlock()
	}()
	p.mark = func(name string) error {
		h.mu.Lock()
		defer h.mu.Unlock()
		if p.ctx.Err() != nil {
			return p.ctx.Err()
		}
		f := b.files["/marks/"+name]
		f.size++
		b.files["/marks/"+name] = f
		return nil
	}
	code, err := command(p)
	switch {
	case b.life.Err() != nil:
		return nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindTransient, "the guest agent is gone"))
	case sandbox.Is(context.Cause(p.ctx), sandbox.KindConflict):
		return nil, hostapi.ToConnect(context.Cause(p.ctx)) // it was paused
	case p.ctx.Err() != nil || err != nil:
		return &hostv1.ExecEnd{ExitCode: -1, Status: "signal: killed"}, nil
	}
	return &hostv1.ExecEnd{ExitCode: int32(code), Exited: true, Status: fmt.Sprintf("exit status %d", code)}, nil
}

// Exec implements the contract.
func (h *Host) Exec(ctx context.Context, req *connect.Request[hostv1.ExecRequest]) (*connect.Response[hostv1.ExecResponse], error) {
	if err := h.enter(ctx, "Exec", req.Msg.GetId()); err != nil {
		return nil, err
	}
	b, ctx, done, err := h.visit(ctx, req.Msg.GetId())
	if err != nil {
		return nil, err
	}
	defer done()
	most := int(req.Msg.GetMaxOutputBytes())
	out, errOut := &bounded{most: most}, &bounded{most: most}
	end, err := h.run(b, req.Msg.GetCommand(), process{
		ctx: ctx, stdin: bytes.NewReader(req.Msg.GetStdin()), stdout: out, stderr: errOut,
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&hostv1.ExecResponse{
		Stdout: out.Bytes(), Stderr: errOut.Bytes(), StdoutTruncated: out.cut, StderrTruncated: errOut.cut, End: end,
	}), nil
}

// Marks are what "mark" has counted in a sandbox, and in those that it descends
// from before it came from them.
func (h *Host) Marks(id string) map[string]int {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := map[string]int{}
	if b, ok := h.boxes[id]; ok {
		for name, f := range b.files {
			if name, ok := strings.CutPrefix(name, "/marks/"); ok {
				out[name] = int(f.size)
			}
		}
	}
	return out
}

// bounded keeps the first bytes.
type bounded struct {
	bytes.Buffer
	most int
	cut  bool
}

func (b *bounded) Write(p []byte) (int, error) {
	fits := min(len(p), b.most-b.Len())
	b.cut = b.cut || fits < len(p)
	b.Buffer.Write(p[:fits])
	return len(p), nil
}

// ExecStream implements the contract. Input that the command does not read
// blocks what is behind it, a kill too: the least that a host may do.
func (h *Host) ExecStream(ctx context.Context, stream *execStream) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	start, attach := first.GetStart(), first.GetAttach()
	id := cmp.Or(start.GetId(), attach.GetId())
	if err := h.enter(ctx, "ExecStream", id); err != nil {
		return err
	}
	b, ctx, done, err := h.visit(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	switch {
	case attach != nil:
		t, err := h.findTerminal(b, attach.GetPid())
		if err != nil {
			return err
		}
		t.resize(attach.GetTerminal())
		return t.serve(ctx, stream, nil, true)
	case start.GetTerminal() != nil:
		t, run := h.openTerminal(b, start)
		return t.serve(ctx, stream, run, start.GetKeep())
	}
	return h.pipes(ctx, stream, b, start)
}

// pipes runs a command without a terminal.
func (h *Host) pipes(ctx context.Context, stream *execStream, b *box, start *hostv1.ExecStreamRequest_Start) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := stream.Send(&hostv1.ExecStreamResponse{Message: &hostv1.ExecStreamResponse_Started_{
		Started: &hostv1.ExecStreamResponse_Started{Pid: 42},
	}}); err != nil {
		return err
	}
	pr, pw := io.Pipe()
	defer func() { _ = pr.CloseWithError(errors.New("the command has ended")) }()
	go h.control(stream, pw, cancel)
	p := process{ctx: ctx, stdin: pr, stdout: channel{stream, false}, stderr: channel{stream, true}}
	if !start.GetStdin() {
		p.stdin = bytes.NewReader(nil)
	}
	end, err := h.run(b, start.GetCommand(), p)
	if err != nil {
		return err
	}
	return stream.Send(&hostv1.ExecStreamResponse{Message: &hostv1.ExecStreamResponse_End{End: end}})
}

// control carries what the caller sends to the command.
func (h *Host) control(stream *execStream, stdin *io.PipeWriter, kill context.CancelFunc) {
	for {
		msg, err := stream.Receive()
		if err != nil {
			_ = stdin.CloseWithError(err) // a pipe's close does not fail
			if !errors.Is(err, io.EOF) {
				kill()
			}
			return
		}
		switch m := msg.GetMessage().(type) {
		case *hostv1.ExecStreamRequest_Stdin:
			_, _ = stdin.Write(m.Stdin) // a command that has ended needs none
		case *hostv1.ExecStreamRequest_CloseStdin_:
			_ = stdin.Close() // as above
		case *hostv1.ExecStreamRequest_Kill_:
			kill()
		}
	}
}

// channel writes output to the stream.
type channel struct {
	stream *execStream
	stderr bool
}

func (c channel) Write(p []byte) (int, error) {
	msg := &hostv1.ExecStreamResponse{Message: &hostv1.ExecStreamResponse_Stdout{Stdout: p}}
	if c.stderr {
		msg.Message = &hostv1.ExecStreamResponse_Stderr{Stderr: p}
	}
	if err := c.stream.Send(msg); err != nil {
		return 0, err
	}
	return len(p), nil
}
