package host_test

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// agentProcess puts a real agent, which runs in this process, into the guests of a rig.
func agentProcess(t *testing.T, r *rig) *guesttest.Guest {
	t.Helper()
	g := guesttest.Start(t, guesttest.Options{})
	mux := http.NewServeMux()
	mux.HandleFunc("POST /init", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.Handle("/", g.Handler)
	hostile(r, mux)
	return g
}

// screen is what a terminal has shown.
type screen struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *screen) show(stdout, _ []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.buf.Write(stdout)
	return err
}

func (s *screen) shows(text string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Contains(s.buf.String(), text)
}

// watchTerminal follows p until it ends, is left, or the test is over.
func watchTerminal(p *host.Process) (*screen, <-chan error) {
	s, ended := &screen{}, make(chan error, 1)
	go func() {
		end, err := p.Output(s.show)
		p.Finish(err == nil)
		if err == nil {
			err = errors.New(end.Status)
		}
		ended <- err
	}()
	return s, ended
}

func awaitScreen(t *testing.T, s *screen, text string) {
	t.Helper()
	if !testkit.Poll(20*time.Second, func() bool { return s.shows(text) }) {
		t.Fatalf("no %q on the screen, but %q", text, s.buf.String())
	}
}

// answers is a shell that answers what is typed.
const answers = `stty size; while read -r line; do case $line in size) stty size;; bye) exit 3;; *) echo "got $line";; esac; done`

// TestTerminal: input, output, size and end of a command that has one.
func TestTerminal(t *testing.T) {
	r := newRig(t)
	agentProcess(t, r)
	agent := r.open()
	id := string(r.mustCreate())
	p, err := agent.Start(t.Context(), id, host.Command{Cmd: "/bin/sh", Args: []string{"-c", answers}, Terminal: &host.Terminal{Cols: 100, Rows: 30}}, true)
	if err != nil {
		t.Fatal(err)
	}
	s, ended := watchTerminal(p)
	awaitScreen(t, s, "30 100")
	for _, step := range []func() error{
		func() error { return p.Input([]byte("one\r")) },
		func() error { return p.Resize(host.Terminal{Cols: 20}) },
		func() error { return p.Input([]byte("size\r")) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	awaitScreen(t, s, "got one")
	awaitScreen(t, s, "30 20")
	if err := p.Resize(host.Terminal{Rows: 1 << 16}); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("a terminal that is too large: %v", err)
	}
	_ = p.Input([]byte("bye\r")) // the end may overtake its answer
	if err := <-ended; err.Error() != "exit status 3" {
		t.Errorf("it ended with %v", err)
	}
}

// TestKeptTerminal: it outlives its caller, others follow it together, and any of
// them may kill it.
func TestKeptTerminal(t *testing.T) {
	r := newRig(t)
	agentProcess(t, r)
	agent := r.open()
	id := string(r.mustCreate())
	ctx, leave := context.WithCancel(t.Context())
	p, err := agent.Start(ctx, id, host.Command{Cmd: "/bin/sh", Args: []string{"-c", answers}, Terminal: &host.Terminal{}}, true)
	if err != nil {
		t.Fatal(err)
	}
	p.Keep()
	first, ended := watchTerminal(p)
	awaitScreen(t, first, "24 80")
	leave()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("who left was told %v", err)
	}
	pid := p.PID()
	var others []*host.Process
	var screens []*screen
	var ends []<-chan error
	for range 2 {
		q, err := agent.Attach(t.Context(), id, pid, host.Terminal{Cols: 33, Rows: 11})
		if err != nil {
			t.Fatal(err)
		}
		s, end := watchTerminal(q)
		others, screens, ends = append(others, q), append(screens, s), append(ends, end)
	}
	if err := others[0].Input([]byte("size\r")); err != nil {
		t.Fatal(err)
	}
	for _, s := range screens {
		awaitScreen(t, s, "11 33")
	}
	if err := agent.Signal(t.Context(), id, pid, 9); err != nil {
		t.Fatal(err)
	}
	for _, end := range ends {
		if err := <-end; err.Error() != "signal: killed" {
			t.Errorf("a follower was told %v", err)
		}
	}
	// For a while its end can still be told.
	late, err := agent.Attach(t.Context(), id, pid, host.Terminal{})
	if err != nil {
		t.Fatal(err)
	}
	if _, end := watchTerminal(late); (<-end).Error() != "signal: killed" {
		t.Error("who came late was not told the end")
	}
}

// TestTerminalOfACallerThatLeaves: it is killed when nobody said that it is kept.
func TestTerminalOfACallerThatLeaves(t *testing.T) {
	r := newRig(t)
	agentProcess(t, r)
	agent := r.open()
	id := string(r.mustCreate())
	ctx, leave := context.WithCancel(t.Context())
	p, err := agent.Start(ctx, id, host.Command{Cmd: "/bin/sh", Args: []string{"-c", answers}, Terminal: &host.Terminal{}}, true)
	if err != nil {
		t.Fatal(err)
	}
	_, ended := watchTerminal(p)
	other, err := agent.Attach(t.Context(), id, p.PID(), host.Terminal{})
	if err != nil {
		t.Fatal(err)
	}
	_, end := watchTerminal(other)
	leave()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("who left was told %v", err)
	}
	if err := <-end; err.Error() != "signal: killed" {
		t.Errorf("it ended with %v", err)
	}
}

// TestWhatIsNoTerminal: only one that is there, and is one, can be followed.
func TestWhatIsNoTerminal(t *testing.T) {
	r := newRig(t)
	agentProcess(t, r)
	agent := r.open()
	id := string(r.mustCreate())
	piped, err := agent.Start(t.Context(), id, host.Command{Cmd: "/bin/cat"}, true)
	if err != nil {
		t.Fatal(err)
	}
	defer piped.Finish(false)
	for what, tt := range map[string]struct {
		pid  uint32
		size host.Terminal
		kind sandbox.Kind
	}{
		"a command with pipes":  {piped.PID(), host.Terminal{}, sandbox.KindInvalid},
		"a PID that nobody has": {1 << 30, host.Terminal{}, sandbox.KindNotFound},
		"no PID":                {0, host.Terminal{}, sandbox.KindInvalid},
		"a size that is none":   {1 << 30, host.Terminal{Cols: 1 << 20}, sandbox.KindInvalid},
	} {
		if _, err := agent.Attach(t.Context(), id, tt.pid, tt.size); !sandbox.Is(err, tt.kind) {
			t.Errorf("%s: %v, want %s", what, err, tt.kind)
		}
	}
	if err := agent.Signal(t.Context(), id, 1<<30, 9); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("a signal to nobody: %v", err)
	}
	if err := agent.Signal(t.Context(), id, piped.PID(), 1); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("a signal that cannot be sent: %v", err)
	}
}
