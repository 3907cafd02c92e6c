package server

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"github.com/coder/websocket"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/auth"
	"github.com/dormouse-sandbox/dormouse/control/store"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const (
	// strangerMessage bounds a message from a client that has not said who it is:
	// a key, and some JSON around it.
	strangerMessage = 4 << 10
	// firstLimit is how long a client may take to say who it is and what to run.
	firstLimit = 10 * time.Second
	// lingerLimit is how long a client may take to read what is left in the
	// sockets after the last message.
	lingerLimit = time.Minute
	// killLimit bounds the attempt to kill in good order before the host's
	// stream is cut, which kills as well.
	killLimit = 2 * time.Second
	// outChunk is the largest output message; larger ones of the host are split.
	outChunk = 256 << 10
)

// hostStream is the host's side of an exec stream.
type hostStream = connect.BidiStreamForClient[hostv1.ExecStreamRequest, hostv1.ExecStreamResponse]

// stream joins one WebSocket to one exec stream of the host.
//
// Three goroutines carry it: the handler's own brings output from the host to
// the client, one reads the client, one sends input to the host. A client that
// does not read blocks the first, which the host and the command feel. A command
// that does not read blocks the last; the reader then still has room for
// whatever a client within api.StdinWindow sends, and so hears a kill or a
// goodbye. When the client goes away the command is killed. What is quietly cut
// off by a network shows as a failing keep-alive once TCP gives up.
type stream struct {
	s    *Server
	id   sandbox.ID
	conn *websocket.Conn
	host *hostStream
	tty  *terminal // nil for a command with pipes

	known func()    // to be called when the client has said who it is
	key   store.Key // then

	// ctx is the session: it ends with the client, its key, the sandbox or the server.
	// The client is read with connCtx, which lasts longer: a read whose context
	// ends closes the connection, and nobody could be told why.
	ctx     context.Context
	cancel  context.CancelCauseFunc
	connCtx context.Context
	ended   atomic.Bool // the command has: a client that goes now is no loss

	sendMu sync.Mutex // the host's stream takes one sender at a time
	input  *inputQueue

	lastMu  sync.Mutex
	lastOut time.Time // when something was last written to the client
}

var errClientGone = sandbox.Errorf(sandbox.KindTransient, "the client went away")

// execStream serves the WebSocket of a command with pipes.
func (s *Server) execStream(w http.ResponseWriter, r *http.Request) error {
	return s.openStream(w, r, nil)
}

// openStream serves a WebSocket. A key in a header is checked before the upgrade,
// so that a wrong one is a plain 401.
func (s *Server) openStream(w http.ResponseWriter, r *http.Request, tty *terminal) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	var key store.Key
	secret, given := auth.FromRequest(r)
	if given {
		if key, err = s.cfg.Keys.Check(r.Context(), secret); err != nil {
			return err
		}
		setKnown(w)
	}
	if !strings.Contains(strings.ToLower(r.Header.Get("Upgrade")), "websocket") {
		return sandbox.Errorf(sandbox.KindInvalid, "this is a WebSocket: it cannot be read with a plain %s", r.Method)
	}
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{OriginPatterns: s.cfg.Origins})
	if err != nil {
		return nil // Accept has answered
	}
	defer func() { _ = conn.CloseNow() }() // after a Close it does nothing
	conn.SetReadLimit(strangerMessage)
	if given {
		conn.SetReadLimit(api.MaxStreamMessage + 1)
	}
	s.meters.streams.Inc()
	defer s.meters.streams.Dec()

	// The request's own context no longer follows the connection.
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(r.Context()))
	defer cancel(nil)
	st := &stream{
		s: s, tty: tty, known: func() { setKnown(w) }, key: key, id: id, conn: conn,
		ctx: ctx, cancel: cancel, connCtx: ctx, input: newInputQueue(), lastOut: s.cfg.Now(),
	}
	if err := st.serve(given); err != nil {
		st.sendError(err, requestID(r))
	}
	return nil
}

// serve runs the session. An error has not been told to the client yet.
func (st *stream) serve(authenticated bool) error {
	first, err := st.first(authenticated)
	if err != nil {
		return err
	}
	opening, err := st.opening(first)
	if err != nil {
		return err
	}
	ctx, done, err := st.s.enter(withKey(st.ctx, st.key), st.id)
	if err != nil {
		return err
	}
	defer done()
	st.ctx, st.cancel = context.WithCancelCause(ctx)
	defer st.cancel(nil)
	st.host = st.s.cfg.Host.ExecStream(st.ctx)
	// Once an answer has begun, net/http's HTTP/2 does not look at the context
	// while it waits for more of the request: that has to be closed too.
	defer context.AfterFunc(st.ctx, st.cutHost)()
	if err := st.send(opening); err != nil {
		return st.failure(err)
	}
	return st.run()
}

// run carries the session to its end and leaves no goroutine behind.
func (st *stream) run() error {
	var wg sync.WaitGroup
	gone := make(chan struct{})
	wg.Go(func() { defer close(gone); st.readClient() })
	wg.Go(st.feedHost)
	wg.Go(st.keepAlive)
	if st.tty != nil {
		wg.Go(func() { st.tty.feedSizes(st) })
		wg.Go(func() { st.tty.feedSignals(st) })
	}
	err := st.carryOutput()
	st.ended.Store(true)
	st.input.close() // from here on the reader only discards
	if err != nil {
		err = st.failure(err)
		st.sendError(err, "")
	}
	_ = st.host.CloseRequest() // the command has ended or is cut off below
	select {
	case <-gone:
	case <-time.After(lingerLimit):
	case <-st.ctx.Done():
	}
	_ = st.conn.Close(websocket.StatusNormalClosure, "") // a client that has gone needs no goodbye
	st.cancel(nil)
	st.cutHost()
	wg.Wait()
	return nil
}

// cutHost lets go of the host's stream at once. The host then kills the command.
func (st *stream) cutHost() {
	_ = st.host.CloseResponse() // what a cancelled stream says is no news
	_ = st.host.CloseRequest()
}

// first reads up to the message that says what to run.
func (st *stream) first(authenticated bool) (api.StreamMessage, error) {
	ctx, cancel := context.WithTimeout(st.ctx, firstLimit)
	defer cancel()
	for {
		typ, data, err := st.conn.Read(ctx)
		if err != nil {
			return api.StreamMessage{}, sandbox.Errorf(sandbox.KindInvalid, "read first message: %w", err)
		}
		if typ != websocket.MessageText {
			return api.StreamMessage{}, sandbox.Errorf(sandbox.KindInvalid, "the first message must be text")
		}
		var msg api.StreamMessage
		if err := DecodeStrict(data, &msg); err != nil {
			return msg, err
		}
		switch {
		case msg.Type == api.StreamAuth && !authenticated:
			if st.key, err = st.s.cfg.Keys.Check(ctx, msg.Key); err != nil {
				return msg, err
			}
			authenticated = true
			st.known()
			st.conn.SetReadLimit(api.MaxStreamMessage + 1)
		case !authenticated:
			_, err := st.s.cfg.Keys.Check(ctx, "")
			return msg, err
		default:
			return msg, nil
		}
	}
}

// opening is what the host is sent first.
func (st *stream) opening(msg api.StreamMessage) (*hostv1.ExecStreamRequest, error) {
	if st.tty != nil {
		return st.tty.opening(st.id, msg)
	}
	switch {
	case msg.Type != api.StreamStart:
		return nil, sandbox.Errorf(sandbox.KindInvalid, "expected a message of type %s, not %q", api.StreamStart, cut(msg.Type, 40))
	case msg.Exec == nil || msg.Exec.Stdin != "":
		return nil, sandbox.Errorf(sandbox.KindInvalid, "start needs exec, without stdin")
	case msg.Size != nil || msg.Keep:
		return nil, sandbox.Errorf(sandbox.KindInvalid, "size and keep are for a command in a terminal, at /v1/sandboxes/%s/pty", st.id)
	}
	command, err := commandOf(*msg.Exec)
	if err != nil {
		return nil, err
	}
	return startOf(&hostv1.ExecStreamRequest_Start{Id: string(st.id), Command: command, Stdin: msg.Stdin}), nil
}

func startOf(start *hostv1.ExecStreamRequest_Start) *hostv1.ExecStreamRequest {
	return &hostv1.ExecStreamRequest{Message: &hostv1.ExecStreamRequest_Start_{Start: start}}
}

// failure finds the reason behind an error of the host's stream.
func (st *stream) failure(err error) error {
	if cause := context.Cause(st.ctx); errors.Is(cause, errClientGone) {
		return cause
	}
	return st.s.hostError(st.ctx, st.id, err)
}

func (st *stream) send(msg *hostv1.ExecStreamRequest) error {
	st.sendMu.Lock()
	defer st.sendMu.Unlock()
	return st.host.Send(msg)
}

// carryOutput brings what the host sends to the client until the command ends.
func (st *stream) carryOutput() error {
	var buf []byte
	for {
		msg, err := st.host.Receive()
		if err != nil {
			return err
		}
		switch m := msg.GetMessage().(type) {
		case *hostv1.ExecStreamResponse_Started_:
			err = st.started(m.Started.GetPid())
		case *hostv1.ExecStreamResponse_Stdout:
			buf, err = st.sendOutput(buf, api.ChannelStdout, m.Stdout)
		case *hostv1.ExecStreamResponse_Stderr:
			buf, err = st.sendOutput(buf, api.ChannelStderr, m.Stderr)
		case *hostv1.ExecStreamResponse_End:
			code := int(m.End.GetExitCode())
			return st.sendText(api.StreamMessage{
				Type: api.StreamExit, ExitCode: &code, Status: m.End.GetStatus(), TimedOut: m.End.GetTimedOut(),
			})
		}
		if err != nil {
			st.cancel(errClientGone)
			return err
		}
	}
}

// started tells the client that its command runs.
func (st *stream) started(pid uint32) error {
	err := st.sendText(api.StreamMessage{Type: api.StreamStarted, PID: pid})
	if st.tty != nil {
		st.tty.started(st, pid, err == nil)
	}
	return err
}

// sendOutput writes bytes in messages of a bounded size; buf is used again.
func (st *stream) sendOutput(buf []byte, channel byte, data []byte) ([]byte, error) {
	for len(data) > 0 {
		n := min(len(data), outChunk)
		buf = buf[:0]
		if st.tty == nil { // of which there is only one
			buf = append(buf, channel)
		}
		buf = append(buf, data[:n]...)
		data = data[n:]
		if err := st.conn.Write(st.ctx, websocket.MessageBinary, buf); err != nil {
			return buf, err
		}
	}
	st.wrote()
	return buf, nil
}

func (st *stream) sendText(msg api.StreamMessage) error {
	b, err := json.Marshal(msg)
	if err != nil {
		panic(err) // our own type can always be encoded
	}
	st.wrote()
	return st.conn.Write(st.ctx, websocket.MessageText, b)
}

// sendError tells the client, if it is still there, why its session ends.
func (st *stream) sendError(err error, request string) {
	if errors.Is(err, errClientGone) {
		return
	}
	d := detail(err, request)
	if d.Code == string(sandbox.KindInternal) {
		st.s.cfg.Log.Error("internal error", "request", request, "op", "exec stream", "sandbox", st.id, "err", err)
	}
	b, encodeErr := json.Marshal(api.StreamMessage{Type: api.StreamError, Error: &d})
	if encodeErr != nil {
		panic(encodeErr) // as above
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(st.ctx), firstLimit)
	defer cancel()
	_ = st.conn.Write(ctx, websocket.MessageText, b)         // the client may be gone
	_ = st.conn.Close(websocket.StatusNormalClosure, d.Code) // likewise
}

func (st *stream) wrote() {
	st.lastMu.Lock()
	defer st.lastMu.Unlock()
	st.lastOut = st.s.cfg.Now()
}

func (st *stream) idle() time.Duration {
	st.lastMu.Lock()
	defer st.lastMu.Unlock()
	return st.s.cfg.Now().Sub(st.lastOut)
}

// keepAlive writes something on an idle stream. It is a message and not a ping:
// a ping that waits for five seconds behind a slow reader would end the stream.
func (st *stream) keepAlive() {
	tick := time.NewTicker(st.s.cfg.KeepAlive)
	defer tick.Stop()
	for {
		select {
		case <-st.ctx.Done():
			return
		case <-tick.C:
		}
		if st.idle() < st.s.cfg.KeepAlive {
			continue
		}
		if err := st.sendText(api.StreamMessage{Type: api.StreamKeepAlive}); err != nil {
			return // the reader sees it too
		}
	}
}
