package server_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/control/hostfake"
	"github.com/dormouse-sandbox/dormouse/control/server"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// terminal opens one that goes with the test.
func (r *rig) terminal(id, command string, opts client.TerminalOptions) *client.Terminal {
	r.t.Helper()
	var req api.Exec
	if command != "" {
		req.Shell = command
	}
	p, err := r.c.OpenTerminal(r.ctx(), id, req, opts)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = p.Close() })
	return p
}

func (r *rig) connect(id string, pid uint32, opts client.TerminalOptions) *client.Terminal {
	r.t.Helper()
	p, err := r.c.ConnectTerminal(r.ctx(), id, pid, opts)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = p.Close() })
	return p
}

func awaitScreen(t *testing.T, screen *lines, text string) {
	t.Helper()
	if !testkit.Poll(limit, func() bool { return strings.Contains(screen.String(), text) }) {
		t.Fatalf("no %q on the screen but %.200q", text, screen)
	}
}

func TestTerminalTypesAndShows(t *testing.T) {
	r := newRig(t)
	var screen lines
	p := r.terminal(r.create(), "cat", client.TerminalOptions{Output: &screen})
	if _, err := io.WriteString(p, "\x00hello\xff"); err != nil { // as it is, with no byte in front
		t.Fatal(err)
	}
	awaitScreen(t, &screen, "\x00hello\xff")
	if err := p.Kill(api.SignalTerm); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(); err != nil || exit.Status != "signal: killed" {
		t.Errorf("exit %+v, %v", exit, err)
	}
	p = r.terminal(r.create(), "exit 7", client.TerminalOptions{})
	if exit, err := p.Wait(); err != nil || exit.Code != 7 {
		t.Errorf("exit %+v, %v", exit, err)
	}
}

// What a start without a command means, and what every command in a terminal gets.
func TestTerminalOfNoCommandIsALoginShell(t *testing.T) {
	r := newRig(t)
	id := r.create()
	p, err := r.c.OpenTerminal(r.ctx(), id, api.Exec{User: "ann", Cwd: "/srv"}, client.TerminalOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Wait()
	r.wantKind(err, sandbox.KindInvalid) // the fake has no shell
	start := r.host.Terminal()
	command := start.GetCommand()
	if command.GetCmd() != "/bin/sh" || !strings.Contains(strings.Join(command.GetArgs(), " "), "/etc/passwd") {
		t.Errorf("it was %q %q", command.GetCmd(), command.GetArgs())
	}
	if command.GetUser() != "ann" || command.GetCwd() != "/srv" || command.GetEnv()["TERM"] != api.DefaultTERM || !start.GetStdin() {
		t.Errorf("it was started with %+v", start)
	}
	env := map[string]string{"TERM": "vt100"}
	p, err = r.c.OpenTerminal(r.ctx(), id, api.Exec{Shell: "exit 0", Env: env}, client.TerminalOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Wait(); err != nil || r.host.Terminal().GetCommand().GetEnv()["TERM"] != "vt100" {
		t.Errorf("a TERM of its own: %v, %+v", err, r.host.Terminal())
	}
}

func TestTerminalSize(t *testing.T) {
	r := newRig(t)
	id := r.create()
	var first, second lines
	p := r.terminal(id, "size", client.TerminalOptions{Output: &first, Size: &api.TerminalSize{Cols: 20, Rows: 3}})
	awaitScreen(t, &first, "20x3\n")
	for rows := 1; rows <= 500; rows++ { // the newest counts
		if err := p.Resize(api.TerminalSize{Cols: 33, Rows: rows}); err != nil {
			t.Fatal(err)
		}
	}
	awaitScreen(t, &first, "33x500\n")
	q := r.connect(id, p.PID(), client.TerminalOptions{Output: &second, Size: &api.TerminalSize{Cols: 65535, Rows: 1}})
	awaitScreen(t, &first, "65535x1\n")
	awaitScreen(t, &second, "65535x1\n")
	if err := q.Resize(api.TerminalSize{Cols: 0, Rows: 1}); err != nil {
		t.Fatal(err)
	}
	_, err := q.Wait()
	r.wantKind(err, sandbox.KindInvalid)
	if r.host.Processes() != 1 {
		t.Error("what one that only looks on does wrong has ended the command")
	}
	var third lines
	r.terminal(id, "size", client.TerminalOptions{Output: &third})
	awaitScreen(t, &third, "80x24\n")
}

func TestTerminalOutputIsWholeAndMemoryFlat(t *testing.T) {
	r := newRig(t)
	id := r.create()
	grew := watchHeap(t)
	sum := sha256.New()
	p := r.terminal(id, "spew 67108864", client.TerminalOptions{Output: sum})
	if exit, err := p.Wait(); err != nil || exit.Code != 0 {
		t.Fatalf("exit %+v, %v", exit, err)
	}
	if got, want := hex.EncodeToString(sum.Sum(nil)), patternHash(t, 64<<20); got != want {
		t.Errorf("hash %s, want %s", got, want)
	}
	if g := grew(); g > flat {
		t.Errorf("the heap grew by %d MiB", g>>20)
	}
}

// tally counts what is written to it, and hashes it.
type tally struct {
	hash.Hash
	n atomic.Int64
}

func (c *tally) Write(p []byte) (int, error) {
	_, _ = c.Hash.Write(p) // it never fails
	c.n.Add(int64(len(p)))
	return len(p), nil
}

func TestTerminalInputIsWhole(t *testing.T) {
	r := newRig(t)
	shown := &tally{Hash: sha256.New()}
	p := r.terminal(r.create(), "cat", client.TerminalOptions{Output: shown})
	const n = 8 << 20
	if sent, err := io.Copy(p, hostfake.Pattern(n)); err != nil || sent != n {
		t.Fatalf("typed %d bytes, %v", sent, err)
	}
	testkit.Eventually(t, limit, "all shown", func() bool { return shown.n.Load() == n })
	if err := p.Close(); err != nil { // nothing is written any more
		t.Fatal(err)
	}
	if got := hex.EncodeToString(shown.Sum(nil)); got != patternHash(t, n) {
		t.Error("what was shown is not what was typed")
	}
}

// The ways in which a client can leave, for a command that is kept and one that is not.
func TestClientThatLeavesATerminal(t *testing.T) {
	for _, command := range []string{"sleep", "deaf", "spew 1000000000000", "cat"} {
		t.Run(command, func(t *testing.T) {
			r := newRig(t)
			id := r.create()
			settled := runtime.NumGoroutine()
			for _, keep := range []bool{false, true} {
				ctx, cancel := context.WithCancel(r.ctx())
				p, err := r.c.OpenTerminal(ctx, id, api.Exec{Shell: command}, client.TerminalOptions{Keep: keep})
				if err != nil {
					t.Fatal(err)
				}
				wrote := make(chan struct{})
				go func() {
					defer close(wrote)
					if command == "deaf" { // fill every buffer on the way in
						_, _ = io.Copy(p, hostfake.Pattern(8<<20)) // it ends with the stream
					}
				}()
				testkit.Eventually(t, limit, "running", func() bool { return r.host.Processes() == 1 })
				cancel()
				if _, err := p.Wait(); !errors.Is(err, context.Canceled) {
					t.Errorf("wait: %v", err)
				}
				<-wrote
				if !keep {
					testkit.Eventually(t, limit, "killed", func() bool { return r.host.Processes() == 0 })
					continue
				}
				testkit.Eventually(t, limit, "without its follower", func() bool { return strings.Contains(r.metrics(), "\ndormouse_exec_streams 0\n") })
				if r.host.Processes() != 1 {
					t.Error("what is kept has ended with its client")
				}
				q := r.connect(id, p.PID(), client.TerminalOptions{})
				if err := q.Kill(api.SignalKill); err != nil {
					t.Fatal(err)
				}
				if exit, err := q.Wait(); err != nil || exit.Code != -1 {
					t.Errorf("exit %+v, %v", exit, err)
				}
			}
			testkit.Eventually(t, limit, "without goroutines left", func() bool {
				r.c.CloseIdle()
				return runtime.NumGoroutine() <= settled+4 // of kept connections
			})
		})
	}
}

// A command that takes no input can be killed although its input is stuck, and
// also when it is kept, where cutting the stream would not do it.
func TestKillIsHeardBehindStuckTyping(t *testing.T) {
	r := newRig(t)
	p := r.terminal(r.create(), "deaf", client.TerminalOptions{Keep: true})
	wrote := make(chan error, 1)
	go func() {
		_, err := io.Copy(p, hostfake.Pattern(64<<20))
		wrote <- err
	}()
	for rows := 1; rows < 100; rows++ { // these do not hold it up either
		if err := p.Resize(api.TerminalSize{Cols: 80, Rows: rows}); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Kill(api.SignalKill); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(); err != nil || exit.Code != -1 {
		t.Errorf("exit %+v, %v", exit, err)
	}
	if err := <-wrote; err == nil {
		t.Error("all input was taken by a command that reads none")
	}
	testkit.Eventually(t, limit, "killed", func() bool { return r.host.Processes() == 0 })
}

// A revoked key ends all streams; what is kept was told to outlive them.
func TestARevokedKeyEndsItsTerminals(t *testing.T) {
	r := newRig(t)
	id := r.create()
	key, err := r.c.CreateKey(r.ctx(), "second")
	if err != nil {
		t.Fatal(err)
	}
	second := r.client(key.Secret)
	defer second.CloseIdle()
	var theirs []*client.Terminal
	for _, keep := range []bool{false, true} {
		p, err := second.OpenTerminal(r.ctx(), id, api.Exec{Shell: "sleep"}, client.TerminalOptions{Keep: keep})
		if err != nil {
			t.Fatal(err)
		}
		theirs = append(theirs, p)
	}
	kept := theirs[1].PID()
	if err := r.c.DeleteKey(r.ctx(), key.ID); err != nil {
		t.Fatal(err)
	}
	for _, p := range theirs {
		if _, err := p.Wait(); !sandbox.Is(err, sandbox.KindUnauthorized) || !strings.Contains(err.Error(), "revoked") {
			t.Errorf("it ended with %v", err)
		}
	}
	testkit.Eventually(t, limit, "one is killed", func() bool { return r.host.Processes() == 1 })
	r.connect(id, kept, client.TerminalOptions{}) // with the other key
}

func TestTerminalEndsWithItsSandbox(t *testing.T) {
	r := newRig(t)
	id := r.create()
	p := r.terminal(id, "sleep", client.TerminalOptions{Keep: true})
	q := r.connect(id, p.PID(), client.TerminalOptions{})
	r.host.Crash(id, sandbox.CauseOOMGuest, "")
	for _, p := range []*client.Terminal{p, q} {
		_, err := p.Wait()
		r.wantKind(err, sandbox.KindConflict)
		if !strings.Contains(err.Error(), "oom_guest") {
			t.Errorf("the error is %q", err)
		}
	}
}

// A server that stops ends the streams; another one finds what is kept.
func TestKeptTerminalOutlivesTheServer(t *testing.T) {
	r := newRig(t)
	id := r.create()
	kept, other := r.terminal(id, "cat", client.TerminalOptions{Keep: true}), r.terminal(id, "cat", client.TerminalOptions{})
	r.stop()
	for _, p := range []*client.Terminal{kept, other} {
		if _, err := p.Wait(); !sandbox.Is(err, sandbox.KindTransient) {
			t.Errorf("wait: %v", err)
		}
	}
	testkit.Eventually(t, limit, "one is killed", func() bool { return r.host.Processes() == 1 })
	r.start()
	var screen lines
	p := r.connect(id, kept.PID(), client.TerminalOptions{Output: &screen})
	if _, err := io.WriteString(p, "back"); err != nil {
		t.Fatal(err)
	}
	awaitScreen(t, &screen, "back")
}

func TestSilentTerminalIsKeptAlive(t *testing.T) {
	r := newRig(t, func(c *server.Config) { c.KeepAlive = 20 * time.Millisecond })
	c, _, err := r.dialAt(r.create(), "/pty", http.Header{"X-Api-Key": {r.key}})
	if err != nil {
		t.Fatal(err)
	}
	got := r.firstAnswer(c, api.StreamMessage{Type: api.StreamStart, Exec: &api.Exec{Shell: "sleep"}})
	for got.Type == api.StreamKeepAlive { // it takes the server a while to start it
		got = r.firstAnswer(c)
	}
	if got.Type != api.StreamStarted {
		t.Fatalf("answer %+v", got)
	}
	if _, b, err := c.Read(r.ctx()); err != nil || string(b) != `{"type":"keepalive"}` {
		t.Errorf("then %s, %v", b, err)
	}
}

// Who has somebody's keyboard does not wait for ever for a server that is not there.
func TestSilentServerIsGivenUp(t *testing.T) {
	r := newRig(t, func(c *server.Config) { c.KeepAlive = time.Hour })
	p := r.terminal(r.create(), "sleep", client.TerminalOptions{Patience: 100 * time.Millisecond})
	_, err := p.Wait()
	r.wantKind(err, sandbox.KindTransient)
	if !strings.Contains(err.Error(), "said nothing for 100ms") {
		t.Errorf("the error is %q", err)
	}
	testkit.Eventually(t, limit, "killed", func() bool { return r.host.Processes() == 0 })
}

func TestTerminalOpening(t *testing.T) {
	r := newRig(t)
	id := r.create()
	auth := api.StreamMessage{Type: api.StreamAuth, Key: r.key}
	start := api.StreamMessage{Type: api.StreamStart, Exec: &api.Exec{Shell: "sleep"}}
	with := func(change func(m *api.StreamMessage)) api.StreamMessage {
		m, exec := start, *start.Exec
		m.Exec = &exec
		change(&m)
		return m
	}
	for _, tt := range []struct {
		name     string
		id       string
		messages []any
		want     string // type of the first answer
		kind     sandbox.Kind
	}{
		{"key first", id, []any{auth, start}, api.StreamStarted, ""},
		{"no key", id, []any{start}, api.StreamError, sandbox.KindUnauthorized},
		{"wrong key", id, []any{api.StreamMessage{Type: api.StreamAuth, Key: "dm_x"}}, api.StreamError, sandbox.KindUnauthorized},
		{"resize first", id, []any{auth, api.StreamMessage{Type: api.StreamResize}}, api.StreamError, sandbox.KindInvalid},
		{"kill first", id, []any{auth, api.StreamMessage{Type: api.StreamKill}}, api.StreamError, sandbox.KindInvalid},
		{"connect without a pid", id, []any{auth, api.StreamMessage{Type: api.StreamConnect}}, api.StreamError, sandbox.KindInvalid},
		{"connect with a command", id, []any{auth, with(func(m *api.StreamMessage) { m.Type, m.PID = api.StreamConnect, 9 })}, api.StreamError, sandbox.KindInvalid},
		{"connect to nothing", id, []any{auth, api.StreamMessage{Type: api.StreamConnect, PID: 9}}, api.StreamError, sandbox.KindNotFound},
		{"text as input", id, []any{auth, with(func(m *api.StreamMessage) { m.Exec.Stdin = "x" })}, api.StreamError, sandbox.KindInvalid},
		{"kept for a time", id, []any{auth, with(func(m *api.StreamMessage) { m.Keep, m.Exec.TimeoutSeconds = true, 1 })}, api.StreamError, sandbox.KindInvalid},
		{"too wide", id, []any{auth, with(func(m *api.StreamMessage) { m.Size = &api.TerminalSize{Cols: 65536, Rows: 1} })}, api.StreamError, sandbox.KindInvalid},
		{"of no height", id, []any{auth, with(func(m *api.StreamMessage) { m.Size = &api.TerminalSize{Cols: 80} })}, api.StreamError, sandbox.KindInvalid},
		{"command and shell", id, []any{auth, with(func(m *api.StreamMessage) { m.Exec.Command = []string{"x"} })}, api.StreamError, sandbox.KindInvalid},
		{"unknown field", id, []any{map[string]string{"typ": "auth"}}, api.StreamError, sandbox.KindInvalid},
		{"no such sandbox", string(sandbox.NewID()), []any{auth, start}, api.StreamError, sandbox.KindNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, _, err := r.dialAt(tt.id, "/pty", nil)
			if err != nil {
				t.Fatal(err)
			}
			got := r.firstAnswer(c, tt.messages...)
			if got.Type != tt.want || (got.Error != nil && got.Error.Code != string(tt.kind)) {
				t.Errorf("answer %+v %+v, want %s %s", got, got.Error, tt.want, tt.kind)
			}
		})
	}
	if _, resp, err := r.dialAt(id, "/pty", http.Header{"Authorization": {"Bearer dm_x"}}); err == nil || resp == nil || resp.StatusCode != 401 {
		t.Errorf("a wrong key in the header: %v, %v", resp, err)
	}
	if _, resp, err := r.dialAt(id, "/pty", http.Header{"Origin": {"http://evil.example"}}); err == nil || resp == nil || resp.StatusCode != 403 {
		t.Errorf("a foreign origin: %v, %v", resp, err)
	}
}

// What a client says wrong in the middle ends its session, and its command.
func TestNonsenseInATerminal(t *testing.T) {
	r := newRig(t)
	id := r.create()
	for name, message := range map[string]string{
		"no JSON":            "{",
		"the end of input":   `{"type":"close_stdin"}`,
		"another start":      `{"type":"start"}`,
		"a resize to what":   `{"type":"resize"}`,
		"an unknown signal":  `{"type":"kill","signal":"STOP"}`,
		"what nobody knows":  `{"type":"dance"}`,
		"a size without end": `{"type":"resize","size":{"cols":1,"rows":1000000}}`,
	} {
		t.Run(name, func(t *testing.T) {
			c, _, err := r.dialAt(id, "/pty", http.Header{"X-Api-Key": {r.key}})
			if err != nil {
				t.Fatal(err)
			}
			if got := r.firstAnswer(c, api.StreamMessage{Type: api.StreamStart, Exec: &api.Exec{Shell: "sleep"}}); got.Type != api.StreamStarted {
				t.Fatalf("answer %+v", got)
			}
			if err := c.Write(r.ctx(), websocket.MessageText, []byte(message)); err != nil {
				t.Fatal(err)
			}
			if got := r.firstAnswer(c); got.Type != api.StreamError || got.Error.Code != string(sandbox.KindInvalid) {
				t.Errorf("answer %+v", got)
			}
			if _, _, err := c.Read(r.ctx()); websocket.CloseStatus(err) != websocket.StatusNormalClosure {
				t.Errorf("after it: %v", err)
			}
			testkit.Eventually(t, limit, "killed", func() bool { return r.host.Processes() == 0 })
		})
	}
}
