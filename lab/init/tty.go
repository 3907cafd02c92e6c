package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/lab/wire"
)

// openTTY makes a terminal for a command. Its other end is the command's stdin
// as seen from here, and where its output comes from.
func (c *running) openTTY(conn *wire.Conn, size wire.Size) ([]*os.File, error) {
	ptmx, err := os.OpenFile("/dev/pts/ptmx", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		return nil, fmt.Errorf("unlock terminal: %w", err)
	}
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	if err != nil {
		return nil, fmt.Errorf("number of the terminal: %w", err)
	}
	c.stdin = ptmx
	c.resize(size)
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	files := []*os.File{tty}
	for range 2 {
		fd, err := unix.FcntlInt(tty.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, err
		}
		files = append(files, os.NewFile(uintptr(fd), tty.Name()))
	}
	c.carry(conn, wire.Stdout, ptmx)
	return files, nil
}

func (c *running) resize(s wire.Size) {
	_ = unix.IoctlSetWinsize(int(c.stdin.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: s.Rows, Col: s.Cols}) // looks only
}
