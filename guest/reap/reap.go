// Package reap starts the agent's children and, when the agent is PID 1, reaps
// the strangers that the kernel hands to it.
//
// The two must not disturb each other: whoever waits for "any child" may take
// the exit status that somebody else waits for by number. So the reaper only
// looks (WNOWAIT) and leaves what was started here to its owner. Both the look
// and a start hold the same lock, which closes the moment between fork and the
// entry in the table.
package reap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Reaper knows the children that have an owner. The zero value is ready.
type Reaper struct {
	// starting is held for reading while a child is forked and entered, for
	// writing while the reaper looks. It comes before mu.
	starting sync.RWMutex

	mu  sync.Mutex
	own map[int]*Child // by process ID
}

// Child is a process with an owner, who must call Wait at once and exactly once.
type Child struct {
	PID int

	reaper *Reaper
	proc   *os.Process
	pidfd  *os.File // nil before Linux 5.4
	done   chan struct{}

	mu     sync.Mutex
	reaped bool // PID may belong to somebody else
}

// Start starts a process. attr is as for os.StartProcess and is changed.
func (r *Reaper) Start(path string, argv []string, attr *os.ProcAttr) (*Child, error) {
	fd := -1
	if attr.Sys == nil {
		attr.Sys = &syscall.SysProcAttr{}
	}
	attr.Sys.PidFD = &fd

	r.starting.RLock()
	defer r.starting.RUnlock()
	proc, err := os.StartProcess(path, argv, attr)
	if err != nil {
		return nil, err
	}
	c := &Child{PID: proc.Pid, reaper: r, proc: proc, done: make(chan struct{})}
	if fd >= 0 {
		_ = unix.SetNonblock(fd, true) // without it the poller refuses the file and Wait blocks a thread
		c.pidfd = os.NewFile(uintptr(fd), "pidfd")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.own == nil {
		r.own = make(map[int]*Child)
	}
	r.own[c.PID] = c
	return c, nil
}

// Wait returns when the process has ended, and reaps it.
func (c *Child) Wait() (*os.ProcessState, error) {
	c.awaitExit()
	c.mu.Lock()
	state, err := c.proc.Wait()
	c.reaped = true
	c.mu.Unlock()

	c.reaper.mu.Lock()
	if c.reaper.own[c.PID] == c { // else the number was given out again already
		delete(c.reaper.own, c.PID)
	}
	c.reaper.mu.Unlock()
	close(c.done)
	return state, err
}

// awaitExit returns when the process is a zombie. It parks the goroutine; only
// before Linux 5.4 does it take a thread.
func (c *Child) awaitExit() {
	if c.pidfd != nil && c.awaitPidfd() == nil {
		return
	}
	var info unix.Siginfo
	_ = waitid(unix.P_PID, c.PID, &info, unix.WEXITED|unix.WNOWAIT) // proc.Wait will say what is wrong
}

func (c *Child) awaitPidfd() error {
	defer func() { _ = c.pidfd.Close() }() // nothing was written
	conn, err := c.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = conn.Read(func(fd uintptr) bool {
		var info unix.Siginfo
		failed = waitid(unix.P_PIDFD, int(fd), &info, unix.WEXITED|unix.WNOWAIT|unix.WNOHANG)
		return failed != nil || pidOf(&info) != 0
	})
	return errors.Join(err, failed)
}

// SignalGroup sends a signal to the process group that the child leads. It
// reports os.ErrProcessDone once the child is reaped.
func (c *Child) SignalGroup(sig syscall.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reaped {
		return os.ErrProcessDone
	}
	err := syscall.Kill(-c.PID, sig)
	if errors.Is(err, syscall.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

// Run reaps strangers until ctx ends. Only PID 1, or a subreaper, has any.
func (r *Reaper) Run(ctx context.Context) {
	sigchld := make(chan os.Signal, 1) // one is enough: a sweep takes all there are
	signal.Notify(sigchld, unix.SIGCHLD)
	defer signal.Stop(sigchld)
	for {
		r.sweep()
		select {
		case <-sigchld:
		case <-ctx.Done():
			return
		}
	}
}

// sweep takes every zombie there is. The kernel shows the same one again until
// it is reaped, so an owned one is waited for: its owner is on the way.
func (r *Reaper) sweep() {
	for {
		owner, found := r.look()
		if !found {
			return
		}
		if owner != nil {
			<-owner.done
		}
	}
}

// look finds one zombie and reaps it if it is a stranger.
func (r *Reaper) look() (owner *Child, found bool) {
	r.starting.Lock()
	defer r.starting.Unlock()
	var info unix.Siginfo
	err := waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOWAIT|unix.WNOHANG)
	pid := pidOf(&info)
	if err != nil || pid == 0 {
		return nil, false
	}
	r.mu.Lock()
	owner = r.own[pid]
	r.mu.Unlock()
	if owner == nil {
		_, _ = syscall.Wait4(pid, nil, syscall.WNOHANG, nil) // nobody asks for a stranger's status
	}
	return owner, true
}

func waitid(idType, id int, info *unix.Siginfo, options int) error {
	for {
		err := unix.Waitid(idType, id, info, options, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("waitid: %w", err)
		}
		return nil
	}
}

// pidOf reads si_pid, which the unix package leaves unnamed: it follows
// si_signo, si_errno and si_code, aligned to 8 bytes on 64-bit machines.
func pidOf(info *unix.Siginfo) int {
	return int(*(*int32)(unsafe.Add(unsafe.Pointer(info), 16)))
}
