package server

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// portTCP carries a TCP connection to a port of a sandbox in a WebSocket. What
// keeps it from being opened is a plain answer.
func (s *Server) portTCP(w http.ResponseWriter, r *http.Request) error {
	to := portRef{prefix: r.URL.Path} // never by cookie
	if err := to.set(r.PathValue("id"), r.PathValue("port")); err != nil {
		return err
	}
	key, err := s.visitor(r, to)
	if err != nil {
		return err
	}
	setKnown(w)
	if !strings.Contains(strings.ToLower(r.Header.Get("Upgrade")), "websocket") {
		return sandbox.Errorf(sandbox.KindInvalid, "this is a WebSocket: it cannot be read with a plain %s", r.Method)
	}
	if to.port == hostapi.AgentPort { // what passes could not be looked at
		return sandbox.Errorf(sandbox.KindInvalid, "the guest agent's port can be reached by HTTP only, at /v1/sandboxes/%s/ports/%d/", to.id, to.port)
	}
	// The request's own context does not follow the connection.
	ctx, done, err := s.enter(withKey(context.WithoutCancel(r.Context()), key), to.id)
	if err != nil {
		return err
	}
	defer done()
	guest, err := hostapi.OpenPort(ctx, s.cfg.Host, string(to.id), to.port)
	if err != nil {
		return s.hostError(ctx, to.id, err)
	}
	defer func() { _ = guest.Close() }() // it never fails
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{OriginPatterns: s.cfg.Origins})
	if err != nil {
		return nil // Accept has answered
	}
	conn.SetReadLimit(api.MaxStreamMessage)
	s.meters.streams.Inc()
	defer s.meters.streams.Dec()
	t := &tunnel{s: s, id: to.id, conn: conn, guest: guest}
	t.run(ctx)
	return nil
}

// tunnel joins one WebSocket to one connection of a guest. Each direction has a
// goroutine that reads only as fast as the other side takes.
type tunnel struct {
	s     *Server
	id    sandbox.ID
	conn  *websocket.Conn
	guest *hostapi.PortConn
	wrote atomic.Bool // something went to the client since the last sign of life
}

// run carries both directions to their end and leaves no goroutine behind.
func (t *tunnel) run(session context.Context) {
	ctx, cancel := context.WithCancelCause(session)
	defer context.AfterFunc(ctx, func() { _ = t.guest.Close() })() // it never fails
	// The client is written to for a moment after the end of the session, to be
	// told why.
	connCtx, drop := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	ended := make(chan struct{})
	for _, work := range []func() error{
		func() error { return t.fromClient(connCtx, ended) },
		func() error { return t.keepAlive(ctx, connCtx) },
	} {
		wg.Go(func() {
			if err := work(); err != nil {
				cancel(err)
			}
		})
	}
	err := t.fromGuest(connCtx)
	if err == nil {
		select {
		case <-ended:
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	if err != nil {
		t.fail(connCtx, ctx, err)
	}
	cancel(nil)
	_ = t.guest.Close()                                 // lets go of a client's bytes that it does not take
	_ = t.conn.Close(websocket.StatusNormalClosure, "") // a client that has gone needs no goodbye
	drop()
	wg.Wait()
}

// fromGuest brings the guest's bytes, and the end of its half.
func (t *tunnel) fromGuest(ctx context.Context) error {
	buf := buffers.Get()
	defer buffers.Put(buf)
	for {
		n, err := t.guest.Read(buf)
		if n > 0 {
			t.wrote.Store(true)
			if err := t.conn.Write(ctx, websocket.MessageBinary, buf[:n]); err != nil {
				return errClientGone
			}
		}
		if errors.Is(err, io.EOF) {
			return t.say(ctx, api.StreamMessage{Type: api.StreamEnd})
		}
		if err != nil {
			return err
		}
	}
}

// fromClient takes the client's bytes, and the end of its half, until it is gone
// or says something wrong. What is wrong with the guest shows where it is read.
func (t *tunnel) fromClient(ctx context.Context, ended chan<- struct{}) error {
	over := false
	for {
		kind, r, err := t.conn.Reader(ctx)
		switch {
		case err != nil:
			return errClientGone
		case over:
			return sandbox.Errorf(sandbox.KindInvalid, "after a message of type %s nothing can be sent", api.StreamEnd)
		case kind == websocket.MessageBinary:
			if _, err := io.Copy(t.guest, r); err != nil {
				return nil // it is closed, and read elsewhere
			}
			continue
		}
		if err := readEnd(r); err != nil {
			return err
		}
		over = true
		_ = t.guest.CloseWrite() // as with the bytes
		close(ended)
	}
}

func readEnd(r io.Reader) error {
	data, err := io.ReadAll(r)
	if err != nil {
		return errClientGone
	}
	var msg api.StreamMessage
	if err := DecodeStrict(data, &msg); err != nil {
		return err
	}
	if msg.Type != api.StreamEnd {
		return sandbox.Errorf(sandbox.KindInvalid, "a message of type %q makes no sense here", cut(msg.Type, 40))
	}
	return nil
}

// keepAlive writes something on an idle connection, so that proxies in between
// keep it.
func (t *tunnel) keepAlive(ctx, connCtx context.Context) error {
	tick := time.NewTicker(t.s.cfg.KeepAlive)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if t.wrote.Swap(false) {
			continue
		}
		if err := t.say(connCtx, api.StreamMessage{Type: api.StreamKeepAlive}); err != nil {
			return err
		}
	}
}

func (t *tunnel) say(ctx context.Context, msg api.StreamMessage) error {
	b, err := json.Marshal(msg)
	if err != nil {
		panic(err) // our own type can always be encoded
	}
	if t.conn.Write(ctx, websocket.MessageText, b) != nil {
		return errClientGone
	}
	return nil
}

// fail tells the client why its connection ends, if it is still there.
func (t *tunnel) fail(connCtx, session context.Context, err error) {
	cause := context.Cause(session)
	if errors.Is(err, errClientGone) || errors.Is(cause, errClientGone) {
		return
	}
	if !sandbox.Is(cause, sandbox.KindInvalid) { // the client's own fault
		cause = t.s.hostError(session, t.id, err)
	}
	d := detail(cause, "")
	ctx, cancel := context.WithTimeout(connCtx, firstLimit)
	defer cancel()
	_ = t.say(ctx, api.StreamMessage{Type: api.StreamError, Error: &d}) // the client may be gone
}
