package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// PidFD is a descriptor of one process (Linux 5.3): it never means another one,
// whatever becomes of the PID. It waits in the runtime's poller, not in a
// thread. Close ends a Wait that is under way.
type PidFD struct {
	pid  int
	file *os.File
}

// OpenPidFD opens a process by its PID. One that does not exist is ErrGone.
// The PID may have been reused: compare the start time after opening.
func OpenPidFD(pid int) (*PidFD, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) { // EINVAL: not a PID at all, or that of a thread
		return nil, fmt.Errorf("pid %d: %w", pid, ErrGone)
	}
	if err != nil {
		return nil, fmt.Errorf("open pidfd of %d: %w", pid, err)
	}
	return NewPidFD(pid, fd)
}

// NewPidFD takes over a descriptor that clone returned.
func NewPidFD(pid, fd int) (*PidFD, error) {
	if err := unix.SetNonblock(fd, true); err != nil { // else os.NewFile keeps it out of the poller
		return nil, errors.Join(fmt.Errorf("set pidfd of %d non-blocking: %w", pid, err), unix.Close(fd))
	}
	return &PidFD{pid: pid, file: os.NewFile(uintptr(fd), fmt.Sprintf("pidfd:%d", pid))}, nil
}

// HoldChild holds a process that was just started, by the descriptor that
// os.ProcAttr's PidFD brought, or by its PID where the kernel gave none. It may no
// longer be used as a child.
func HoldChild(child *os.Process, pidfd int) (*PidFD, error) {
	pid := child.Pid
	_ = child.Release() // the descriptor is how it is held
	if pidfd < 0 {
		return OpenPidFD(pid) // it is our child and not reaped, so the PID is still its own
	}
	return NewPidFD(pid, pidfd)
}

// File duplicates one of the process's descriptors (Linux 5.6).
func (p *PidFD) File(number int) (*os.File, error) {
	fd, err := -1, os.ErrClosed
	p.control(func(pidfd int) { fd, err = unix.PidfdGetfd(pidfd, number, 0) })
	if errors.Is(err, unix.ESRCH) {
		err = ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("descriptor %d of pid %d: %w", number, p.pid, err)
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("descriptor %d of pid %d", number, p.pid)), nil
}

// OpenProcess opens the process that had this PID and start time. If it is
// gone, or the PID belongs to another one now, the error is ErrGone. A zombie
// counts as gone; one that is our own child is reaped.
func OpenProcess(pid int, startTime uint64) (*PidFD, error) {
	p, err := OpenPidFD(pid)
	if err != nil {
		return nil, err
	}
	stat, err := StatProc(pid)
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	if stat.StartTime != startTime {
		return nil, errors.Join(fmt.Errorf("pid %d belongs to another process now: %w", pid, ErrGone), p.Close())
	}
	if p.Exited() {
		_, _ = p.Reap() // only our own child can be reaped; for the others there is nothing to do
		return nil, errors.Join(fmt.Errorf("pid %d has ended: %w", pid, ErrGone), p.Close())
	}
	return p, nil
}

// PID is the number the process had when it was opened.
func (p *PidFD) PID() int { return p.pid }

// Exited reports whether the process has ended, reaped or not.
func (p *PidFD) Exited() bool {
	var exited bool
	p.control(func(fd int) { exited = readable(fd) })
	return exited
}

// Wait returns when the process has ended. It reaps nothing. Another error than
// ctx's means that the descriptor was closed. One Wait at a time.
func (p *PidFD) Wait(ctx context.Context) error {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for pid %d: %w", p.pid, err)
	}
	if err := p.file.SetReadDeadline(time.Time{}); err != nil { // an earlier Wait may have left one
		return fmt.Errorf("wait for pid %d: %w", p.pid, err)
	}
	stop := context.AfterFunc(ctx, func() {
		_ = p.file.SetReadDeadline(time.Unix(1, 0)) // wakes the Read below; it fails only when the file is closed
	})
	defer stop()
	err = conn.Read(func(fd uintptr) bool { return readable(int(fd)) })
	if ctx.Err() != nil && err != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("wait for pid %d: %w", p.pid, err)
	}
	return nil
}

// Signal sends a signal to this process and to no other. ErrGone if it ended
// and was reaped.
func (p *PidFD) Signal(sig syscall.Signal) error {
	err := os.ErrClosed
	p.control(func(fd int) { err = unix.PidfdSendSignal(fd, sig, nil, 0) })
	if errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("pid %d: %w", p.pid, ErrGone)
	}
	if err != nil {
		return fmt.Errorf("signal pid %d: %w", p.pid, err)
	}
	return nil
}

// Status is how a process ended.
type Status struct {
	Known  bool // false when it was not our child: only its parent learns that
	Code   int  // exit code, when Signal is 0
	Signal syscall.Signal
}

func (s Status) String() string {
	switch {
	case !s.Known:
		return "exit status unknown"
	case s.Signal != 0:
		return "killed by signal " + unix.SignalName(s.Signal)
	}
	return fmt.Sprintf("exit status %d", s.Code)
}

// Reap collects the status of an ended child, and of no other process. Where
// it is not our child the status is unknown.
func (p *PidFD) Reap() (Status, error) {
	var info unix.Siginfo
	err := os.ErrClosed
	p.control(func(fd int) {
		for {
			err = unix.Waitid(unix.P_PIDFD, fd, &info, unix.WEXITED|unix.WNOHANG, nil)
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
	if errors.Is(err, unix.ECHILD) {
		return Status{}, nil
	}
	if err != nil {
		return Status{}, fmt.Errorf("reap pid %d: %w", p.pid, err)
	}
	return statusOf(&info), nil
}

// Close closes the descriptor; the process goes on.
func (p *PidFD) Close() error { return p.file.Close() }

func (p *PidFD) control(fn func(fd int)) {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return
	}
	_ = conn.Control(func(fd uintptr) { fn(int(fd)) }) // fails only on a closed file; fn did not run then
}

func readable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1
}
