package main

import (
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/term"
)

// rawMode is our own terminal while it passes on each byte as it is typed, Ctrl-C
// too. Whoever ends this process puts it back first: a shell with such a terminal
// looks dead.
type rawMode struct {
	fd int

	mu     sync.Mutex
	before *term.State // nil while the terminal is as it was
	over   bool        // it stays so
}

// inRawMode is the terminal that must be put back, if there is one.
var inRawMode atomic.Pointer[rawMode]

// restoreTerminal puts the terminal back from wherever the process ends.
func restoreTerminal() {
	if r := inRawMode.Load(); r != nil {
		r.restore()
	}
}

func newRawMode(terminal *os.File) (*rawMode, error) {
	r := &rawMode{fd: int(terminal.Fd())}
	if err := r.enter(); err != nil {
		return nil, err
	}
	inRawMode.Store(r)
	return r, nil
}

// enter makes the terminal raw. What is restored is what was there at the first time,
// unless it was restored in between.
func (r *rawMode) enter() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over {
		return nil
	}
	state, err := term.MakeRaw(r.fd)
	if err == nil && r.before == nil {
		r.before = state
	}
	return err
}

// restore puts the terminal back. It may be called twice, and by anybody.
func (r *rawMode) restore() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.before != nil {
		_ = term.Restore(r.fd, r.before) // a terminal that has gone needs it no more
		r.before = nil
	}
}

// close restores the terminal for good.
func (r *rawMode) close() {
	r.mu.Lock()
	r.over = true
	r.mu.Unlock()
	r.restore()
}

// guarded runs something that must not end the process and leave the terminal as it
// is: a panic in a goroutine runs no deferred call of another one.
func guarded(do func()) {
	done := false
	defer func() {
		if !done {
			restoreTerminal()
		}
	}()
	do()
	done = true
}
