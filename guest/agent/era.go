package agent

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"
)

// errPast ends the calls of a machine's past.
var errPast = connect.NewError(connect.CodeUnavailable,
	errors.New("the sandbox went on from a snapshot: this call belongs to the time before it"))

// pastGrace is how long a call of the past may take to tell its client that it
// ends, should there still be one. Tests have more.
var pastGrace = time.Second

// era knows the calls and the connections since the machine was told who it is.
type era struct {
	mu    sync.Mutex
	calls map[*context.CancelCauseFunc]struct{}
	conns map[net.Conn]struct{}
}

func newEra() *era {
	return &era{calls: map[*context.CancelCauseFunc]struct{}{}, conns: map[net.Conn]struct{}{}}
}

// belonging makes a handler whose calls end with the era.
func (e *era) belonging(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancelCause(r.Context())
		e.mu.Lock()
		e.calls[&cancel] = struct{}{}
		e.mu.Unlock()
		defer func() {
			e.mu.Lock()
			delete(e.calls, &cancel)
			e.mu.Unlock()
			cancel(nil)
		}()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// track is a server's ConnState.
func (e *era) track(conn net.Conn, state http.ConnState) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch state {
	case http.StateNew:
		e.conns[conn] = struct{}{}
	case http.StateClosed, http.StateHijacked:
		delete(e.conns, conn)
	}
}

type connKey struct{}

// withConn is a server's ConnContext.
func withConn(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, conn)
}

// end ends every call, and every connection but that of the call which says so.
// When it returns, each context has ended; what writes to a peer that is not there
// any more has until pastGrace.
func (e *era) end(ctx context.Context) {
	spared, _ := ctx.Value(connKey{}).(net.Conn)
	e.mu.Lock()
	defer e.mu.Unlock()
	for cancel := range e.calls {
		(*cancel)(errPast)
	}
	var past []net.Conn
	for conn := range e.conns {
		if conn != spared {
			past = append(past, conn)
			_ = conn.SetDeadline(time.Now().Add(pastGrace)) // closed already: then it has ended
		}
	}
	time.AfterFunc(pastGrace, func() { abandon(past) })
}

// abandon closes connections without waiting for peers that are not there.
func abandon(conns []net.Conn) {
	for _, conn := range conns {
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // closed already
		}
		_ = conn.Close() // likewise
	}
}
