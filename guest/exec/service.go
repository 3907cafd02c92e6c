package exec

import (
	"context"
	"net/http"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
)

// killWait is how long a call that ran into its timeout waits to see its
// process dead before it answers.
const killWait = time.Second

// Start runs a command and follows it.
func (s *Server) Start(ctx context.Context, req *connect.Request[processv1.StartRequest], stream *connect.ServerStream[processv1.StartResponse]) error {
	if err := checkSize(req.Msg.GetPty().GetSize()); err != nil {
		return err
	}
	user, err := s.user(req.Header())
	if err != nil {
		return err
	}
	cmd, err := resolve(req.Msg.GetProcess(), s.cfg.Identity.Get(), user)
	if err != nil {
		return err
	}
	if cmd.record, err = s.recordPath(req.Header().Get(guestapi.HeaderRecord)); err != nil {
		return err
	}
	p, r, err := s.start(ctx, req.Msg, cmd)
	if err != nil {
		return err
	}
	err = p.follow(ctx, r, guestapi.Keepalive(req.Header()), func(event *processv1.ProcessEvent) error {
		return stream.Send(&processv1.StartResponse{Event: event})
	})
	p.unsubscribe(r)
	if connect.CodeOf(err) == connect.CodeDeadlineExceeded {
		select {
		case <-p.done:
		case <-time.After(killWait):
		}
	}
	return err
}

// Connect follows a process that runs, or tells how it ended.
func (s *Server) Connect(ctx context.Context, req *connect.Request[processv1.ConnectRequest], stream *connect.ServerStream[processv1.ConnectResponse]) error {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return err
	}
	r := p.subscribe()
	defer p.unsubscribe(r)
	return p.follow(ctx, r, guestapi.Keepalive(req.Header()), func(event *processv1.ProcessEvent) error {
		return stream.Send(&processv1.ConnectResponse{Event: event})
	})
}

// List names what runs.
func (s *Server) List(context.Context, *connect.Request[processv1.ListRequest]) (*connect.Response[processv1.ListResponse], error) {
	res := &processv1.ListResponse{}
	for _, p := range s.running() {
		if config := p.config.Load(); config != nil { // else it has ended just now
			res.Processes = append(res.Processes, &processv1.ProcessInfo{Config: config, Pid: uint32(p.child.PID), Tag: p.tag})
		}
	}
	return connect.NewResponse(res), nil
}

// Update changes the size of a terminal. Without one in the request it changes
// nothing.
func (s *Server) Update(_ context.Context, req *connect.Request[processv1.UpdateRequest]) (*connect.Response[processv1.UpdateResponse], error) {
	p, err := s.findRunning(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	size := req.Msg.GetPty().GetSize()
	if err := checkSize(size); err != nil {
		return nil, err
	}
	switch {
	case req.Msg.GetPty() == nil:
	case p.tty == nil:
		return nil, errorf(connect.CodeInternal, "process %d has no terminal", p.child.PID)
	default:
		if err := p.tty.resize(size); err != nil {
			return nil, errorf(connect.CodeInternal, "resize the terminal of process %d: %w", p.child.PID, err)
		}
	}
	return connect.NewResponse(&processv1.UpdateResponse{}), nil
}

// SendInput writes to a process, and returns when its pipe has taken it all.
func (s *Server) SendInput(ctx context.Context, req *connect.Request[processv1.SendInputRequest]) (*connect.Response[processv1.SendInputResponse], error) {
	p, err := s.findRunning(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := p.write(ctx, req.Msg.GetInput()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&processv1.SendInputResponse{}), nil
}

// StreamInput writes one message after the other.
func (s *Server) StreamInput(ctx context.Context, stream *connect.ClientStream[processv1.StreamInputRequest]) (*connect.Response[processv1.StreamInputResponse], error) {
	var p *process
	for stream.Receive() {
		var err error
		switch event := stream.Msg().GetEvent().(type) {
		case *processv1.StreamInputRequest_Start:
			p, err = s.findRunning(event.Start.GetProcess())
		case *processv1.StreamInputRequest_Data:
			if p == nil {
				return nil, errorf(connect.CodeInvalidArgument, "the first message of a stream of input names the process")
			}
			err = p.write(ctx, event.Data.GetInput())
		}
		if err != nil {
			return nil, err
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&processv1.StreamInputResponse{}), nil
}

// SendSignal signals the process group that the process leads, and what runs in
// the foreground of its terminal.
func (s *Server) SendSignal(_ context.Context, req *connect.Request[processv1.SendSignalRequest]) (*connect.Response[processv1.SendSignalResponse], error) {
	p, err := s.findRunning(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	switch req.Msg.GetSignal() {
	case processv1.Signal_SIGNAL_SIGKILL:
		err = p.signal(syscall.SIGKILL)
	case processv1.Signal_SIGNAL_SIGTERM:
		err = p.signal(syscall.SIGTERM)
	default:
		return nil, errorf(connect.CodeInvalidArgument, "signal %d cannot be sent: SIGKILL (9) and SIGTERM (15) can", req.Msg.GetSignal())
	}
	if err != nil {
		return nil, errorf(connect.CodeNotFound, "signal process %d: %w", p.child.PID, err)
	}
	return connect.NewResponse(&processv1.SendSignalResponse{}), nil
}

// CloseStdin ends the input of a process. Doing it twice is fine. A terminal has no
// end but its hang-up: what a keyboard sends for it is a byte.
func (s *Server) CloseStdin(ctx context.Context, req *connect.Request[processv1.CloseStdinRequest]) (*connect.Response[processv1.CloseStdinResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	switch {
	case p.tty != nil:
		return nil, errorf(connect.CodeInternal, "process %d has a terminal: send the byte 4 (Ctrl-D) as pty", p.child.PID)
	case p.stdin != nil:
		if err := p.stdin.close(ctx); err != nil {
			return nil, err
		}
	}
	return connect.NewResponse(&processv1.CloseStdinResponse{}), nil
}

// write checks that what is sent is for what the process has.
func (p *process) write(ctx context.Context, in *processv1.ProcessInput) error {
	switch data := in.GetInput().(type) {
	case *processv1.ProcessInput_Pty:
		if p.tty == nil {
			return errorf(connect.CodeInternal, "process %d has no terminal: send stdin", p.child.PID)
		}
		return p.stdin.write(ctx, data.Pty)
	case *processv1.ProcessInput_Stdin:
		switch {
		case p.tty != nil:
			return errorf(connect.CodeInternal, "process %d has a terminal: send pty", p.child.PID)
		case p.stdin == nil:
			return errorf(connect.CodeInternal, "process %d was started without a standard input", p.child.PID)
		}
		return p.stdin.write(ctx, data.Stdin)
	}
	return errorf(connect.CodeInvalidArgument, "the input is neither stdin nor pty")
}

// user is whom the Authorization header names, or the default one.
func (s *Server) user(header http.Header) (account.User, error) {
	name, _, _ := (&http.Request{Header: header}).BasicAuth()
	user, err := s.cfg.Identity.Account(name)
	if err != nil {
		return user, errorf(connect.CodeUnauthenticated, "invalid username: '%s'", name)
	}
	return user, nil
}
