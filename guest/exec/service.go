package exec

import (
	"context"
	"net/http"
	"strconv"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
)

// killWait is how long a call that ran into its timeout waits to see its
// process dead before it answers.
const killWait = time.Second

// Start runs a command and follows it.
func (s *Server) Start(ctx context.Context, req *connect.Request[processv1.StartRequest], stream *connect.ServerStream[processv1.StartResponse]) error {
	if req.Msg.GetPty() != nil {
		return errorf(connect.CodeUnimplemented, "terminals are not supported yet: start the command without pty")
	}
	user, err := s.user(req.Header())
	if err != nil {
		return err
	}
	cmd, err := resolve(req.Msg.GetProcess(), s.cfg.Identity.Get(), user)
	if err != nil {
		return err
	}
	p, r, err := s.start(ctx, req.Msg, cmd)
	if err != nil {
		return err
	}
	err = p.follow(ctx, r, keepalive(req.Header()), func(event *processv1.ProcessEvent) error {
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
	return p.follow(ctx, r, keepalive(req.Header()), func(event *processv1.ProcessEvent) error {
		return stream.Send(&processv1.ConnectResponse{Event: event})
	})
}

// List names what runs.
func (s *Server) List(context.Context, *connect.Request[processv1.ListRequest]) (*connect.Response[processv1.ListResponse], error) {
	res := &processv1.ListResponse{}
	for _, p := range s.running() {
		res.Processes = append(res.Processes, &processv1.ProcessInfo{Config: p.config, Pid: uint32(p.child.PID), Tag: p.tag})
	}
	return connect.NewResponse(res), nil
}

// Update would change the size of a terminal.
func (s *Server) Update(context.Context, *connect.Request[processv1.UpdateRequest]) (*connect.Response[processv1.UpdateResponse], error) {
	return nil, errorf(connect.CodeUnimplemented, "terminals are not supported yet: there is nothing to update")
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

// SendSignal signals the process group that the process leads.
func (s *Server) SendSignal(_ context.Context, req *connect.Request[processv1.SendSignalRequest]) (*connect.Response[processv1.SendSignalResponse], error) {
	p, err := s.findRunning(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	switch req.Msg.GetSignal() {
	case processv1.Signal_SIGNAL_SIGKILL:
		err = p.child.SignalGroup(syscall.SIGKILL)
	case processv1.Signal_SIGNAL_SIGTERM:
		err = p.child.SignalGroup(syscall.SIGTERM)
	default:
		return nil, errorf(connect.CodeInvalidArgument, "signal %d cannot be sent: SIGKILL (9) and SIGTERM (15) can", req.Msg.GetSignal())
	}
	if err != nil {
		return nil, errorf(connect.CodeNotFound, "signal process %d: %w", p.child.PID, err)
	}
	return connect.NewResponse(&processv1.SendSignalResponse{}), nil
}

// CloseStdin ends the input of a process. Doing it twice is fine.
func (s *Server) CloseStdin(ctx context.Context, req *connect.Request[processv1.CloseStdinRequest]) (*connect.Response[processv1.CloseStdinResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if p.stdin != nil {
		if err := p.stdin.close(ctx); err != nil {
			return nil, err
		}
	}
	return connect.NewResponse(&processv1.CloseStdinResponse{}), nil
}

func (p *process) write(ctx context.Context, in *processv1.ProcessInput) error {
	data, ok := in.GetInput().(*processv1.ProcessInput_Stdin)
	switch {
	case !ok:
		return errorf(connect.CodeInternal, "process %d has no terminal: send stdin", p.child.PID)
	case p.stdin == nil:
		return errorf(connect.CodeInternal, "process %d was started without a standard input", p.child.PID)
	}
	return p.stdin.write(ctx, data.Stdin)
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

// keepalive is how often an idle stream says that it lives.
func keepalive(header http.Header) time.Duration {
	seconds, err := strconv.ParseUint(header.Get("Keepalive-Ping-Interval"), 10, 31)
	if err != nil || seconds == 0 {
		return keepaliveDefault
	}
	return time.Duration(seconds) * time.Second
}
