package exec

import (
	"context"
	"sync"
)

// gate lets starts pass, but while it is held. The zero value is open.
//
// A command that were started into frozen cgroups would never get to its exec, and
// the start would wait for that with a lock of the runtime that every other start
// needs.
type gate struct {
	mu     sync.Mutex
	inside int
	opened chan struct{} // closed when the hold ends; nil while there is none
	empty  chan struct{} // closed when the last one has left; nil unless hold waits for it
}

// enter waits while the gate is held. After an error there is nothing to leave.
func (g *gate) enter(ctx context.Context) error {
	for {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		g.mu.Lock()
		opened := g.opened
		if opened == nil {
			g.inside++
		}
		g.mu.Unlock()
		if opened == nil {
			return nil
		}
		select {
		case <-opened:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.inside--
	if g.inside == 0 && g.empty != nil {
		close(g.empty)
		g.empty = nil
	}
}

// hold closes the gate and waits for those inside. After an error it is open.
func (g *gate) hold(ctx context.Context) error {
	g.mu.Lock()
	if g.opened == nil {
		g.opened = make(chan struct{})
	}
	if g.inside == 0 {
		g.mu.Unlock()
		return nil
	}
	if g.empty == nil {
		g.empty = make(chan struct{})
	}
	empty := g.empty
	g.mu.Unlock()
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
		g.release()
		return ctx.Err()
	}
}

func (g *gate) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.opened != nil {
		close(g.opened)
		g.opened = nil
	}
}

// Hold makes new commands wait until Release, and returns when none is just being
// started. After an error nothing waits. Holding twice is fine.
func (s *Server) Hold(ctx context.Context) error { return s.gate.hold(ctx) }

// Release lets commands start.
func (s *Server) Release() { s.gate.release() }
