package kernel

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// WithFD makes a call on the descriptor of a file or a connection, which stays open
// meanwhile. It stays as it is: File.Fd would make it blocking, and take its deadlines
// away.
func WithFD(f syscall.Conn, call func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := conn.Control(func(fd uintptr) { failed = call(int(fd)) }); err != nil {
		return err
	}
	return failed
}

// Duplicate opens another descriptor of what a file is, with that one's offset. The
// caller closes both.
func Duplicate(f *os.File) (*os.File, error) {
	fd := -1
	err := WithFD(f, func(old int) (err error) {
		fd, err = unix.FcntlInt(uintptr(old), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
