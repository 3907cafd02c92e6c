package server

import (
	"context"
	"errors"
	"io"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// maxOutput bounds what a unary exec may ask to keep of each output.
const maxOutput = 16 << 20

func command(m *hostv1.Command) host.Command {
	return host.Command{
		Cmd: m.GetCmd(), Args: m.GetArgs(), Env: m.GetEnv(), Cwd: m.GetCwd(), User: m.GetUser(),
		Timeout: time.Duration(m.GetTimeoutNanos()),
	}
}

func encodeEnd(e host.ExecEnd) *hostv1.ExecEnd {
	return &hostv1.ExecEnd{ExitCode: int32(e.ExitCode), Exited: e.Exited, Status: e.Status, TimedOut: e.TimedOut}
}

func (s *server) Exec(ctx context.Context, req *connect.Request[hostv1.ExecRequest]) (*connect.Response[hostv1.ExecResponse], error) {
	keep := req.Msg.GetMaxOutputBytes()
	if keep > maxOutput {
		return nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindInvalid, "max_output_bytes is %d, at most %d are allowed", keep, maxOutput))
	}
	out, err := s.agent.Exec(ctx, req.Msg.GetId(), command(req.Msg.GetCommand()), req.Msg.GetStdin(), int(keep))
	return answer(&hostv1.ExecResponse{
		Stdout: out.Stdout, Stderr: out.Stderr, StdoutTruncated: out.StdoutTruncated, StderrTruncated: out.StderrTruncated,
		End: encodeEnd(out.End),
	}, err)
}

type execStream = connect.BidiStream[hostv1.ExecStreamRequest, hostv1.ExecStreamResponse]

// ExecStream runs a command with its input and output as they come. When the
// caller goes away the command is killed, unless it is kept.
func (s *server) ExecStream(ctx context.Context, stream *execStream) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p, err := s.begin(ctx, first)
	if err != nil {
		return hostapi.ToConnect(err)
	}
	ended := false
	defer func() { p.Finish(ended) }()
	if err := stream.Send(&hostv1.ExecStreamResponse{Message: &hostv1.ExecStreamResponse_Started_{
		Started: &hostv1.ExecStreamResponse_Started{Pid: p.PID()},
	}}); err != nil {
		return err
	}
	if first.GetStart().GetKeep() {
		p.Keep() // from here on its caller knows what to look for
	}
	go func() { // ends with the stream, which ends with this call
		if err := input(stream, p); err != nil {
			cancel()
		}
	}()
	end, err := p.Output(func(stdout, stderr []byte) error { return sendOutput(stream, stdout, stderr) })
	if err != nil {
		return hostapi.ToConnect(err)
	}
	ended = true
	return stream.Send(&hostv1.ExecStreamResponse{Message: &hostv1.ExecStreamResponse_End{End: encodeEnd(end)}})
}

// begin starts a command, or follows one that runs.
func (s *server) begin(ctx context.Context, first *hostv1.ExecStreamRequest) (*host.Process, error) {
	switch m := first.GetMessage().(type) {
	case *hostv1.ExecStreamRequest_Start_:
		c := command(m.Start.GetCommand())
		if m.Start.GetTerminal() != nil {
			size := terminal(m.Start.GetTerminal())
			c.Terminal = &size
		}
		if m.Start.GetKeep() && c.Timeout > 0 {
			return nil, sandbox.Errorf(sandbox.KindInvalid, "a command that is kept cannot have a timeout: who would wait for it may be gone")
		}
		return s.agent.Start(ctx, m.Start.GetId(), c, m.Start.GetStdin())
	case *hostv1.ExecStreamRequest_Attach_:
		return s.agent.Attach(ctx, m.Attach.GetId(), m.Attach.GetPid(), terminal(m.Attach.GetTerminal()))
	}
	return nil, sandbox.Errorf(sandbox.KindInvalid, "the first message of an exec stream must be start or attach")
}

func terminal(m *hostv1.Terminal) host.Terminal {
	return host.Terminal{Cols: m.GetCols(), Rows: m.GetRows()}
}

func (s *server) SignalCommand(ctx context.Context, req *connect.Request[hostv1.SignalCommandRequest]) (*connect.Response[hostv1.SignalCommandResponse], error) {
	m := req.Msg
	return answer(&hostv1.SignalCommandResponse{}, s.agent.Signal(ctx, m.GetId(), m.GetPid(), m.GetSignal()))
}

// input passes the caller's messages on. It returns an error when the caller is
// gone; one that merely has no more input is not.
func input(stream *execStream, p *host.Process) error {
	for {
		msg, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		// Errors of the command's side are left to its output: it has ended, or
		// does not read its input.
		switch m := msg.GetMessage().(type) {
		case *hostv1.ExecStreamRequest_Stdin:
			_ = p.Input(m.Stdin)
		case *hostv1.ExecStreamRequest_CloseStdin_:
			_ = p.CloseInput()
		case *hostv1.ExecStreamRequest_Kill_:
			_ = p.Kill(m.Kill.GetSignal())
		case *hostv1.ExecStreamRequest_Resize:
			_ = p.Resize(terminal(m.Resize))
		}
	}
}

func sendOutput(stream *execStream, stdout, stderr []byte) error {
	if len(stdout) > 0 {
		if err := stream.Send(&hostv1.ExecStreamResponse{Message: &hostv1.ExecStreamResponse_Stdout{Stdout: stdout}}); err != nil {
			return err
		}
	}
	if len(stderr) > 0 {
		return stream.Send(&hostv1.ExecStreamResponse{Message: &hostv1.ExecStreamResponse_Stderr{Stderr: stderr}})
	}
	return nil
}
