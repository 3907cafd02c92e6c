package rig

import (
	"fmt"
	"os"
	"testing"
)

// Shared is a server that several tests use. It has the life of the process,
// not of a test: TestMain closes it.
type Shared struct {
	opts   Options
	life   *processLife
	server *Server
	err    error
}

// NewShared makes one that the first For starts.
func NewShared(opts Options) *Shared { return &Shared{opts: opts} }

// For is the server, for one test. Not for concurrent use.
func (s *Shared) For(t testing.TB) *Server {
	t.Helper()
	require(t)
	if s.life == nil {
		s.start()
	}
	if s.err != nil {
		t.Fatal(s.err)
	}
	own := *s.server
	own.t = t
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the shared server's log:\n%s", tail(own.Log(), 3000))
		}
	})
	return &own
}

func (s *Shared) start() {
	s.life = &processLife{}
	defer func() {
		if why, failed := recover().(processFailure); failed {
			s.err = why
		}
	}()
	s.server = New(s.life, s.opts)
	s.server.Up()
}

// Close takes the server down and says what went wrong with it, leftovers on
// the machine included. It does nothing when no test has used it.
func (s *Shared) Close() (ok bool) {
	if s.life == nil {
		return true
	}
	defer func() {
		if why, failed := recover().(processFailure); failed {
			fmt.Fprintln(os.Stderr, "shared server:", why)
			ok = false
		}
	}()
	for i := len(s.life.cleanups) - 1; i >= 0; i-- {
		s.life.cleanups[i]()
	}
	return !s.life.failed
}

func tail(text string, most int) string {
	return text[max(0, len(text)-most):]
}

// processFailure is what Fatal panics with: there is no test to end.
type processFailure string

func (f processFailure) Error() string { return string(f) }

// processLife is the part of a testing.TB that a Server needs, for one that
// belongs to no test. Any other method panics: the interface is nil.
type processLife struct {
	testing.TB
	cleanups []func()
	failed   bool
}

func (p *processLife) Helper()                   {}
func (p *processLife) Failed() bool              { return p.failed }
func (p *processLife) Cleanup(f func())          { p.cleanups = append(p.cleanups, f) }
func (p *processLife) Logf(f string, a ...any)   { fmt.Fprintf(os.Stderr, f+"\n", a...) }
func (p *processLife) Error(a ...any)            { p.failed = true; p.Logf("%s", fmt.Sprint(a...)) }
func (p *processLife) Errorf(f string, a ...any) { p.failed = true; p.Logf(f, a...) }
func (p *processLife) Fatal(a ...any)            { p.failed = true; panic(processFailure(fmt.Sprint(a...))) }

func (p *processLife) Fatalf(f string, a ...any) {
	p.failed = true
	panic(processFailure(fmt.Sprintf(f, a...)))
}
