package client

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// StreamOptions is what an exec stream is connected to.
type StreamOptions struct {
	// Stdin says that the caller will Write input; without it the command reads
	// /dev/null.
	Stdin bool
	// Stdout and Stderr get the output in the order in which it arrives, from
	// one goroutine. A writer that blocks holds the command back; one that fails
	// ends the stream. Nil discards.
	Stdout, Stderr io.Writer
}

// Exit is how a command ended.
type Exit struct {
	Code     int
	Status   string // "exit status 3", "signal: killed"
	TimedOut bool
}

// Stream is one running command. Its methods may be called concurrently.
type Stream struct {
	conn   *websocket.Conn
	ctx    context.Context // of the ExecStream call, which bounds the whole stream
	cancel context.CancelFunc
	opts   StreamOptions
	tty    bool // messages of bytes are of one channel only
	pid    uint32
	window window

	patience time.Duration // with a server that says nothing; 0: without end
	silent   atomic.Bool   // it was at an end

	done chan struct{} // closed when the fields below are set
	exit Exit
	err  error
}

// stdinChunk is how much input one message carries.
const stdinChunk = 64 << 10

// ExecStream starts a command and returns once it runs. The context bounds the
// whole stream: when it ends, or after Close, the server kills the command.
// The caller must Wait or Close.
func (c *Client) ExecStream(ctx context.Context, id string, req api.Exec, opts StreamOptions) (*Stream, error) {
	return c.stream(ctx, id, "/exec/stream", &Stream{opts: opts}, api.StreamMessage{Type: api.StreamStart, Exec: &req, Stdin: opts.Stdin})
}

// stream opens a stream and returns once its command runs.
func (c *Client) stream(ctx context.Context, id, at string, s *Stream, first api.StreamMessage) (*Stream, error) {
	path, err := sandboxPath(id, at)
	if err != nil {
		return nil, err
	}
	if s.conn, err = c.dial(ctx, path); err != nil {
		return nil, err
	}
	s.done = make(chan struct{})
	s.ctx, s.cancel = context.WithCancel(ctx)
	s.window.init()
	if err := s.start(first); err != nil {
		s.cancel()
		_ = s.conn.CloseNow() // the first error is the one to report
		return nil, err
	}
	go s.pump()
	return s, nil
}

func (c *Client) dial(ctx context.Context, path string) (*websocket.Conn, error) {
	h := http.Header{}
	c.authorize(h)
	conn, resp, err := websocket.Dial(ctx, c.base+path, &websocket.DialOptions{HTTPClient: c.http, HTTPHeader: h})
	switch {
	case err == nil:
		conn.SetReadLimit(api.MaxStreamMessage + 1)
		return conn, nil
	case resp != nil && resp.StatusCode >= 300:
		return nil, readError(resp)
	}
	return nil, networkError(ctx, "open stream "+path, err)
}

// start asks for the command and waits until it runs.
func (s *Stream) start(first api.StreamMessage) error {
	if err := s.sendText(s.ctx, first); err != nil {
		return err
	}
	for {
		typ, data, err := s.conn.Read(s.ctx)
		if err != nil {
			return networkError(s.ctx, "start command", err)
		}
		if typ != websocket.MessageText {
			return sandbox.Errorf(sandbox.KindInternal, "start command: the server sent output before the start")
		}
		msg, err := decodeMessage(data)
		if err != nil {
			return err
		}
		switch msg.Type {
		case api.StreamStarted:
			s.pid = msg.PID
			return nil
		case api.StreamError:
			return streamError(msg)
		}
	}
}

func decodeMessage(data []byte) (api.StreamMessage, error) {
	var msg api.StreamMessage
	if err := json.Unmarshal(data, &msg); err != nil {
		return msg, sandbox.Errorf(sandbox.KindInternal, "read stream: %w", err)
	}
	return msg, nil
}

func streamError(msg api.StreamMessage) error {
	e := &Error{Kind: sandbox.KindInternal, Message: "the stream ended with an error that was not named"}
	if msg.Error != nil {
		e.fill(*msg.Error)
	}
	return e
}

// PID is the command's process ID inside the sandbox.
func (s *Stream) PID() uint32 { return s.pid }

// Wait returns how the command ended, after all its output was written.
func (s *Stream) Wait() (Exit, error) {
	<-s.done
	return s.exit, s.err
}

// Close ends the stream, which kills a command that still runs, and returns
// when no goroutine of it is left. It may be called twice, and after Wait.
func (s *Stream) Close() error {
	s.cancel()
	_ = s.conn.CloseNow() // an error here means that it is closed already
	<-s.done
	return nil
}

// Kill sends api.SignalTerm or api.SignalKill to the command.
func (s *Stream) Kill(signal string) error {
	return s.sendText(s.ctx, api.StreamMessage{Type: api.StreamKill, Signal: signal})
}

// CloseStdin tells the command that its input has ended.
func (s *Stream) CloseStdin() error {
	return s.sendText(s.ctx, api.StreamMessage{Type: api.StreamCloseStdin})
}

// Write sends input. It blocks while the command does not read.
func (s *Stream) Write(p []byte) (int, error) {
	buf := make([]byte, 0, min(len(p), stdinChunk)+1)
	written := 0
	for written < len(p) {
		n := min(len(p)-written, stdinChunk)
		if !s.window.take(n) {
			return written, s.ended("write input")
		}
		buf = buf[:0]
		if !s.tty {
			buf = append(buf, api.ChannelStdin)
		}
		buf = append(buf, p[written:written+n]...)
		if err := s.conn.Write(s.ctx, websocket.MessageBinary, buf); err != nil {
			return written, s.writeError("write input", err)
		}
		written += n
	}
	return written, nil
}

func (s *Stream) sendText(ctx context.Context, msg api.StreamMessage) error {
	b, err := json.Marshal(msg)
	if err != nil {
		return fmt.Errorf("encode %s message: %w", msg.Type, err)
	}
	if err := s.conn.Write(ctx, websocket.MessageText, b); err != nil {
		return s.writeError("send "+msg.Type, err)
	}
	return nil
}

func (s *Stream) writeError(doing string, err error) error {
	select {
	case <-s.done:
		return s.ended(doing)
	default:
		return networkError(s.ctx, doing, err)
	}
}

func (s *Stream) ended(doing string) error {
	return sandbox.WithKind(sandbox.KindConflict, fmt.Errorf("%s: the command has ended: %w", doing, io.ErrClosedPipe))
}

// pump carries everything that the server sends, until the end.
func (s *Stream) pump() {
	defer close(s.done)
	defer s.window.close()
	s.exit, s.err = s.receive()
	if s.err == nil {
		_ = s.conn.Close(websocket.StatusNormalClosure, "") // the exit is known; a failed goodbye changes nothing
	} else {
		_ = s.conn.CloseNow() // the error that led here is reported
	}
	s.cancel()
}

func (s *Stream) receive() (Exit, error) {
	var buf bytes.Buffer // reused: messages are bounded by the read limit
	for {
		typ, err := s.next(&buf)
		if err != nil {
			return Exit{}, err
		}
		if typ == websocket.MessageBinary {
			if err := s.output(buf.Bytes()); err != nil {
				return Exit{}, err
			}
			continue
		}
		msg, err := decodeMessage(buf.Bytes())
		if err != nil {
			return Exit{}, err
		}
		switch msg.Type {
		case api.StreamExit:
			return exitOf(msg), nil
		case api.StreamError:
			return Exit{}, streamError(msg)
		case api.StreamStdinAck:
			s.window.ack(msg.Bytes)
		}
	}
}

// next reads a message.
func (s *Stream) next(buf *bytes.Buffer) (websocket.MessageType, error) {
	if s.patience > 0 {
		defer time.AfterFunc(s.patience, func() { s.silent.Store(true); s.cancel() }).Stop()
	}
	typ, r, err := s.conn.Reader(s.ctx)
	if err == nil {
		buf.Reset()
		_, err = buf.ReadFrom(r)
	}
	switch {
	case err == nil:
		return typ, nil
	case s.silent.Load():
		return typ, sandbox.Errorf(sandbox.KindTransient, "read stream: the server has said nothing for %v", s.patience)
	}
	return typ, networkError(s.ctx, "read stream", err)
}

func exitOf(msg api.StreamMessage) Exit {
	e := Exit{Code: -1, Status: msg.Status, TimedOut: msg.TimedOut}
	if msg.ExitCode != nil {
		e.Code = *msg.ExitCode
	}
	return e
}

// output hands one message's bytes to its writer.
func (s *Stream) output(data []byte) error {
	w := s.opts.Stdout
	if !s.tty {
		if len(data) == 0 {
			return sandbox.Errorf(sandbox.KindInternal, "read stream: an empty binary message")
		}
		switch data[0] {
		case api.ChannelStdout:
		case api.ChannelStderr:
			w = s.opts.Stderr
		default:
			return nil // a channel of a newer server
		}
		data = data[1:]
	}
	if w == nil {
		return nil
	}
	if _, err := w.Write(data); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// window counts input that the server has not acknowledged.
type window struct {
	mu     sync.Mutex
	cond   *sync.Cond
	sent   int64
	acked  int64
	closed bool
}

func (w *window) init() { w.cond = sync.NewCond(&w.mu) }

// take waits until n more bytes may be sent; false means that it is over.
func (w *window) take(n int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for !w.closed && w.sent-w.acked+int64(n) > api.StdinWindow {
		w.cond.Wait()
	}
	w.sent += int64(n)
	return !w.closed
}

func (w *window) ack(total int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.acked = max(w.acked, total)
	w.cond.Broadcast()
}

func (w *window) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.cond.Broadcast()
}
