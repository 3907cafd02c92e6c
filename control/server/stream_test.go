package server_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
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

const big = 256 << 20

func patternHash(t *testing.T, n int64) string {
	t.Helper()
	sum := sha256.New()
	if _, err := io.Copy(sum, hostfake.Pattern(n)); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// watchHeap returns a function that says how far the live heap grew at most.
func watchHeap(t *testing.T) func() uint64 {
	t.Helper()
	live := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	start := live()
	var most atomic.Uint64
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(300 * time.Millisecond):
				most.Store(max(most.Load(), live()))
			}
		}
	}()
	return func() uint64 {
		close(stop)
		<-done
		return max(most.Load(), start) - start
	}
}

const flat = 32 << 20 // of live heap, for server, client and fake together

func TestStreamOutputIsWholeAndMemoryFlat(t *testing.T) {
	r := newRig(t)
	id := r.create()
	grew := watchHeap(t)
	sum := sha256.New()
	s, err := r.c.ExecStream(r.ctx(), id, api.Exec{Command: []string{"spew", "268435456"}}, client.StreamOptions{Stdout: sum})
	if err != nil {
		t.Fatal(err)
	}
	exit, err := s.Wait()
	if err != nil || exit.Code != 0 {
		t.Fatalf("exit %+v, %v", exit, err)
	}
	if got, want := hex.EncodeToString(sum.Sum(nil)), patternHash(t, big); got != want {
		t.Errorf("hash %s, want %s", got, want)
	}
	if g := grew(); g > flat {
		t.Errorf("the heap grew by %d MiB", g>>20)
	}
}

func TestStreamInputIsWholeAndMemoryFlat(t *testing.T) {
	r := newRig(t)
	id := r.create()
	grew := watchHeap(t)
	var out bytes.Buffer
	s, err := r.c.ExecStream(r.ctx(), id, api.Exec{Shell: "hash"}, client.StreamOptions{Stdin: true, Stdout: &out})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(s, hostfake.Pattern(big)); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseStdin(); err != nil {
		t.Fatal(err)
	}
	if exit, err := s.Wait(); err != nil || exit.Code != 0 {
		t.Fatalf("exit %+v, %v", exit, err)
	}
	if got, want := strings.TrimSpace(out.String()), patternHash(t, big); got != want {
		t.Errorf("hash %s, want %s", got, want)
	}
	if g := grew(); g > flat {
		t.Errorf("the heap grew by %d MiB", g>>20)
	}
	if _, err := s.Write([]byte("late")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("writing to an ended command: %v", err)
	}
}

func TestStderrExitCodeAndPID(t *testing.T) {
	r := newRig(t)
	id := r.create()
	var out, warn bytes.Buffer
	s, err := r.c.ExecStream(r.ctx(), id, api.Exec{Shell: "warn careful"}, client.StreamOptions{Stdout: &out, Stderr: &warn})
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := s.Wait(); err != nil || exit.Code != 0 || s.PID() != 42 || out.Len() != 0 || warn.String() != "careful\n" {
		t.Errorf("exit %+v, %v, pid %d, %q, %q", exit, err, s.PID(), out.String(), warn.String())
	}
	s, err = r.c.ExecStream(r.ctx(), id, api.Exec{Shell: "exit 7"}, client.StreamOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := s.Wait(); err != nil || exit.Code != 7 {
		t.Errorf("exit %+v, %v", exit, err)
	}
}

// slow reads nothing until it is let go.
type slow struct {
	gate  chan struct{}
	bytes atomic.Int64
}

func (s *slow) Write(p []byte) (int, error) {
	<-s.gate
	s.bytes.Add(int64(len(p)))
	return len(p), nil
}

func TestSlowReaderHoldsTheCommandBackAndLosesNothing(t *testing.T) {
	r := newRig(t, func(c *server.Config) { c.KeepAlive = 50 * time.Millisecond })
	id := r.create()
	out := &slow{gate: make(chan struct{})}
	const n = 64 << 20
	s, err := r.c.ExecStream(r.ctx(), id, api.Exec{Command: []string{"spew", "67108864"}}, client.StreamOptions{Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	before := heap()
	held := time.After(time.Second) // long enough for 64 MiB many times over, were it not held back
	<-held
	if r.host.Processes() != 1 {
		t.Error("the command has ended although nobody read its output")
	}
	if grown := int64(heap()) - int64(before); grown > flat {
		t.Errorf("the heap grew by %d MiB while nobody read", grown>>20)
	}
	close(out.gate)
	if exit, err := s.Wait(); err != nil || exit.Code != 0 || out.bytes.Load() != n {
		t.Errorf("exit %+v, %v, %d bytes", exit, err, out.bytes.Load())
	}
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestClientThatVanishesKillsItsCommand(t *testing.T) {
	for _, command := range []string{"sleep", "deaf", "spew 1000000000000", "cat"} {
		t.Run(command, func(t *testing.T) {
			r := newRig(t)
			id := r.create()
			settled := runtime.NumGoroutine()
			ctx, cancel := context.WithCancel(r.ctx())
			s, err := r.c.ExecStream(ctx, id, api.Exec{Shell: command}, client.StreamOptions{Stdin: true})
			if err != nil {
				t.Fatal(err)
			}
			if command == "deaf" { // fill every buffer on the way in
				wrote := make(chan struct{})
				go func() {
					defer close(wrote)
					_, _ = io.Copy(s, hostfake.Pattern(8<<20)) // it ends with the stream
				}()
				defer func() { <-wrote }()
			}
			testkit.Eventually(t, limit, "running", func() bool { return r.host.Processes() == 1 })
			cancel()
			if _, err := s.Wait(); !errors.Is(err, context.Canceled) {
				t.Errorf("wait: %v", err)
			}
			testkit.Eventually(t, limit, "killed", func() bool { return r.host.Processes() == 0 })
			testkit.Eventually(t, limit, "without goroutines left", func() bool {
				r.c.CloseIdle()
				return runtime.NumGoroutine() <= settled+4 // of kept connections
			})
		})
	}
}

func TestKill(t *testing.T) {
	r := newRig(t)
	id := r.create()
	for _, signal := range []string{api.SignalTerm, api.SignalKill} {
		s, err := r.c.ExecStream(r.ctx(), id, api.Exec{Shell: "sleep"}, client.StreamOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Kill(signal); err != nil {
			t.Fatal(err)
		}
		if exit, err := s.Wait(); err != nil || exit.Code != -1 || exit.Status != "signal: killed" {
			t.Errorf("%s: %+v, %v", signal, exit, err)
		}
	}
}

// A command that takes no input can be killed although its input is stuck.
func TestKillIsHeardBehindStuckInput(t *testing.T) {
	r := newRig(t)
	id := r.create()
	s, err := r.c.ExecStream(r.ctx(), id, api.Exec{Shell: "deaf"}, client.StreamOptions{Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	wrote := make(chan error, 1)
	go func() {
		_, err := io.Copy(s, hostfake.Pattern(64<<20))
		wrote <- err
	}()
	testkit.Eventually(t, limit, "running", func() bool { return r.host.Processes() == 1 })
	if err := s.Kill(api.SignalKill); err != nil {
		t.Fatal(err)
	}
	_, _ = s.Wait() // killed in order or cut off, by how much of the input was on its way
	if err := <-wrote; err == nil {
		t.Error("all input was taken by a command that reads none")
	}
	testkit.Eventually(t, limit, "killed", func() bool { return r.host.Processes() == 0 })
}

func TestStreamEndsWithTheCauseWhenTheSandboxEnds(t *testing.T) {
	r := newRig(t)
	id := r.create()
	s, err := r.c.ExecStream(r.ctx(), id, api.Exec{Shell: "sleep"}, client.StreamOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r.host.Crash(id, sandbox.CauseOOMGuest, "")
	_, err = s.Wait()
	r.wantKind(err, sandbox.KindConflict)
	if !strings.Contains(err.Error(), "oom_guest") {
		t.Errorf("the error is %q", err)
	}
}

func TestStopOfTheServerEndsStreams(t *testing.T) {
	r := newRig(t)
	id := r.create()
	s, err := r.c.ExecStream(r.ctx(), id, api.Exec{Shell: "sleep"}, client.StreamOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.srv.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Wait(); !sandbox.Is(err, sandbox.KindTransient) {
		t.Errorf("wait: %v", err)
	}
	testkit.Eventually(t, limit, "killed", func() bool { return r.host.Processes() == 0 })
	if len(r.host.Running()) != 1 {
		t.Error("the stop of the server ended a sandbox")
	}
}

// dial opens a raw stream, as a browser would.
func (r *rig) dial(id string, header http.Header) (*websocket.Conn, *http.Response, error) {
	return r.dialAt(id, "/exec/stream", header)
}

func (r *rig) dialAt(id, at string, header http.Header) (*websocket.Conn, *http.Response, error) {
	c, resp, err := websocket.Dial(r.ctx(), r.http.URL+"/v1/sandboxes/"+id+at, &websocket.DialOptions{HTTPHeader: header})
	if err == nil {
		r.t.Cleanup(func() { _ = c.CloseNow() })
	}
	return c, resp, err
}

// firstAnswer sends messages and reads what comes back first.
func (r *rig) firstAnswer(c *websocket.Conn, messages ...any) api.StreamMessage {
	r.t.Helper()
	for _, m := range messages {
		b, err := json.Marshal(m)
		if err != nil {
			r.t.Fatal(err)
		}
		if err := c.Write(r.ctx(), websocket.MessageText, b); err != nil {
			r.t.Fatal(err)
		}
	}
	_, b, err := c.Read(r.ctx())
	if err != nil {
		r.t.Fatal(err)
	}
	var got api.StreamMessage
	if err := json.Unmarshal(b, &got); err != nil {
		r.t.Fatal(err)
	}
	return got
}

func TestStreamOpening(t *testing.T) {
	r := newRig(t)
	id := r.create()
	auth := api.StreamMessage{Type: api.StreamAuth, Key: r.key}
	start := api.StreamMessage{Type: api.StreamStart, Exec: &api.Exec{Shell: "echo"}}
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
		{"kill first", id, []any{auth, api.StreamMessage{Type: api.StreamKill}}, api.StreamError, sandbox.KindInvalid},
		{"start without command", id, []any{auth, api.StreamMessage{Type: api.StreamStart}}, api.StreamError, sandbox.KindInvalid},
		{"a terminal", id, []any{auth, api.StreamMessage{Type: api.StreamStart, Exec: start.Exec, Keep: true}}, api.StreamError, sandbox.KindInvalid},
		{"connect", id, []any{auth, api.StreamMessage{Type: api.StreamConnect, PID: 42}}, api.StreamError, sandbox.KindInvalid},
		{"empty command", id, []any{auth, api.StreamMessage{Type: api.StreamStart, Exec: &api.Exec{}}}, api.StreamError, sandbox.KindInvalid},
		{"unknown field", id, []any{map[string]string{"typ": "auth"}}, api.StreamError, sandbox.KindInvalid},
		{"no such sandbox", string(sandbox.NewID()), []any{auth, start}, api.StreamError, sandbox.KindNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, _, err := r.dial(tt.id, nil)
			if err != nil {
				t.Fatal(err)
			}
			got := r.firstAnswer(c, tt.messages...)
			if got.Type != tt.want || (got.Error != nil && got.Error.Code != string(tt.kind)) {
				t.Errorf("answer %+v, want %s %s", got, tt.want, tt.kind)
			}
		})
	}
	if _, resp, err := r.dial(id, http.Header{"Authorization": {"Bearer dm_x"}}); err == nil || resp == nil || resp.StatusCode != 401 {
		t.Errorf("a wrong key in the header: %v, %v", resp, err)
	}
	if _, resp, err := r.dial(id, http.Header{"Origin": {"http://evil.example"}}); err == nil || resp == nil || resp.StatusCode != 403 {
		t.Errorf("a foreign origin: %v, %v", resp, err)
	}
	_, err := r.client("dm_x").ExecStream(r.ctx(), id, api.Exec{Shell: "echo"}, client.StreamOptions{})
	r.wantKind(err, sandbox.KindUnauthorized)
}
