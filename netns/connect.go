package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// tcpSocket makes a socket in the namespace of the calling thread. It stays in
// that namespace, whoever uses it.
func tcpSocket() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return os.NewFile(uintptr(fd), "tcp"), nil
}

// connect takes the socket over and waits until it is connected, has failed, or
// ctx ends.
func connect(ctx context.Context, socket *os.File, to netip.AddrPort) (_ net.Conn, err error) {
	defer func() { _ = socket.Close() }() // the connection has a descriptor of its own
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil, err
	}
	aLongTimeAgo := time.Unix(1, 0)
	defer context.AfterFunc(ctx, func() { _ = socket.SetWriteDeadline(aLongTimeAgo) })() // a socket that closes needs none
	address := &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	var failed error
	err = raw.Write(func(fd uintptr) bool {
		// Asked again, the kernel says how far it is: also when it woke us for nothing.
		switch failed = unix.Connect(int(fd), address); {
		case errors.Is(failed, unix.EINPROGRESS), errors.Is(failed, unix.EALREADY), errors.Is(failed, unix.EINTR):
			return false
		case errors.Is(failed, unix.EISCONN):
			failed = nil
		}
		return true
	})
	if ctx.Err() != nil {
		err = ctx.Err()
	} else if err == nil && failed != nil {
		err = os.NewSyscallError("connect", failed)
	}
	if err != nil {
		return nil, fmt.Errorf("dial %v: %w", to, err)
	}
	return net.FileConn(socket)
}
