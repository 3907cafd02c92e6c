package server

import (
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/api"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// exec runs a command to its end. A client that goes away takes its command
// with it.
func (s *Server) exec(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	var req api.Exec
	if err := readBody(w, r, &req); err != nil {
		return err
	}
	command, err := commandOf(req)
	if err != nil {
		return err
	}
	ctx, done, err := s.enter(r.Context(), id)
	if err != nil {
		return err
	}
	defer done()
	start := s.cfg.Now()
	resp, err := s.cfg.Host.Exec(ctx, connect.NewRequest(&hostv1.ExecRequest{
		Id: string(id), Command: command, Stdin: []byte(req.Stdin), MaxOutputBytes: api.MaxExecOutput,
	}))
	if err != nil {
		return s.hostError(ctx, id, err)
	}
	end := resp.Msg.GetEnd()
	return ok(w, api.ExecResult{
		ExitCode: int(end.GetExitCode()), Status: end.GetStatus(), TimedOut: end.GetTimedOut(),
		Stdout: strings.ToValidUTF8(string(resp.Msg.GetStdout()), "�"), StdoutTruncated: resp.Msg.GetStdoutTruncated(),
		Stderr: strings.ToValidUTF8(string(resp.Msg.GetStderr()), "�"), StderrTruncated: resp.Msg.GetStderrTruncated(),
		Millis: millis(s.cfg.Now().Sub(start)),
	})
}

// commandOf checks a command and translates it for the host.
func commandOf(req api.Exec) (*hostv1.Command, error) {
	argv := req.Command
	switch {
	case (len(argv) > 0) == (req.Shell != ""):
		return nil, sandbox.Errorf(sandbox.KindInvalid, "exactly one of command and shell must be given")
	case len(argv) > api.MaxExecArgs:
		return nil, sandbox.Errorf(sandbox.KindInvalid, "command has %d elements, at most %d are allowed", len(argv), api.MaxExecArgs)
	case req.Shell != "":
		argv = []string{"/bin/sh", "-c", req.Shell}
	}
	for _, arg := range argv {
		if len(arg) > api.MaxExecBytes {
			return nil, sandbox.Errorf(sandbox.KindInvalid, "command has an argument of %d bytes, at most %d are allowed", len(arg), api.MaxExecBytes)
		}
		if strings.Contains(arg, "\x00") {
			return nil, sandbox.Errorf(sandbox.KindInvalid, "command has an argument with a NUL byte")
		}
	}
	if argv[0] == "" {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "command has an empty program name")
	}
	if req.Cwd != "" {
		if err := checkPath("cwd", req.Cwd); err != nil {
			return nil, err
		}
	}
	if err := checkUser(req.User); err != nil {
		return nil, err
	}
	if err := sandbox.CheckEnv(req.Env); err != nil {
		return nil, err
	}
	timeout, err := seconds("timeout_seconds", req.TimeoutSeconds, 0, sandbox.MaxTimeout)
	if err != nil {
		return nil, err
	}
	if req.TimeoutSeconds > 0 && timeout < time.Millisecond {
		timeout = time.Millisecond // 0 would mean none
	}
	return &hostv1.Command{
		Cmd: argv[0], Args: argv[1:], Env: req.Env, Cwd: req.Cwd, User: req.User, TimeoutNanos: int64(timeout),
	}, nil
}

func checkPath(what, path string) error {
	switch {
	case path == "":
		return sandbox.Errorf(sandbox.KindInvalid, "%s is missing", what)
	case len(path) > api.MaxPathBytes:
		return sandbox.Errorf(sandbox.KindInvalid, "%s has %d bytes, at most %d are allowed", what, len(path), api.MaxPathBytes)
	case strings.Contains(path, "\x00"):
		return sandbox.Errorf(sandbox.KindInvalid, "%s has a NUL byte", what)
	case strings.ToValidUTF8(path, "") != path:
		return sandbox.Errorf(sandbox.KindInvalid, "%s is not UTF-8", what)
	}
	return nil
}

// checkUser lets an empty name pass: it means the template's default.
func checkUser(name string) error {
	if name == "" {
		return nil
	}
	return sandbox.CheckUser(name)
}
