package exec

import (
	"fmt"
	"math"
	"os"
	"syscall"

	"connectrpc.com/connect"
	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
)

// What the kernel holds of a terminal's output: a line discipline's buffer, which
// is all that TIOCINQ counts (N_TTY_BUF_SIZE), and behind it the flip buffers
// (pty_common_install in drivers/tty/pty.c sets their limit; pieces are rounded up).
const (
	ttyCounted = 4096
	ttyUnseen  = 16384
)

// The size of a terminal whose request names none.
const (
	defaultCols = 80
	defaultRows = 24
)

// terminal is both sides of a pseudo-terminal.
type terminal struct {
	master *os.File // ours: nonblocking, with deadlines
	// slave is kept open while the command lives. Without it, a command that
	// closes its streams and opens /dev/tty later would hang up in between.
	slave *os.File
}

func openTerminal(size *processv1.PTY_Size) (*streams, error) {
	opened, slave, err := pty.Open()
	if err != nil {
		return nil, fmt.Errorf("open a terminal: %w", err)
	}
	master, err := nonblocking(opened)
	if err != nil {
		_ = slave.Close() // nothing was written
		return nil, fmt.Errorf("open a terminal: %w", err)
	}
	s := &streams{
		child: [3]*os.File{slave, slave, slave}, input: master,
		output: []output{{f: master, full: ttyCounted / 2, unseen: ttyUnseen, event: ptyEvent}},
		tty:    &terminal{master: master, slave: slave},
	}
	wanted := &processv1.PTY_Size{Cols: defaultCols, Rows: defaultRows}
	if size.GetCols() > 0 {
		wanted.Cols = size.GetCols()
	}
	if size.GetRows() > 0 {
		wanted.Rows = size.GetRows()
	}
	if err := s.tty.resize(wanted); err != nil {
		s.close()
		return nil, fmt.Errorf("size of the terminal: %w", err)
	}
	return s, nil
}

// nonblocking replaces a file that was used through its number, which made it
// blocking, by one that the runtime's poller waits for.
func nonblocking(f *os.File) (*os.File, error) {
	defer func() { _ = f.Close() }() // its twin lives
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd) // nothing was written
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// checkSize refuses what does not fit into the kernel's numbers.
func checkSize(size *processv1.PTY_Size) error {
	if size.GetCols() > math.MaxUint16 || size.GetRows() > math.MaxUint16 {
		return errorf(connect.CodeInvalidArgument, "a terminal of %d columns and %d rows: each can be %d at most",
			size.GetCols(), size.GetRows(), math.MaxUint16)
	}
	return nil
}

// resize changes the size, and the kernel tells the foreground group. A zero
// leaves that side as it is.
func (t *terminal) resize(size *processv1.PTY_Size) error {
	return kernel.WithFD(t.master, func(fd int) error {
		ws, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ)
		if err != nil {
			return err
		}
		if size.GetCols() > 0 {
			ws.Col = uint16(size.GetCols())
		}
		if size.GetRows() > 0 {
			ws.Row = uint16(size.GetRows())
		}
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, ws)
	})
}

// foreground is the process group that the terminal's keys go to, or 0.
func (t *terminal) foreground() (group int) {
	_ = kernel.WithFD(t.master, func(fd int) (err error) { // a terminal that is closed has none
		group, err = unix.IoctlGetInt(fd, unix.TIOCGPGRP)
		return err
	})
	return group
}

// signal signals the group that the process leads and, in a terminal, the one in
// the foreground: an interactive shell ignores SIGTERM, and a SIGKILL of its
// group alone would leave it to the kernel's hang-up to end what it runs.
func (p *process) signal(sig syscall.Signal) error {
	if p.tty != nil {
		group := p.tty.foreground()
		session, err := unix.Getsid(group)
		// A group whose leader has ended may live on; a number that another
		// session has by now is not ours.
		if group > 0 && group != p.child.PID && (err != nil || session == p.child.PID) {
			_ = syscall.Kill(-group, sig) // it may have ended by itself
		}
	}
	return p.child.SignalGroup(sig)
}

func ptyEvent(chunk []byte) *processv1.ProcessEvent_DataEvent {
	return &processv1.ProcessEvent_DataEvent{Output: &processv1.ProcessEvent_DataEvent_Pty{Pty: chunk}}
}
