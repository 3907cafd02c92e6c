package exec

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/guest/identity"
)

// command is a request to start something, resolved: nothing in it depends on
// the agent's own user or directory any more.
type command struct {
	path string
	argv []string
	env  []string
	dir  string
	cred *syscall.Credential
}

// resolve works out what a request means for a user.
func resolve(config *processv1.ProcessConfig, id identity.Identity, user account.User) (command, error) {
	if config.GetCmd() == "" {
		return command{}, errorf(connect.CodeInvalidArgument, "cmd is empty")
	}
	env := environment(config.GetEnvs(), id, user)
	for name, value := range env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0) {
			return command{}, errorf(connect.CodeInvalidArgument, "%q is not a name and value of a variable", name+"="+value)
		}
	}
	dir, err := directory(config, id, user)
	if err != nil {
		return command{}, err
	}
	path, err := lookup(config.GetCmd(), env["PATH"], dir)
	if err != nil {
		return command{}, err
	}
	c := command{path: path, argv: append([]string{config.GetCmd()}, config.GetArgs()...), dir: dir}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		c.env = append(c.env, name+"="+env[name])
	}
	// A plain process that is not root can only be who it is already.
	if os.Geteuid() == 0 || uint32(os.Geteuid()) != user.UID {
		c.cred = &syscall.Credential{Uid: user.UID, Gid: user.GID, Groups: user.Groups}
	}
	return c, nil
}

// environment is, from weak to strong: the agent's PATH, the user, the sandbox,
// the call.
func environment(call map[string]string, id identity.Identity, user account.User) map[string]string {
	env := map[string]string{
		"PATH": os.Getenv("PATH"), "HOME": user.Home, "USER": user.Name, "LOGNAME": user.Name,
	}
	if id.SandboxID != "" {
		env["DORMOUSE_SANDBOX_ID"] = id.SandboxID
	}
	maps.Copy(env, id.Env)
	maps.Copy(env, call)
	return env
}

func directory(config *processv1.ProcessConfig, id identity.Identity, user account.User) (string, error) {
	dir, err := user.Resolve(config.GetCwd(), id.Workdir)
	if err != nil {
		return "", errorf(connect.CodeInvalidArgument, "cwd: %w", err)
	}
	info, err := os.Stat(dir)
	if config.GetCwd() == "" && id.Workdir == "" && errors.Is(err, fs.ErrNotExist) {
		return "/", nil // a user whose home was never made
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", errorf(connect.CodeInvalidArgument, "cwd '%s' does not exist", dir)
	case err != nil:
		return "", errorf(connect.CodeInvalidArgument, "cwd: %w", err)
	case !info.IsDir():
		return "", errorf(connect.CodeInvalidArgument, "cwd '%s' is not a directory", dir)
	}
	return dir, nil
}

// lookup finds a command the way a shell does, with the PATH that it will have.
func lookup(cmd, path, dir string) (string, error) {
	if strings.ContainsRune(cmd, '/') {
		if !filepath.IsAbs(cmd) {
			cmd = filepath.Join(dir, cmd)
		}
		return cmd, nil
	}
	for _, d := range filepath.SplitList(path) {
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d)
		}
		file := filepath.Join(d, cmd)
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", errorf(connect.CodeInvalidArgument, "command not found: %q", cmd)
}

// start runs a command. The reader it returns is there before the first byte.
func (s *Server) start(ctx context.Context, req *processv1.StartRequest, c command) (*process, *reader, error) {
	p := &process{
		config: req.GetProcess(), tag: req.Tag, readers: map[*reader]struct{}{},
		exited: make(chan struct{}), done: make(chan struct{}),
	}
	var err error
	if p.group, err = newGroup(s.cfg.Cgroup); err != nil {
		return nil, nil, errorf(connect.CodeInternal, "%w", err)
	}
	stdin := req.Stdin == nil || req.GetStdin()
	pipes, err := openPipes(stdin)
	if err == nil && c.cred != nil {
		err = pipes.give(int(c.cred.Uid), int(c.cred.Gid))
	}
	if err == nil {
		err = s.fork(p, c, pipes)
	}
	p.group.started()
	if err != nil {
		pipes.close()
		p.group.remove()
		return nil, nil, errorf(connect.CodeInvalidArgument, "start %s: %w", c.path, err)
	}
	if stdin {
		p.stdin = newInput(pipes.ours[0])
	}
	r := p.subscribe()
	s.add(p)
	var timer *time.Timer
	if deadline, ok := ctx.Deadline(); ok {
		timer = time.AfterFunc(time.Until(deadline), func() { s.expire(p) })
	}
	go s.attend(p, pipes, timer)
	return p, r, nil
}

func (s *Server) expire(p *process) {
	if err := p.kill(); err != nil {
		s.cfg.Log.Error("kill a process at its timeout", "pid", p.child.PID, "err", err)
	}
}

func (s *Server) fork(p *process, c command, pipes *pipes) (err error) {
	sys := &syscall.SysProcAttr{Setsid: true, Credential: c.cred}
	p.group.enter(sys)
	p.child, err = s.cfg.Reaper.Start(c.path, c.argv, &os.ProcAttr{
		Dir: c.dir, Env: c.env, Files: pipes.theirs[:], Sys: sys,
	})
	if err != nil {
		return err
	}
	pipes.forked()
	return nil
}

// attend stays with a process from its start to the end of its retention.
func (s *Server) attend(p *process, pipes *pipes, timer *time.Timer) {
	pumped := make(chan struct{}, 2)
	for i, wrap := range []func([]byte) *processv1.ProcessEvent_DataEvent{stdoutEvent, stderrEvent} {
		go func() {
			p.pump(pipes.ours[i+1], func(chunk []byte) {
				p.deliver(&processv1.ProcessEvent{Event: &processv1.ProcessEvent_Data{Data: wrap(chunk)}})
			})
			pumped <- struct{}{}
		}()
	}
	p.end = endEvent(p.child.Wait())
	close(p.exited)
	if timer != nil {
		timer.Stop()
	}
	if p.stdin != nil {
		p.stdin.abort()
	}
	wake(pipes.ours[1])
	wake(pipes.ours[2])
	<-pumped
	<-pumped
	close(p.done)
	s.retire(p)
}

// retire forgets a process after its retention, and its cgroup once it is empty.
func (s *Server) retire(p *process) {
	gone := p.group.remove()
	time.AfterFunc(Retention, func() {
		s.remove(p)
		if !gone {
			s.sweepGroup(p.group)
		}
	})
}

func (s *Server) sweepGroup(g *group) {
	if !g.remove() {
		time.AfterFunc(Retention, func() { s.sweepGroup(g) })
	}
}

func stdoutEvent(chunk []byte) *processv1.ProcessEvent_DataEvent {
	return &processv1.ProcessEvent_DataEvent{Output: &processv1.ProcessEvent_DataEvent_Stdout{Stdout: chunk}}
}

func stderrEvent(chunk []byte) *processv1.ProcessEvent_DataEvent {
	return &processv1.ProcessEvent_DataEvent{Output: &processv1.ProcessEvent_DataEvent_Stderr{Stderr: chunk}}
}

func errorf(code connect.Code, format string, args ...any) error {
	return connect.NewError(code, fmt.Errorf(format, args...))
}
