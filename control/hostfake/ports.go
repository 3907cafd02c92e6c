package hostfake

import (
	"context"
	"net"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Dial connects to a port of a made-up guest.
type Dial func(ctx context.Context, id string, port int) (net.Conn, error)

// SetDial says what is behind the ports of sandboxes. Without it nothing listens
// on any of them.
func (h *Host) SetDial(dial Dial) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dial = dial
}

// Conns says how many connections to ports are open now.
func (h *Host) Conns() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.conns
}

func (h *Host) countConn(by int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.conns += by
}

// OpenPort implements the contract.
func (h *Host) OpenPort(ctx context.Context, stream *hostapi.PortStream) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	id, port := first.GetStart().GetId(), int(first.GetStart().GetPort())
	if err := h.enter(ctx, "OpenPort", id); err != nil {
		return err
	}
	_, ctx, done, err := h.visit(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	conn, err := h.dialPort(ctx, id, port)
	if err != nil {
		return hostapi.ToConnect(err)
	}
	h.countConn(1)
	defer h.countConn(-1)
	defer func() { _ = conn.Close() }() // both sides have ended
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })() // as above
	err = hostapi.CarryPort(ctx, stream, conn)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return hostapi.ToConnect(err)
}

func (h *Host) dialPort(ctx context.Context, id string, port int) (hostapi.HalfCloser, error) {
	h.mu.Lock()
	dial := h.dial
	h.mu.Unlock()
	if dial == nil {
		return nil, sandbox.Errorf(sandbox.KindUnanswered, "nothing listens on port %d of sandbox %s", port, id)
	}
	conn, err := dial(ctx, id, port)
	if err != nil {
		return nil, err
	}
	half, ok := conn.(hostapi.HalfCloser)
	if !ok {
		return nil, sandbox.Errorf(sandbox.KindInternal, "a %T has no halves", conn)
	}
	return half, nil
}
