package host

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Bounds on connections to the ports of one sandbox: what is open, and what is
// being opened. A guest that answers no SYN keeps the latter for dialLimit.
const (
	maxPortConns  = 256
	portDialsOnce = 32
)

// PortConn is a connection to a TCP port of a guest. It ends with its sandbox, or
// with the context that it was opened with.
type PortConn struct {
	*net.TCPConn
	ctx   context.Context
	leave func()
}

// OpenPort connects to a port of a guest; the caller must Close.
func (a *Agent) OpenPort(ctx context.Context, id string, port int) (*PortConn, error) {
	if port < 1 || port > 65535 {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "port is %d, must be from 1 to 65535", port)
	}
	b, err := a.box(id)
	if err != nil {
		return nil, err
	}
	g, ctx, cancel, err := a.guestOf(ctx, b)
	if err != nil {
		return nil, err
	}
	leave, err := b.join()
	if err != nil {
		cancel()
		return nil, err
	}
	conn, err := g.dialPort(ctx, b.id, uint16(port))
	if err != nil {
		leave()
		cancel()
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // whoever reads it is told why
	return &PortConn{conn, ctx, func() { stop(); leave(); cancel() }}, nil
}

// Read reads what the guest sends. After the end of the sandbox its error is why.
func (c *PortConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	var op *net.OpError
	switch {
	case err == nil || !errors.As(err, &op):
		return n, err // the end of the guest's half is no error of the network
	case c.ctx.Err() != nil:
		return n, context.Cause(c.ctx)
	}
	return n, sandbox.Errorf(sandbox.KindUnanswered, "the connection was lost: %w", op.Err)
}

// Context ends with the connection's sandbox or its caller.
func (c *PortConn) Context() context.Context { return c.ctx }

// Close ends the connection. It may be called twice.
func (c *PortConn) Close() error {
	c.leave()
	err := c.TCPConn.Close()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// join counts a connection to a port as open until leave is called. This is the
// one place where they are counted: a sandbox that has any is not idle.
func (b *box) join() (leave func(), _ error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.joined >= maxPortConns {
		return nil, sandbox.Errorf(sandbox.KindBusy, "sandbox %s has %d connections to its ports, at most %d are allowed", b.id, b.joined, maxPortConns)
	}
	b.joined++
	left := false
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if !left {
			left = true
			b.joined--
		}
	}, nil
}

// dialPort connects to a port of the guest, within dialLimit.
func (g *guest) dialPort(ctx context.Context, id sandbox.ID, port uint16) (*net.TCPConn, error) {
	short, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	conn, err := g.tryPort(short, port)
	switch {
	case err == nil:
		return conn, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, sandbox.Errorf(sandbox.KindUnanswered, "nothing listens on port %d of sandbox %s; a server there must listen on 0.0.0.0, not on 127.0.0.1 alone", port, id)
	case short.Err() != nil:
		return nil, sandbox.Errorf(sandbox.KindTimeout, "port %d of sandbox %s does not answer within %v", port, id, dialLimit)
	}
	return nil, sandbox.Errorf(sandbox.KindUnanswered, "port %d of sandbox %s: %w", port, id, err)
}

func (g *guest) tryPort(ctx context.Context, port uint16) (*net.TCPConn, error) {
	select {
	case g.portDials <- struct{}{}:
		defer func() { <-g.portDials }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	conn, err := g.network.Dial(ctx, netip.AddrPortFrom(g.network.Guest().Addr(), port).String())
	if err != nil {
		return nil, err
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil, errors.Join(errors.New("it is no TCP connection"), conn.Close())
	}
	return tcp, nil
}
