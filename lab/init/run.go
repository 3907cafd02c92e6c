package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/lab/wire"
)

const searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environment is what every command of a lab has. There is no udev: without the
// variable dmsetup would wait for it, and /dev/mapper stay empty.
var environment = []string{
	"PATH=" + searchPath,
	"HOME=/root", "USER=root", "LANG=C.UTF-8", "TMPDIR=/tmp",
	"DM_DISABLE_UDEV=1", "LAB_RESULTS=" + results,
}

// runner runs one command at a time.
type runner struct {
	conn *wire.Conn

	mu      sync.Mutex // guards what follows
	ended   map[int]syscall.WaitStatus
	current *running
	wake    *sync.Cond // something was added to ended
}

type running struct {
	pid    int
	stdin  *os.File
	tty    bool
	killed bool
	output sync.WaitGroup
	pipes  []*os.File
}

func newRunner(conn *wire.Conn) *runner {
	r := &runner{conn: conn, ended: map[int]syscall.WaitStatus{}}
	r.wake = sync.NewCond(&r.mu)
	return r
}

// serve obeys until it is told to end, or nobody is there any more.
func (r *runner) serve() error {
	go r.reap()
	for {
		t, payload, err := r.conn.Receive()
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		if t == wire.Poweroff {
			return errors.New("told to")
		}
		if err := r.obey(t, payload); err != nil {
			return err
		}
	}
}

func (r *runner) obey(t wire.Type, payload []byte) error {
	switch t {
	case wire.Start:
		var c wire.Command
		if err := json.Unmarshal(payload, &c); err != nil {
			return err
		}
		return r.start(c)
	case wire.Kill:
		r.mu.Lock()
		if r.current != nil {
			r.current.killed = true
		}
		r.mu.Unlock()
		_ = unix.Kill(-1, unix.SIGKILL) // none may be left
		return nil
	case wire.Stdin, wire.Resize:
		r.mu.Lock()
		c := r.current
		r.mu.Unlock()
		if c != nil {
			c.feed(t, payload)
		}
		return nil
	}
	return fmt.Errorf("a frame %q", t)
}

// reap collects every process that ends: orphans become children of PID 1.
func (r *runner) reap() {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.ECHILD):
			time.Sleep(2 * time.Millisecond) // nothing tells PID 1 that it has children
		case err == nil:
			r.mu.Lock()
			r.ended[pid] = status
			r.wake.Broadcast()
			r.mu.Unlock()
		}
	}
}

// start starts a command and leaves the rest of its life to a goroutine. A
// command that cannot be started has ended.
func (r *runner) start(c wire.Command) error {
	begun := time.Now()
	run, err := r.launch(c)
	if err != nil {
		return r.conn.SendJSON(wire.Exit, wire.Status{Code: 127, Error: err.Error()})
	}
	go func() {
		status := r.wait(run)
		status.Took = time.Since(begun)
		if err := r.conn.SendJSON(wire.Exit, status); err != nil {
			fmt.Fprintln(os.Stderr, "lab: send exit status:", err) // nobody is there to be told
		}
	}()
	return nil
}

func (r *runner) launch(c wire.Command) (*running, error) {
	if len(c.Args) == 0 {
		return nil, errors.New("no command")
	}
	env := append(append([]string(nil), environment...), c.Env...)
	if c.Dir == "" {
		c.Dir = "/root"
	}
	path, err := find(c)
	if err != nil {
		return nil, err
	}
	run := &running{tty: c.TTY != nil}
	files, err := run.open(r.conn, c.TTY)
	if err != nil {
		return nil, err
	}
	attr := &syscall.ProcAttr{Dir: c.Dir, Env: env, Sys: &syscall.SysProcAttr{Setsid: true, Setctty: run.tty}}
	for _, f := range files {
		attr.Files = append(attr.Files, f.Fd())
	}
	r.mu.Lock()
	clear(r.ended)
	run.pid, err = syscall.ForkExec(path, c.Args, attr)
	if err == nil {
		r.current = run
	}
	r.mu.Unlock()
	for _, f := range files {
		_ = f.Close() // the command's ends
	}
	if err != nil {
		return nil, fmt.Errorf("start %s in %s: %w", path, c.Dir, errors.Join(err, run.stdin.Close()))
	}
	return run, nil
}

// find looks for a program as the command itself would.
func find(c wire.Command) (string, error) {
	if strings.Contains(c.Args[0], "/") && !filepath.IsAbs(c.Args[0]) {
		return exec.LookPath(filepath.Join(c.Dir, c.Args[0]))
	}
	return exec.LookPath(c.Args[0]) // by this process's PATH, set in settle
}

// open makes the command's standard streams, and carries what comes out of them.
func (c *running) open(conn *wire.Conn, size *wire.Size) ([]*os.File, error) {
	if size != nil {
		return c.openTTY(conn, *size)
	}
	in, stdin, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	c.stdin = stdin
	files := []*os.File{in}
	for _, t := range []wire.Type{wire.Stdout, wire.Stderr} {
		out, end, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		files = append(files, end)
		c.carry(conn, t, out)
	}
	return files, nil
}

func (c *running) carry(conn *wire.Conn, t wire.Type, from *os.File) {
	c.pipes = append(c.pipes, from)
	c.output.Go(func() {
		_, _ = io.Copy(conn.Writer(t), from) // a terminal ends with an error
		_ = from.Close()                     // read only
	})
}

// feed hands input on. A command that does not read blocks it, and with it the
// connection, after a pipe's length; the outside kills the machine then.
func (c *running) feed(t wire.Type, payload []byte) {
	switch {
	case t == wire.Resize && c.tty:
		var size wire.Size
		if json.Unmarshal(payload, &size) == nil {
			c.resize(size)
		}
	case t == wire.Stdin && len(payload) == 0 && !c.tty:
		_ = c.stdin.Close() // the command sees the end
	case t == wire.Stdin:
		_, _ = c.stdin.Write(payload) // the command may have closed its end
	}
}

// wait waits for the command, then ends and names what it left running.
func (r *runner) wait(run *running) wire.Status {
	r.mu.Lock()
	status, ok := r.ended[run.pid]
	for !ok {
		r.wake.Wait()
		status, ok = r.ended[run.pid]
	}
	s := wire.Status{Code: status.ExitStatus(), Core: status.CoreDump(), Killed: run.killed}
	r.mu.Unlock()
	if status.Signaled() {
		s.Code = 128 + int(status.Signal())
	}
	s.Left = endRest()
	run.drain()
	r.mu.Lock()
	r.current = nil
	r.mu.Unlock()
	s.Cores = coreFiles()
	return s
}

// drain waits until all output is sent. Nobody holds the other ends any more.
func (c *running) drain() {
	c.output.Wait()
	if !c.tty {
		_ = c.stdin.Close() // it may be closed already
	}
}
