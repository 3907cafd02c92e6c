package agent_test

import (
	"crypto/ed25519"
	"os"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/agent"
	"github.com/dormouse-sandbox/dormouse/guest/freezer"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// TestRealCommandsStandStill: in real cgroups, with nothing faked but the machine.
func TestRealCommandsStandStill(t *testing.T) {
	agent.SetPastGrace(t, 5*time.Second) // the stream of the past is to say why it ends
	root := testkit.Cgroup(t)
	user := filepath.Join(root, "user")
	if err := os.Mkdir(user, 0o755); err != nil {
		t.Fatal(err)
	}
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &sandboxed{machine: &machine{life: "first"}, key: private}
	s.Guest = guesttest.Start(t, guesttest.Options{
		Verifier: guestapi.NewVerifier(public), Machine: s.machine, Freezer: freezer.New(root, "agent"),
		Cgroup: user, ClientToken: "t1",
	})
	s.call(t, guestapi.PathInit, guestapi.Init{AccessToken: "t1", SandboxID: "one"}, 204)
	s.id = "one"

	count := filepath.Join(s.Home, "count")
	stream, err := s.Process.Start(t.Context(), connect.NewRequest(guesttest.Shell("while :; do echo x >> "+count+"; done")))
	if err != nil || !stream.Receive() {
		t.Fatal(err, stream.Err())
	}
	counted := func() int64 {
		info, err := os.Stat(count)
		if err != nil {
			return 0
		}
		return info.Size()
	}
	testkit.Eventually(t, 20*time.Second, "counting", func() bool { return counted() > 0 })
	s.call(t, guestapi.PathFreeze, guestapi.Freeze{}, 204)
	before := counted()
	late, output := startLater(t, s, "echo late")
	s.call(t, guestapi.PathFreeze, guestapi.Freeze{}, 204)
	time.Sleep(50 * time.Millisecond) // what runs would count thousands by then
	if now := counted(); now != before {
		t.Errorf("it counted from %d to %d", before, now)
	}
	s.call(t, guestapi.PathThaw, guestapi.Thaw{}, 204)
	testkit.Eventually(t, 20*time.Second, "counting again", func() bool { return counted() > before })
	if err := <-late; err != nil || output() != "late" {
		t.Errorf("a command that was asked for meanwhile: %q, %v", output(), err)
	}

	// What runs when a copy is told who it is goes on in it, and its stream does not.
	s.call(t, guestapi.PathFreeze, guestapi.Freeze{}, 204)
	s.set(func() { s.life = "second" })
	before = counted()
	s.identify(t, copied())
	testkit.Eventually(t, 20*time.Second, "counting in the copy", func() bool { return counted() > before })
	if stream.Receive() || connect.CodeOf(stream.Err()) != connect.CodeUnavailable {
		t.Errorf("its stream: %v", stream.Err())
	}
}
