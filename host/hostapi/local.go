package hostapi

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Local serves a handler to one client within this process, over pairs of
// connected sockets: the same contract, flow control and cancellation as
// between two machines, and no address that anybody else could connect to.
type Local struct {
	server *http.Server
	pipe   *pairListener
	client *http.Client
	done   chan struct{}
}

// localWindow is how much one stream may have on its way, in bytes. Output of a
// command passes through here: the default of 64 KiB would cost a round trip
// each.
//
// A connection's window is what all its streams have on their way together, and
// whoever does not read keeps his part of it: as many streams as would use it up
// would stop every other call, a destroy too. So a connection takes fewer streams
// than that, and for more of them there is another connection.
const (
	localWindow     = 1 << 20
	localConnWindow = 1 << 30
	localStreams    = localConnWindow/localWindow - 100
)

// NewLocal starts serving.
func NewLocal(handler http.Handler) *Local {
	var h2c http.Protocols
	h2c.SetUnencryptedHTTP2(true)
	tuning := &http.HTTP2Config{
		MaxConcurrentStreams: localStreams, MaxReceiveBufferPerStream: localWindow, MaxReceiveBufferPerConnection: localConnWindow,
	}
	l := &Local{pipe: newPairListener(), done: make(chan struct{})}
	l.server = &http.Server{Handler: handler, Protocols: &h2c, HTTP2: tuning, ReadHeaderTimeout: 10 * time.Second}
	l.client = &http.Client{Transport: &http.Transport{
		Protocols: &h2c, HTTP2: tuning,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return l.pipe.dial(ctx) },
	}}
	go func() {
		defer close(l.done)
		_ = l.server.Serve(l.pipe) // always ErrServerClosed
	}()
	return l
}

// Client reaches the handler; any host name will do.
func (l *Local) Client() *http.Client { return l.client }

// BaseURL is what a generated client is made with.
func (l *Local) BaseURL() string { return "http://host.local" }

// Close ends what is under way and stops serving.
func (l *Local) Close() error {
	err := l.server.Close()
	<-l.done
	l.client.CloseIdleConnections()
	return err
}

// pairListener accepts the other halves of socket pairs.
type pairListener struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func newPairListener() *pairListener {
	return &pairListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (p *pairListener) dial(ctx context.Context) (net.Conn, error) {
	near, far, err := socketPair()
	if err != nil {
		return nil, err
	}
	select {
	case p.conns <- far:
		return near, nil
	case <-p.closed:
		err = net.ErrClosed
	case <-ctx.Done():
		err = ctx.Err()
	}
	return nil, errors.Join(err, near.Close(), far.Close())
}

func (p *pairListener) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pairListener) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (p *pairListener) Addr() net.Addr { return &net.UnixAddr{Name: "local", Net: "unix"} }

func socketPair() (near, far net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	near, errNear := fileConn(fds[0])
	far, errFar := fileConn(fds[1])
	if err := errors.Join(errNear, errFar); err != nil {
		for _, c := range []net.Conn{near, far} {
			if c != nil {
				err = errors.Join(err, c.Close())
			}
		}
		return nil, nil, err
	}
	return near, far, nil
}

// fileConn takes the descriptor over.
func fileConn(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "socketpair")
	c, err := net.FileConn(f)
	return c, errors.Join(err, f.Close())
}
