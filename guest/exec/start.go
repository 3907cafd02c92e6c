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
	"sync"
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
	// record is the file that its output is kept in; empty for none.
	record string
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

// start runs a command. The reader it returns is there before the first byte. While
// starts are held it waits.
func (s *Server) start(ctx context.Context, req *processv1.StartRequest, c command) (*process, *reader, error) {
	if err := s.gate.enter(ctx); err != nil {
		return nil, nil, contextError(ctx)
	}
	defer s.gate.leave()
	p := &process{
		tag: req.Tag, readers: map[*reader]struct{}{},
		exited: make(chan struct{}), done: make(chan struct{}),
	}
	p.config.Store(req.GetProcess())
	streams, err := open(req)
	if err != nil {
		return nil, nil, errorf(connect.CodeInternal, "%w", err)
	}
	if p.group, err = newGroup(s.cfg.Cgroup); err != nil {
		streams.close()
		return nil, nil, errorf(connect.CodeInternal, "%w", err)
	}
	if c.cred != nil {
		err = streams.give(int(c.cred.Uid), int(c.cred.Gid))
	}
	if err == nil {
		err = s.fork(p, c, streams)
	}
	p.group.started()
	if err != nil {
		streams.close()
		p.group.remove()
		return nil, nil, errorf(connect.CodeInvalidArgument, "start %s: %w", c.path, err)
	}
	p.tty = streams.tty
	if streams.input != nil {
		p.stdin = newInput(streams.input, p.tty != nil)
	}
	r := p.subscribe()
	if c.record != "" {
		go record(p, p.subscribe(), c.record)
	}
	s.add(p)
	var timer *time.Timer
	if deadline, ok := ctx.Deadline(); ok {
		timer = time.AfterFunc(time.Until(deadline), func() { s.expire(p) })
	}
	go s.attend(p, streams, timer)
	return p, r, nil
}

// open opens what a request wants to be connected by. On an error nothing is open.
func open(req *processv1.StartRequest) (*streams, error) {
	if req.GetPty() != nil {
		return openTerminal(req.GetPty().GetSize())
	}
	s, err := openPipes(req.Stdin == nil || req.GetStdin())
	if err != nil {
		s.close()
		return nil, fmt.Errorf("open the standard streams: %w", err)
	}
	return s, nil
}

func (s *Server) expire(p *process) {
	if err := p.kill(); err != nil {
		s.cfg.Log.Error("kill a process at its timeout", "pid", p.child.PID, "err", err)
	}
}

func (s *Server) fork(p *process, c command, streams *streams) (err error) {
	sys := &syscall.SysProcAttr{Setsid: true, Credential: c.cred}
	if streams.tty != nil {
		sys.Setctty, sys.Ctty = true, 0 // its standard input
	}
	p.group.enter(sys)
	p.child, err = s.cfg.Reaper.Start(c.path, c.argv, &os.ProcAttr{
		Dir: c.dir, Env: c.env, Files: streams.child[:], Sys: sys,
	})
	if err != nil {
		return err
	}
	streams.forked()
	return nil
}

// attend stays with a process from its start to the end of its retention.
func (s *Server) attend(p *process, streams *streams, timer *time.Timer) {
	var pumps sync.WaitGroup
	for _, o := range streams.output {
		pumps.Go(func() { p.pump(o) })
	}
	p.end = endEvent(p.child.Wait())
	p.config.Store(nil)
	close(p.exited)
	if timer != nil {
		timer.Stop()
	}
	if p.stdin != nil {
		p.stdin.abort()
	}
	streams.ended()
	pumps.Wait()
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

func errorf(code connect.Code, format string, args ...any) error {
	return connect.NewError(code, fmt.Errorf(format, args...))
}
