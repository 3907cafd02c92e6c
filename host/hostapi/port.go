package hostapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"connectrpc.com/connect"

	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1/hostv1connect"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// AgentPort is where the guest agent listens. Control keeps what only the host may
// ask of it from everybody else.
const AgentPort = 49983

// AgentControl are the paths at that port which nobody but the host may ask.
var AgentControl = []string{"/init", "/freeze", "/thaw", "/poweroff"}

// portPiece is how many bytes of a connection one message carries at most.
const portPiece = 64 << 10

// PortStream is the host's side of a connection to a port of a guest.
type PortStream = connect.BidiStream[hostv1.OpenPortRequest, hostv1.OpenPortResponse]

// HalfCloser is a connection of which one half can be ended.
type HalfCloser interface {
	net.Conn
	CloseWrite() error
}

// CarryPort says that conn is open and carries it until both halves have ended,
// either side has failed, or ctx ends. Whoever calls it closes conn, at the latest
// when ctx ends.
func CarryPort(ctx context.Context, stream *PortStream, conn HalfCloser) error {
	opened := &hostv1.OpenPortResponse{Message: &hostv1.OpenPortResponse_Opened_{Opened: &hostv1.OpenPortResponse_Opened{}}}
	if err := stream.Send(opened); err != nil {
		return err
	}
	callerEnded := make(chan struct{})
	go func() { // ends with the stream, which ends with the call
		defer close(callerEnded)
		toGuest(stream, conn)
	}()
	buf := make([]byte, portPiece)
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			msg := &hostv1.OpenPortResponse{Message: &hostv1.OpenPortResponse_Data{Data: buf[:n]}}
			if err := stream.Send(msg); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	end := &hostv1.OpenPortResponse{Message: &hostv1.OpenPortResponse_End_{End: &hostv1.OpenPortResponse_End{}}}
	if err := stream.Send(end); err != nil {
		return err
	}
	select {
	case <-callerEnded:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// toGuest passes the caller's bytes on, and the end of his half. What is wrong
// with the guest's half shows where it is read.
func toGuest(stream *PortStream, conn HalfCloser) {
	for {
		msg, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			_ = conn.CloseWrite() // a connection that is closed needs none
			return
		}
		if err != nil {
			_ = conn.Close() // the caller is gone
			return
		}
		if _, err := conn.Write(msg.GetData()); err != nil {
			return
		}
	}
}

// PortConn is a connection to a port of a guest, as control has it. It has no
// deadlines; Close ends what is under way.
type PortConn struct {
	stream *connect.BidiStreamForClient[hostv1.OpenPortRequest, hostv1.OpenPortResponse]
	cancel context.CancelFunc
	once   sync.Once
	closed chan struct{}

	reading sync.Mutex // guards what is below
	rest    []byte     // of the last message
	ended   error      // io.EOF when the guest has ended its half

	writing sync.Mutex // a stream takes one sender at a time
}

var _ HalfCloser = (*PortConn)(nil)

// OpenPort connects to a port of a sandbox. The context bounds the opening, not
// the connection.
func OpenPort(ctx context.Context, host hostv1connect.HostServiceClient, id string, port int) (*PortConn, error) {
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	c := &PortConn{stream: host.OpenPort(life), cancel: cancel, closed: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() }) // it never fails
	err := c.open(id, port)
	if !stop() && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = c.Close() // as above
		return nil, err
	}
	return c, nil
}

func (c *PortConn) open(id string, port int) error {
	start := &hostv1.OpenPortRequest_Start{Id: id, Port: uint32(port)}
	_ = c.stream.Send(&hostv1.OpenPortRequest{Message: &hostv1.OpenPortRequest_Start_{Start: start}}) // the answer has the reason
	msg, err := c.stream.Receive()
	if err != nil {
		return FromConnect(err)
	}
	if msg.GetOpened() == nil {
		return errors.New("the host did not say that the port is open")
	}
	return nil
}

// Read reads what the guest sends.
func (c *PortConn) Read(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	for len(c.rest) == 0 && len(p) > 0 {
		if c.ended != nil {
			return 0, c.ended
		}
		msg, err := c.stream.Receive()
		switch {
		case err != nil:
			c.ended = c.failure(err)
		case msg.GetEnd() != nil:
			c.ended = io.EOF
		}
		c.rest = msg.GetData()
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// failure is what a broken stream means. A host that ends it without the guest's
// end has lost the connection.
func (c *PortConn) failure(err error) error {
	select {
	case <-c.closed:
		return net.ErrClosed
	default:
	}
	if errors.Is(err, io.EOF) {
		return sandbox.Errorf(sandbox.KindTransient, "the connection to the host was lost: %w", io.ErrUnexpectedEOF)
	}
	return FromConnect(err)
}

// Write waits until there is room on the way to the guest.
func (c *PortConn) Write(p []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	written := 0
	for written < len(p) {
		piece := p[written:min(len(p), written+portPiece)]
		if err := c.stream.Send(&hostv1.OpenPortRequest{Message: &hostv1.OpenPortRequest_Data{Data: piece}}); err != nil {
			return written, c.writeFailure(err)
		}
		written += len(piece)
	}
	return written, nil
}

func (c *PortConn) writeFailure(err error) error {
	select {
	case <-c.closed:
		return net.ErrClosed
	default:
		return fmt.Errorf("write to the sandbox: %w", err)
	}
}

// CloseWrite ends our half.
func (c *PortConn) CloseWrite() error {
	c.writing.Lock()
	defer c.writing.Unlock()
	return c.stream.CloseRequest()
}

// Close ends the connection at once. It never fails and may be called twice.
func (c *PortConn) Close() error {
	c.once.Do(func() {
		close(c.closed)
		c.cancel()
		// Once an answer has begun, net/http's HTTP/2 does not look at the context
		// while it waits for more of the request: that has to be closed too.
		_ = c.stream.CloseResponse() // what a cancelled stream says is no news
		_ = c.stream.CloseRequest()  // likewise
	})
	return nil
}

type portAddr struct{}

func (portAddr) Network() string { return "sandbox" }
func (portAddr) String() string  { return "sandbox" }

// LocalAddr is of no use.
func (c *PortConn) LocalAddr() net.Addr { return portAddr{} }

// RemoteAddr is of no use.
func (c *PortConn) RemoteAddr() net.Addr { return portAddr{} }

// SetDeadline is not possible, as are its sisters.
func (c *PortConn) SetDeadline(time.Time) error { return os.ErrNoDeadline }

// SetReadDeadline is not possible.
func (c *PortConn) SetReadDeadline(time.Time) error { return os.ErrNoDeadline }

// SetWriteDeadline is not possible.
func (c *PortConn) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }
