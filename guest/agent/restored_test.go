package agent_test

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/guest/agent"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	filesystemv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process/processconnect"
	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// copied is the /init of a copy that becomes sandbox "two".
func copied() guestapi.Init {
	return guestapi.Init{
		Restored: true, NewMachineID: true, Timestamp: time.Now().UTC().Format(time.RFC3339Nano),
		Entropy: bytes.Repeat([]byte{7}, 64), SandboxID: "two", AccessToken: "t2", Hostname: "two",
		EnvVars: map[string]string{"A": "2"}, DefaultUser: guesttest.User, DefaultWorkdir: "/",
	}
}

// restore is what happens to a frozen machine that is saved and restored, as far as
// it can see it.
func (s *sandboxed) restore(t *testing.T) {
	t.Helper()
	s.call(t, guestapi.PathFreeze, guestapi.Freeze{}, 204)
	s.set(func() { s.life = "second" })
	s.taken()
}

func (s *sandboxed) identify(t *testing.T, init guestapi.Init) guestapi.Identified {
	t.Helper()
	var out guestapi.Identified
	if err := json.Unmarshal([]byte(s.call(t, guestapi.PathInit, init, 200)), &out); err != nil {
		t.Fatal(err)
	}
	s.id = init.SandboxID
	return out
}

func TestACopyIsToldInOrderAndThenGoesOn(t *testing.T) {
	s := startSandboxed(t)
	s.restore(t)
	init := copied()
	day := time.Now().Add(24 * time.Hour)
	init.Timestamp = day.Format(time.RFC3339Nano)
	got := s.identify(t, init)
	s.want(t, "clock", "entropy", "hostname", "machine ID", "past", "hooks", "thaw")
	want := guestapi.Identified{Frozen: true, Clock: got.Clock, Dropped: 3, Hooks: []guestapi.Hook{{Name: "10-keys", Output: "done\n"}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, err := time.Parse(time.RFC3339Nano, got.Clock); err != nil {
		t.Error(err)
	}
	// The time that the call itself takes is not lost.
	if late := s.clock.Sub(day); late <= 0 || late > 20*time.Second {
		t.Errorf("the clock was set to %v after the host's time", late)
	}
	if s.isFrozen() || s.hostname != "two" || !bytes.Equal(s.entropy, init.Entropy) {
		t.Errorf("%+v", s.machine)
	}
	if s.hooked.SandboxID != "two" || s.hooked.Token != "t2" || s.hooked.Env["A"] != "2" {
		t.Errorf("the hooks run for %+v", s.hooked)
	}
	if status, _ := do(t, "GET", s.URL+"/envs", token("t1"), nil); status != 401 {
		t.Errorf("the old token: %d", status)
	}
	if _, text := do(t, "GET", s.URL+"/envs", token("t2"), nil); strings.TrimSpace(text) != `{"A":"2"}` {
		t.Errorf("the new environment: %s", text)
	}
}

// TestAMachineThatNobodyHasHadYet is saved right after its boot, and its copies get
// their first owners.
func TestAMachineThatNobodyHasHadYet(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &sandboxed{machine: &machine{life: "first"}, key: private}
	s.Guest = guesttest.Start(t, guesttest.Options{
		Verifier: guestapi.NewVerifier(public), Machine: s.machine, Freezer: s.machine, ClientToken: "t2",
	})
	s.restore(t)
	if got := s.identify(t, copied()); !got.Frozen {
		t.Errorf("%+v", got)
	}
	if res, err := s.Run(t.Context(), guesttest.Shell("echo $DORMOUSE_SANDBOX_ID")); err != nil || res.Output() != "two" {
		t.Errorf("%q, %v", res.Output(), err)
	}
}

// TestAMachineThatHasNoPast, and in which nothing runs, is not frozen, and not asked
// for connections. Where something does run, or that is not known, it is.
func TestAMachineThatHasNoPast(t *testing.T) {
	all := []string{"freeze", "clock", "entropy", "hostname", "machine ID", "past", "hooks", "thaw"}
	for _, tt := range []struct {
		what         string
		unused, idle bool
		fail         map[string]error
		frozen       bool
		want         []string
	}{
		{"nothing runs", true, true, nil, true, []string{"clock", "entropy", "hostname", "machine ID", "hooks"}},
		{"something runs", true, false, nil, false, all},
		{"nobody knows", true, true, map[string]error{"idle": errors.New("no cgroups")}, false, all},
		{"it was used, and nothing runs", false, true, nil, false, []string{"clock", "entropy", "hostname", "machine ID", "past", "hooks"}},
		{"it was used", false, false, nil, false, all},
	} {
		t.Run(tt.what, func(t *testing.T) {
			s := startSandboxed(t)
			s.set(func() { s.life, s.idle, s.fail = "second", tt.idle, tt.fail })
			init := copied()
			init.Unused = tt.unused
			if got := s.identify(t, init); got.Frozen != tt.frozen {
				t.Errorf("%+v", got)
			}
			s.want(t, tt.want...)
		})
	}
}

// TestASandboxThatHasSlept keeps what the host does not say anything about.
func TestASandboxThatHasSlept(t *testing.T) {
	s := startSandboxed(t)
	s.restore(t)
	init := copied()
	s.identify(t, guestapi.Init{Restored: true, Timestamp: init.Timestamp, Entropy: init.Entropy, SandboxID: "one"})
	s.want(t, "clock", "entropy", "past", "hooks", "thaw")
	if res, err := s.Run(t.Context(), guesttest.Shell("echo $DORMOUSE_SANDBOX_ID")); err != nil || res.Output() != "one" {
		t.Errorf("with the old token: %q, %v", res.Output(), err)
	}
}

// TestARehearsalMakesNobodyOfIt: all is done but for the hooks, calls go on, and it is
// who it was.
func TestARehearsalMakesNobodyOfIt(t *testing.T) {
	s := startSandboxed(t)
	init := copied()
	command, err := s.Process.Start(t.Context(), connect.NewRequest(guesttest.Shell("sleep 2; echo on")))
	if err != nil || !command.Receive() {
		t.Fatal(err, command.Err())
	}
	s.identify(t, guestapi.Init{
		Restored: true, Rehearsal: true, Timestamp: init.Timestamp, Entropy: init.Entropy, Hostname: "one", NewMachineID: true,
	})
	s.want(t, "freeze", "clock", "entropy", "hostname", "machine ID", "past", "thaw")
	s.id = "one"
	for command.Receive() { // for longer than a connection of the past would live
		continue
	}
	if err := command.Err(); err != nil {
		t.Errorf("a call under way: %v", err)
	}
	s.restore(t) // signed as the one that it was
	if got := s.identify(t, init); !got.Frozen || len(got.Hooks) != 1 {
		t.Errorf("%+v", got)
	}
}

func TestACopyThatWasNotFrozenIsFrozenFirst(t *testing.T) {
	s := startSandboxed(t)
	if got := s.identify(t, copied()); got.Frozen {
		t.Error("it says that it was frozen")
	}
	s.want(t, "freeze", "clock", "entropy", "hostname", "machine ID", "past", "hooks", "thaw")
}

// TestAStepThatFailsLeavesTheMachineAsItWas, and the host may try again. What is
// worth no failure is a warning.
func TestAStepThatFailsLeavesTheMachineAsItWas(t *testing.T) {
	for _, tt := range []struct {
		step, want string
	}{
		{"clock", "set the clock: broken"},
		{"entropy", "mix in entropy: broken"},
		{"hostname", "set the hostname: broken"},
	} {
		t.Run(tt.step, func(t *testing.T) {
			s := startSandboxed(t)
			s.restore(t)
			s.set(func() { s.fail = map[string]error{tt.step: errors.New("broken")} })
			if answer := s.call(t, guestapi.PathInit, copied(), 500); !strings.Contains(answer, tt.want) {
				t.Errorf("%s, want %q", answer, tt.want)
			}
			s.want(t, "clock", "entropy", "hostname")
			if !s.isFrozen() {
				t.Error("its processes run")
			}
			if status, _ := do(t, "GET", s.URL+"/envs", token("t1"), nil); status != 200 {
				t.Errorf("the old token: %d", status)
			}
			s.set(func() { s.fail = nil })
			s.identify(t, copied()) // signed for who it was
			if s.isFrozen() {
				t.Error("its processes stand still")
			}
		})
	}
}

func TestACopyThatCannotBeFrozenOrThawedIsAnError(t *testing.T) {
	for step, id := range map[string]string{"freeze": "one", "thaw": "two"} {
		s := startSandboxed(t)
		s.set(func() { s.fail = map[string]error{step: errors.New("broken")} })
		if answer := s.call(t, guestapi.PathInit, copied(), 500); !strings.Contains(answer, "broken") {
			t.Errorf("%s: %s", step, answer)
		}
		s.set(func() { s.fail = nil })
		s.id = id // after a thaw that failed it is the new one already
		s.identify(t, copied())
		if s.isFrozen() {
			t.Errorf("%s: its processes stand still", step)
		}
	}
}

func TestWhatIsWorthNoFailure(t *testing.T) {
	s := startSandboxed(t)
	s.restore(t)
	s.set(func() {
		s.fail = map[string]error{
			"machine ID": errors.New("read-only"), "hooks": errors.New("exit status 3"),
			"past": errors.Join(errors.New("no tcp_diag"), errors.New("and more")),
		}
	})
	got := s.identify(t, copied())
	want := []string{"make a new machine ID: read-only", "end connections of the past: no tcp_diag; and more"}
	if diff := cmp.Diff(want, got.Warnings); diff != "" {
		t.Error(diff)
	}
	if len(got.Hooks) != 1 || got.Hooks[0].Error != "exit status 3" || s.isFrozen() {
		t.Errorf("%+v, frozen: %v", got.Hooks, s.isFrozen())
	}
}

// TestABootedMachineMayGetAnIDOfItsOwn: those of one image would all have the same.
func TestABootedMachineMayGetAnIDOfItsOwn(t *testing.T) {
	s := startSandboxed(t)
	s.call(t, guestapi.PathInit, guestapi.Init{NewMachineID: true}, 204)
	s.want(t, "machine ID")
	s.set(func() { s.fail = map[string]error{"machine ID": errors.New("read-only")} })
	s.call(t, guestapi.PathInit, guestapi.Init{NewMachineID: true}, 204)
	if !s.log.has("read-only") {
		t.Error("the log says nothing")
	}
}

func TestACopyNeedsTheTimeAndRandomBytes(t *testing.T) {
	s := startSandboxed(t)
	s.restore(t)
	for name, change := range map[string]func(*guestapi.Init){
		"no time":          func(i *guestapi.Init) { i.Timestamp = "" },
		"no random bytes":  func(i *guestapi.Init) { i.Entropy = nil },
		"few random bytes": func(i *guestapi.Init) { i.Entropy = i.Entropy[:31] },
	} {
		init := copied()
		change(&init)
		if answer := s.call(t, guestapi.PathInit, init, 400); !strings.Contains(answer, "entropy") {
			t.Errorf("%s: %s", name, answer)
		}
	}
	s.want(t)
	if !s.isFrozen() {
		t.Error("its processes run")
	}
}

// TestAnAgentWithoutAHostTakesNobodyForACopy: it is a plain process.
func TestAnAgentWithoutAHostTakesNobodyForACopy(t *testing.T) {
	m := &machine{}
	g := guesttest.Start(t, guesttest.Options{Machine: m, Freezer: m, Hooks: m.hooks})
	if status, text := do(t, "POST", g.URL+"/init", nil, body(t, copied())); status != 204 {
		t.Errorf("%d %s", status, text)
	}
	if steps := m.taken(); len(steps) > 0 {
		t.Errorf("%q", steps)
	}
}

func TestCallsOfThePastEndAndSayWhy(t *testing.T) {
	agent.SetPastGrace(t, 5*time.Second) // what they say is to arrive
	s := startSandboxed(t)
	wantPast := func(what string, err error) {
		t.Helper()
		if connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), "from a snapshot") {
			t.Errorf("%s: %v", what, err)
		}
	}
	command, err := s.Process.Start(t.Context(), connect.NewRequest(guesttest.Shell("exec sleep 300")))
	if err != nil || !command.Receive() {
		t.Fatal(err, command.Err())
	}
	pid := command.Msg().GetEvent().GetStart().GetPid()
	watch, err := s.Filesystem.WatchDir(t.Context(), connect.NewRequest(&filesystemv1.WatchDirRequest{Path: s.Home}))
	if err != nil || !watch.Receive() {
		t.Fatal(err, watch.Err())
	}
	s.restore(t)
	waits, output := startLater(t, s, "echo never")
	s.identify(t, copied())
	if command.Receive() || watch.Receive() {
		t.Error("a stream goes on")
	}
	wantPast("the stream of a command", command.Err())
	wantPast("a watch", watch.Err())
	// It came before the copy was told, or after: with the old token then.
	if err := <-waits; connect.CodeOf(err) != connect.CodeUnauthenticated {
		wantPast("a command that waited", err)
	}
	if output() != "" {
		t.Errorf("it ran: %q", output())
	}
	// The command itself lives on.
	kill := fmt.Appendf(nil, `{"process":{"pid":%d},"signal":"SIGNAL_SIGKILL"}`, pid)
	header := token("t2")
	header.Set("Content-Type", "application/json")
	if status, text := do(t, "POST", s.URL+processconnect.ProcessSendSignalProcedure, header, kill); status != 200 {
		t.Errorf("kill it: %d %s", status, text)
	}
}

// uploading says whether a file is half written.
func (s *sandboxed) uploading(t *testing.T) bool {
	t.Helper()
	entries, err := os.ReadDir(s.Home)
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), ".dormouse-upload-") })
}

// TestConnectionsOfThePastAreClosed: an idle one, and one in the middle of an
// upload. That of the /init itself is not.
func TestConnectionsOfThePastAreClosed(t *testing.T) {
	s := startSandboxed(t)
	dial := func(text string) net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.URL, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() }) // the agent has
		if _, err := conn.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	const head = " HTTP/1.1\r\nHost: guest\r\n" + guestapi.HeaderToken + ": t1\r\n"
	idle := dial("GET /health" + head + "\r\n")
	upload := dial("POST /files?path=upload" + head + "Content-Type: application/octet-stream\r\nContent-Length: 1000\r\n\r\nhalf")
	read := func(conn net.Conn) error {
		if err := conn.SetReadDeadline(time.Now().Add(testkit.Patience(20 * time.Second))); err != nil {
			return err
		}
		_, err := conn.Read(make([]byte, 4096))
		return err
	}
	if err := read(idle); err != nil { // the answer to its request
		t.Fatal(err)
	}
	testkit.Eventually(t, 20*time.Second, "uploading", func() bool { return s.uploading(t) })
	s.restore(t)
	s.identify(t, copied())
	for name, conn := range map[string]net.Conn{"idle": idle, "upload": upload} {
		for err := error(nil); err == nil; {
			var timeout net.Error
			if err = read(conn); errors.As(err, &timeout) && timeout.Timeout() {
				t.Errorf("%s: still open", name)
			}
		}
	}
	testkit.Eventually(t, 20*time.Second, "rid of the half file", func() bool { return !s.uploading(t) })
	if status, text := do(t, "GET", s.URL+"/envs", token("t2"), nil); status != 200 {
		t.Errorf("afterwards: %d %s", status, text)
	}
}

// TestACallOfThePastOnTheConnectionOfTheInit ends, and the connection does not:
// over HTTP/2 they may share one.
func TestACallOfThePastOnTheConnectionOfTheInit(t *testing.T) {
	s := startSandboxed(t)
	protocols := &http.Protocols{}
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	request := connect.NewRequest(guesttest.Shell("exec sleep 300"))
	request.Header().Set(guestapi.HeaderToken, "t1")
	stream, err := processconnect.NewProcessClient(client, s.URL).Start(t.Context(), request)
	if err != nil || !stream.Receive() {
		t.Fatal(err, stream.Err())
	}
	s.restore(t)
	data := body(t, copied())
	req, err := http.NewRequest("POST", s.URL+guestapi.PathInit, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(guestapi.HeaderSignature, guestapi.Sign(s.key, s.id, "POST", guestapi.PathInit, time.Now(), data))
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if err := res.Body.Close(); err != nil || res.StatusCode != 200 {
		t.Errorf("%s, %v", res.Status, err)
	}
	if stream.Receive() || connect.CodeOf(stream.Err()) != connect.CodeUnavailable {
		t.Errorf("the stream: %v", stream.Err())
	}
}
