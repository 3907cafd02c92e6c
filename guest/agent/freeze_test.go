package agent_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// sandboxed is an agent with a machine, and the host that has its key.
type sandboxed struct {
	*guesttest.Guest
	*machine
	key ed25519.PrivateKey
	id  string // who the host takes it for
	log *lines
}

// lines is a log that can be looked at.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) has(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.text.String(), text)
}

// startSandboxed starts one that has been told who it is: sandbox "one" with the
// token "t1".
func startSandboxed(t *testing.T) *sandboxed {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &sandboxed{machine: &machine{life: "first"}, key: private, log: &lines{}}
	s.Guest = guesttest.Start(t, guesttest.Options{
		Verifier: guestapi.NewVerifier(public), Machine: s.machine, Freezer: s.machine, Hooks: s.hooks,
		ClientToken: "t1", Log: slog.New(slog.NewTextHandler(s.log, nil)),
	})
	s.call(t, guestapi.PathInit, guestapi.Init{AccessToken: "t1", SandboxID: "one"}, 204)
	s.id = "one"
	s.taken()
	return s
}

// call makes a signed call and checks its status. It gives the answer.
func (s *sandboxed) call(t *testing.T, path string, body any, want int) string {
	t.Helper()
	status, text := s.try(t, path, body)
	if status != want {
		t.Fatalf("%s %+v: %d %s, want %d", path, body, status, text, want)
	}
	return text
}

func (s *sandboxed) try(t *testing.T, path string, body any) (status int, text string) {
	t.Helper()
	data, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	header := http.Header{guestapi.HeaderSignature: {guestapi.Sign(s.key, s.id, "POST", path, time.Now(), data)}}
	return do(t, "POST", s.URL+path, header, data)
}

func (s *sandboxed) want(t *testing.T, steps ...string) {
	t.Helper()
	if diff := cmp.Diff(steps, s.taken()); diff != "" {
		t.Errorf("steps: %s", diff)
	}
}

func TestFreezeAndThawAreTheHostsAlone(t *testing.T) {
	s := startSandboxed(t)
	for _, path := range []string{guestapi.PathFreeze, guestapi.PathThaw} {
		if status, text := do(t, "POST", s.URL+path, token("t1"), nil); status != 401 || !strings.Contains(text, "not signed by the host") {
			t.Errorf("%s with the token alone: %d %s", path, status, text)
		}
		if status, _ := do(t, "GET", s.URL+path, token("t1"), nil); status != 405 {
			t.Errorf("GET %s: %d", path, status)
		}
		id := s.id
		s.id = "two"
		s.call(t, path, struct{}{}, 401)
		s.id = id
		plain := guesttest.Start(t, guesttest.Options{Freezer: s.machine})
		if status, _ := do(t, "POST", plain.URL+path, nil, nil); status != 401 {
			t.Errorf("%s of an agent without a host's key: %d", path, status)
		}
	}
	s.want(t)
}

func TestFreezeAndThawTwice(t *testing.T) {
	s := startSandboxed(t)
	s.call(t, guestapi.PathThaw, guestapi.Thaw{}, 204)
	s.taken()
	for range 2 {
		s.call(t, guestapi.PathFreeze, guestapi.Freeze{}, 204)
	}
	s.want(t, "freeze")
	at := time.Date(2026, 11, 27, 12, 0, 0, 7, time.UTC)
	for range 2 {
		s.call(t, guestapi.PathThaw, guestapi.Thaw{Timestamp: at.Format(time.RFC3339Nano)}, 204)
	}
	s.want(t, "clock", "thaw", "clock", "thaw")
	if s.frozen || !s.clock.Equal(at) {
		t.Errorf("frozen: %v, clock: %v", s.frozen, s.clock)
	}
}

func TestFreezeThatIsWrong(t *testing.T) {
	s := startSandboxed(t)
	for text, req := range map[string]any{
		"withinMs is -1":             guestapi.Freeze{WithinMs: -1},
		"thawAfterMs is 86400001":    guestapi.Freeze{ThawAfterMs: 86_400_001},
		"body":                       "freeze!",
		"cannot unmarshal string in": map[string]any{"withinMs": "soon"},
	} {
		if answer := s.call(t, guestapi.PathFreeze, req, 400); !strings.Contains(answer, text) {
			t.Errorf("%+v: %s", req, answer)
		}
	}
	if answer := s.call(t, guestapi.PathThaw, guestapi.Thaw{Timestamp: "soon"}, 400); !strings.Contains(answer, "soon") {
		t.Error(answer)
	}
	s.want(t)
}

func TestAFreezeThatFailsLetsCommandsStart(t *testing.T) {
	s := startSandboxed(t)
	for _, tt := range []struct {
		err    error
		status int
	}{
		{sandbox.Errorf(sandbox.KindTimeout, "7 (cp) is in state D"), 504},
		{sandbox.Errorf(sandbox.KindUnsupported, "needs Linux 5.2"), 501},
		{errors.New("EIO"), 500},
	} {
		s.set(func() { s.fail = map[string]error{"freeze": tt.err} })
		if answer := s.call(t, guestapi.PathFreeze, guestapi.Freeze{}, tt.status); !strings.Contains(answer, tt.err.Error()) {
			t.Errorf("%s, want %v", answer, tt.err)
		}
		if res, err := s.Run(t.Context(), guesttest.Shell("echo runs")); err != nil || res.Output() != "runs" {
			t.Errorf("%v: a command afterwards: %q, %v", tt.err, res.Output(), err)
		}
	}
}

func TestAGuestWithoutCgroupsCannotBeFrozen(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &sandboxed{key: private}
	s.Guest = guesttest.Start(t, guesttest.Options{Verifier: guestapi.NewVerifier(public)})
	if answer := s.call(t, guestapi.PathFreeze, guestapi.Freeze{}, 501); !strings.Contains(answer, "cgroup v2") {
		t.Error(answer)
	}
	s.call(t, guestapi.PathThaw, guestapi.Thaw{}, 204)
}

// startLater asks for a command and does not wait for it.
func startLater(t *testing.T, s *sandboxed, script string) (result <-chan error, output func() string) {
	t.Helper()
	done := make(chan error, 1)
	var res guesttest.Result
	go func() {
		var err error
		res, err = s.Run(t.Context(), guesttest.Shell(script))
		done <- err
	}()
	return done, func() string { return res.Output() }
}

// TestACommandThatIsAskedForMeanwhileStartsAfterTheThaw, also where nothing ran that
// could be frozen.
func TestACommandThatIsAskedForMeanwhileStartsAfterTheThaw(t *testing.T) {
	for _, tt := range []struct {
		what  string
		idle  bool
		steps []string
	}{
		{"something runs", false, []string{"freeze", "thaw"}},
		{"nothing runs", true, nil},
	} {
		t.Run(tt.what, func(t *testing.T) {
			s := startSandboxed(t)
			s.set(func() { s.idle = tt.idle })
			startsAfterTheThaw(t, s)
			s.want(t, tt.steps...)
		})
	}
}

func startsAfterTheThaw(t *testing.T, s *sandboxed) {
	t.Helper()
	s.call(t, guestapi.PathFreeze, guestapi.Freeze{}, 204)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := s.Run(ctx, guesttest.Shell("echo too early")); connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		t.Errorf("a command with a timeout: %v", err)
	}
	done, output := startLater(t, s, "echo late")
	if list, err := s.Process.List(t.Context(), connect.NewRequest(&processv1.ListRequest{})); err != nil || len(list.Msg.GetProcesses()) > 0 {
		t.Errorf("it runs: %v, %v", list, err)
	}
	s.call(t, guestapi.PathThaw, guestapi.Thaw{}, 204)
	if err := <-done; err != nil || output() != "late" {
		t.Errorf("%q, %v", output(), err)
	}
}

// TestTheAgentThawsWhatItsHostHasForgotten: the host died between a freeze and the
// save.
func TestTheAgentThawsWhatItsHostHasForgotten(t *testing.T) {
	s := startSandboxed(t)
	s.call(t, guestapi.PathFreeze, guestapi.Freeze{ThawAfterMs: 1}, 204)
	testkit.Eventually(t, 20*time.Second, "thawed", func() bool { return !s.isFrozen() })
	if res, err := s.Run(t.Context(), guesttest.Shell("echo runs")); err != nil || res.Output() != "runs" {
		t.Errorf("%q, %v", res.Output(), err)
	}
	s.want(t, "freeze", "thaw")
}

func TestAnotherFreezeSetsTheLimitAnew(t *testing.T) {
	s := startSandboxed(t)
	s.call(t, guestapi.PathFreeze, guestapi.Freeze{ThawAfterMs: 3_600_000}, 204)
	s.call(t, guestapi.PathFreeze, guestapi.Freeze{ThawAfterMs: 1}, 204)
	testkit.Eventually(t, 20*time.Second, "thawed", func() bool { return !s.isFrozen() })
}

// TestACopyIsNotThawedByTheLimit: it was saved with the limit in its memory, and
// nobody tells it who it is.
func TestACopyIsNotThawedByTheLimit(t *testing.T) {
	for name, change := range map[string]func(m *machine){
		"another life":                      func(m *machine) { m.life = "second" },
		"a life that is not known any more": func(m *machine) { m.fail = map[string]error{"life": errors.New("EIO")} },
	} {
		t.Run(name, func(t *testing.T) {
			s := startSandboxed(t)
			s.set(func() { s.onFreeze = func() { change(s.machine) } }) // the limit runs from then on
			s.call(t, guestapi.PathFreeze, guestapi.Freeze{ThawAfterMs: 100}, 204)
			testkit.Eventually(t, 20*time.Second, "at its limit", func() bool { return s.log.has("stay frozen") })
			if !s.isFrozen() {
				t.Error("its processes run")
			}
		})
	}
}

func TestACopyIsNotThawedByTheHostEither(t *testing.T) {
	s := startSandboxed(t)
	s.call(t, guestapi.PathFreeze, guestapi.Freeze{}, 204)
	s.set(func() { s.life = "second" })
	if answer := s.call(t, guestapi.PathThaw, guestapi.Thaw{}, 409); !strings.Contains(answer, "/init") || !s.isFrozen() {
		t.Errorf("%s, frozen: %v", answer, s.isFrozen())
	}
	s.set(func() { s.life = "first" })
	s.call(t, guestapi.PathThaw, guestapi.Thaw{}, 204)
}

// TestFreezeThawRaces: whatever comes together, in the end what was said last holds.
func TestFreezeThawRaces(t *testing.T) {
	s := startSandboxed(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			path := []string{guestapi.PathFreeze, guestapi.PathThaw}[i%2]
			for range 10 {
				s.try(t, path, struct{}{}) // it may be older than another one that was faster
			}
		})
		wg.Go(func() {
			if _, err := s.Run(t.Context(), guesttest.Shell("exit 0")); err != nil {
				t.Error(err)
			}
		})
	}
	thaw := make(chan struct{})
	go func() {
		defer close(thaw)
		wg.Wait()
	}()
	testkit.Eventually(t, 60*time.Second, "all over", func() bool {
		s.try(t, guestapi.PathThaw, struct{}{})
		select {
		case <-thaw:
			return true
		default:
			return false
		}
	})
	s.call(t, guestapi.PathFreeze, guestapi.Freeze{}, 204)
	if !s.isFrozen() {
		t.Error("not frozen")
	}
	s.call(t, guestapi.PathThaw, guestapi.Thaw{}, 204)
	if s.isFrozen() {
		t.Error("frozen")
	}
	if steps := s.taken(); slices.Contains(steps, "clock") {
		t.Error(fmt.Sprint(steps))
	}
}
