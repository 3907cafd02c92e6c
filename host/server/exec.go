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
// caller goes away the command is killed.
func (s *server) ExecStream(ctx context.Context, stream *execStream) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil {
		return hostapi.ToConnect(sandbox.Errorf(sandbox.KindInvalid, "the first message of an exec stream must be start"))
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p, err := s.agent.Start(ctx, start.GetId(), command(start.GetCommand()), start.GetStdin())
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
