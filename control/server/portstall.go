package server

import (
	"context"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// stall ends a request of whose body a guest takes nothing for too long. While a
// body waits to be passed on nobody reads the client's connection, so that a
// client that has gone is not noticed.
type stall struct {
	limit time.Duration

	mu    sync.Mutex
	timer *time.Timer
	over  bool // the answer has begun: whoever cannot be written to is noticed
}

func (s *Server) watchStall(ctx context.Context, to portRef) (context.Context, *stall) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &stall{limit: s.cfg.PortAnswer}
	w.timer = time.AfterFunc(w.limit, func() {
		cancel(sandbox.Errorf(sandbox.KindTimeout, "port %d of sandbox %s has taken nothing of the request for %v", to.port, to.id, w.limit))
	})
	w.timer.Stop()
	return ctx, w
}

// request watches the body of a request, if it has one.
func (w *stall) request(out *http.Request) {
	if out.Body != nil {
		out.Body = &stallBody{out.Body, w}
	}
}

// answered ends the watch.
func (w *stall) answered() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
	w.timer.Stop()
}

// waits says whether it is the guest that is waited for, or the client.
func (w *stall) waits(guest bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer.Stop()
	if guest && !w.over {
		w.timer.Reset(w.limit)
	}
}

type stallBody struct {
	io.ReadCloser
	watch *stall
}

func (b *stallBody) Read(p []byte) (int, error) {
	b.watch.waits(false)
	n, err := b.ReadCloser.Read(p)
	b.watch.waits(err == nil) // at the end of the body the transport has its own limit
	return n, err
}
