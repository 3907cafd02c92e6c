package host_test

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// wire is a network whose guest is a server of the test.
type wire struct {
	host.Network
	address string
}

func (w wire) Guest() netip.Prefix { return netip.MustParsePrefix("127.0.0.1/8") }

func (w wire) Dial(ctx context.Context, _ string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", w.address)
}

// agentStandIn checks the signature of what it is asked, remembers it, and answers.
type agentStandIn struct {
	verifier *guestapi.Verifier
	status   int
	answer   string
	asked    []string // path and body
	heard    func()   // is called when it is asked; nil for nothing
}

func (a *agentStandIn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/health" {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	body, _ := io.ReadAll(r.Body) // the signature finds what is missing
	if err := a.verifier.Verify(r.Header.Get(guestapi.HeaderSignature), "abc", r.Method, r.URL.Path, body); err != nil {
		guestapi.WriteError(w, http.StatusUnauthorized, err.Error())
		return
	}
	a.asked = append(a.asked, r.URL.Path+" "+string(body))
	if a.heard != nil {
		a.heard()
	}
	w.WriteHeader(a.status)
	_, _ = io.WriteString(w, a.answer) // the caller is gone
}

func standIn(t *testing.T) (*agentStandIn, host.Guest, ed25519.PrivateKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	agent := &agentStandIn{verifier: guestapi.NewVerifier(public), status: http.StatusNoContent}
	server := httptest.NewServer(agent)
	t.Cleanup(server.Close)
	g := host.NewGuest(wire{address: server.Listener.Addr().String()})
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return agent, g, private
}

func TestControlCallsAreSignedForWhoTheGuestIs(t *testing.T) {
	agent, g, key := standIn(t)
	now := time.Date(2026, 11, 27, 12, 0, 0, 5, time.UTC)
	if err := g.Freeze(t.Context(), key, "abc", now, guestapi.Freeze{WithinMs: 7}); err != nil {
		t.Error(err)
	}
	if err := g.Thaw(t.Context(), key, "abc", now.Add(time.Second)); err != nil {
		t.Error(err)
	}
	agent.status, agent.answer = http.StatusOK, `{"frozen":true,"dropped":3}`
	got, err := g.Identify(t.Context(), key, "abc", func() time.Time { return now.Add(time.Minute) }, guestapi.Init{SandboxID: "def"})
	if err != nil || !got.Frozen || got.Dropped != 3 {
		t.Errorf("%+v, %v", got, err)
	}
	want := []string{
		`/freeze {"withinMs":7}`,
		`/thaw {"timestamp":"2026-11-27T12:00:01.000000005Z"}`,
		`/init {"timestamp":"2026-11-27T12:01:00.000000005Z","sandboxID":"def","restored":true}`,
	}
	if diff := cmp.Diff(want, agent.asked); diff != "" {
		t.Error(diff)
	}
	if err := g.Thaw(t.Context(), key, "somebody", now.Add(time.Hour)); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("signed for somebody else: %v", err)
	}
}

// TestALateClockIsSetAgain, as who the guest is by then, and not without end.
func TestALateClockIsSetAgain(t *testing.T) {
	start := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		what      string
		said      time.Duration   // the guest's clock when it answers, after the start
		takes     []time.Duration // each call, the first one's included
		rehearsal bool
		thaws     int
	}{
		{what: "in time", said: 10 * time.Millisecond, takes: []time.Duration{20 * time.Millisecond}},
		{what: "late once", said: 0, takes: []time.Duration{time.Second, 5 * time.Millisecond}, thaws: 1},
		{what: "late for ever", said: 0, takes: []time.Duration{time.Second, time.Second, time.Second, time.Second, time.Second}, thaws: 3},
		{what: "at a rehearsal", said: 0, takes: []time.Duration{time.Second}, rehearsal: true},
	} {
		t.Run(tt.what, func(t *testing.T) {
			agent, g, key := standIn(t)
			now, calls := start, 0
			agent.status, agent.answer = http.StatusOK, `{"clock":"`+start.Add(tt.said).Format(time.RFC3339Nano)+`"}`
			agent.heard = func() { now = now.Add(tt.takes[calls]); calls++ }
			init := guestapi.Init{SandboxID: "abc", Rehearsal: tt.rehearsal}
			if _, err := g.Identify(t.Context(), key, "abc", func() time.Time { return now }, init); err != nil {
				t.Fatal(err)
			}
			if calls != 1+tt.thaws {
				t.Errorf("the guest was asked %q", agent.asked)
			}
		})
	}
}

// TestALateClockThatCannotBeSetAgain is no clock to go on with.
func TestALateClockThatCannotBeSetAgain(t *testing.T) {
	agent, g, key := standIn(t)
	now := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	agent.status, agent.answer = http.StatusOK, `{"clock":"`+now.Format(time.RFC3339Nano)+`"}`
	agent.heard = func() {
		now = now.Add(time.Second)
		if len(agent.asked) > 1 {
			agent.status, agent.answer = http.StatusInternalServerError, `{"code":500,"message":"no clock"}`
		}
	}
	_, err := g.Identify(t.Context(), key, "abc", func() time.Time { return now }, guestapi.Init{SandboxID: "abc"})
	if err == nil || !strings.Contains(err.Error(), "set the clock again") || !strings.Contains(err.Error(), "no clock") {
		t.Errorf("it says %v", err)
	}
}

// TestThePortProxyKnowsWhatIsTheHostsAlone: control does not import the guest's
// contract, so the two lists are two.
func TestThePortProxyKnowsWhatIsTheHostsAlone(t *testing.T) {
	want := []string{guestapi.PathInit, guestapi.PathFreeze, guestapi.PathThaw, guestapi.PathPowerOff}
	if diff := cmp.Diff(want, hostapi.AgentControl); diff != "" || hostapi.AgentPort != guestapi.Port {
		t.Errorf("%s, port %d and %d", diff, hostapi.AgentPort, guestapi.Port)
	}
}

func TestControlCallsThatFailHaveAKind(t *testing.T) {
	for _, tt := range []struct {
		status int
		answer string
		kind   sandbox.Kind
		text   string
	}{
		{504, `{"code":504,"message":"123 (cp) does not stand still"}`, sandbox.KindTimeout, "123 (cp)"},
		{501, `{"code":501,"message":"no cgroups"}`, sandbox.KindUnsupported, "no cgroups"},
		{500, `{"code":500,"message":"no clock"}`, sandbox.KindInternal, "no clock"},
		{200, `{"frozen":`, sandbox.KindTransient, "the guest agent's answer"},
	} {
		agent, g, key := standIn(t)
		agent.status, agent.answer = tt.status, tt.answer
		_, err := g.Identify(t.Context(), key, "abc", time.Now, guestapi.Init{})
		if !sandbox.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%d %s: %v is %s", tt.status, tt.answer, err, sandbox.KindOf(err))
		}
	}
}

// TestWhatAHostileGuestSaysOfItselfIsBounded: the answer goes into logs.
func TestWhatAHostileGuestSaysOfItselfIsBounded(t *testing.T) {
	agent, g, key := standIn(t)
	agent.status = http.StatusOK
	evil := guestapi.Identified{Clock: "\x1b[2J"}
	for range 300 {
		evil.Warnings = append(evil.Warnings, "\x1b]0;evil\a")
		evil.Hooks = append(evil.Hooks, guestapi.Hook{Name: "\x07n", Error: "\x07e", Output: "\x07o"})
	}
	data, err := json.Marshal(evil)
	if err != nil {
		t.Fatal(err)
	}
	agent.answer = string(data)
	got, err := g.Identify(t.Context(), key, "abc", time.Now, guestapi.Init{})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Warnings) != 100 || len(got.Hooks) != 100 || got.Hooks[99] != (guestapi.Hook{Name: "n", Error: "e", Output: "o"}) {
		t.Errorf("%d warnings, %d hooks, %+v", len(got.Warnings), len(got.Hooks), got.Hooks[99])
	}
	for _, text := range append(got.Warnings, got.Clock) {
		if strings.ContainsAny(text, "\x1b\a") {
			t.Errorf("%q", text)
		}
	}
	agent.answer = `{"clock":"` + strings.Repeat("a", 2<<20) + `"}`
	if _, err := g.Identify(t.Context(), key, "abc", time.Now, guestapi.Init{}); !sandbox.Is(err, sandbox.KindTransient) {
		t.Errorf("an answer of 2 MiB: %v", err)
	}
}
