package vmmfake

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
)

// gate is what a guest passes before everything it does that can be seen from
// outside. It is open unless the machine is frozen.
type gate struct {
	mu     sync.RWMutex
	closed chan struct{} // nil while open; closed when it opens again
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed == nil {
		g.closed = make(chan struct{})
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed != nil {
		close(g.closed)
		g.closed = nil
	}
}

func (g *gate) isShut() bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.closed != nil
}

// pass waits until the gate is open, or done is closed.
func (g *gate) pass(done <-chan struct{}) { g.through(done, func() {}) }

// through does what the guest wants when the gate is open, or done is closed.
// The gate does not shut meanwhile: nothing is half done when a freeze returns.
func (g *gate) through(done <-chan struct{}, do func()) {
	for {
		g.mu.RLock()
		closed := g.closed
		if closed == nil {
			do()
			g.mu.RUnlock()
			return
		}
		g.mu.RUnlock()
		select {
		case <-closed:
		case <-done:
			do()
			return
		}
	}
}

// Freeze stops the guest at its next sign of life.
func (m *machine) Freeze(context.Context) error { return m.whileAlive(m.gate.shut) }

// Thaw lets it go on.
func (m *machine) Thaw(context.Context) error { return m.whileAlive(m.gate.open) }

func (m *machine) whileAlive(do func()) error {
	select {
	case <-m.done:
		return errors.New("fake: the machine is gone")
	default:
		do()
		return nil
	}
}

// gated is a console that prints nothing while the machine is frozen.
type gated struct {
	io.Writer
	gate *gate
	done <-chan struct{}
}

func (g gated) Write(p []byte) (n int, err error) {
	g.gate.through(g.done, func() { n, err = g.Writer.Write(p) })
	return n, err
}

// behind answers nothing while the machine is frozen.
func behind(pass func(done <-chan struct{}), handler http.Handler) http.Handler {
	if pass == nil {
		return handler
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		pass(r.Context().Done())
		handler.ServeHTTP(w, r)
	})
}
