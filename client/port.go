package client

import (
	"context"
	"io"
	"net/http"
	"strconv"
	"sync"

	"github.com/coder/websocket"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// OpenPort says how to reach a port of a sandbox, and makes a token for it.
func (c *Client) OpenPort(ctx context.Context, id string, req api.OpenPort) (out api.Port, err error) {
	path, err := sandboxPath(id, "/ports")
	if err != nil {
		return out, err
	}
	return out, c.do(ctx, call{method: http.MethodPost, path: path, in: req}, &out)
}

// PortConn is a TCP connection to a port of a sandbox. One goroutine reads it and
// one writes it; Close may be called by any.
type PortConn struct {
	conn   *websocket.Conn
	ctx    context.Context // of the connection: Close ends it
	cancel context.CancelFunc

	message io.Reader // what is left of a message
	ended   error     // what reading has come to

	writing sync.Mutex
}

// DialPort connects to a port of a sandbox. The context bounds the dialling, not
// the connection.
func (c *Client) DialPort(ctx context.Context, id string, port int) (*PortConn, error) {
	path, err := sandboxPath(id, "/tcp/"+strconv.Itoa(port))
	if err != nil {
		return nil, err
	}
	conn, err := c.dial(ctx, path)
	if err != nil {
		return nil, err
	}
	p := &PortConn{conn: conn}
	p.ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	return p, nil
}

// Read reads what the guest sends, io.EOF at the end of its half. A connection
// that was lost says why.
func (p *PortConn) Read(b []byte) (int, error) {
	for {
		if p.message != nil {
			n, err := p.message.Read(b)
			if err == io.EOF {
				p.message, err = nil, nil
			}
			if n > 0 || err != nil {
				return n, err
			}
			continue
		}
		if p.ended != nil {
			return 0, p.ended
		}
		if p.ended = p.next(); p.ended != nil {
			return 0, p.ended
		}
	}
}

// next reads up to the next message with bytes in it.
func (p *PortConn) next() error {
	kind, r, err := p.conn.Reader(p.ctx)
	if err != nil {
		return networkError(p.ctx, "read from the sandbox", err)
	}
	if kind == websocket.MessageBinary {
		p.message = r
		return nil
	}
	data, err := io.ReadAll(r)
	if err != nil {
		return networkError(p.ctx, "read from the sandbox", err)
	}
	msg, err := decodeMessage(data)
	switch {
	case err != nil:
		return err
	case msg.Type == api.StreamEnd:
		return io.EOF
	case msg.Type == api.StreamError:
		return streamError(msg)
	}
	return nil
}

// Write sends bytes to the guest. It blocks while the guest does not read.
func (p *PortConn) Write(b []byte) (int, error) {
	p.writing.Lock()
	defer p.writing.Unlock()
	written := 0
	for written < len(b) {
		piece := b[written:min(len(b), written+stdinChunk)]
		if err := p.conn.Write(p.ctx, websocket.MessageBinary, piece); err != nil {
			return written, sandbox.WithKind(sandbox.KindTransient, networkError(p.ctx, "write to the sandbox", err))
		}
		written += len(piece)
	}
	return written, nil
}

// CloseWrite ends our half: the guest reads to its end.
func (p *PortConn) CloseWrite() error {
	p.writing.Lock()
	defer p.writing.Unlock()
	err := p.conn.Write(p.ctx, websocket.MessageText, []byte(`{"type":"`+api.StreamEnd+`"}`))
	if err != nil {
		return networkError(p.ctx, "end what is written to the sandbox", err)
	}
	return nil
}

// Close ends the connection at once. It never fails and may be called twice.
func (p *PortConn) Close() error {
	p.cancel()
	_ = p.conn.CloseNow() // an error here means that it is closed already
	return nil
}
