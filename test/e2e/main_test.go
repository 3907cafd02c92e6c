package e2e_test

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// common is the server of every test that does not need one of its own. What
// it leaves on the machine fails the run.
var common = rig.NewShared(rig.Options{})

func TestMain(m *testing.M) {
	code := m.Run()
	if !common.Close() {
		code = 1
	}
	rig.RemoveBinaries()
	os.Exit(code)
}

// world is a server and how one test talks to it.
type world struct {
	*rig.Server
	t testing.TB
}

func shared(t testing.TB) world {
	t.Helper()
	return world{common.For(t), t}
}

// in is the same world for a subtest.
func (w world) in(t testing.TB) world { return world{w.Server, t} }

// within bounds one step of a test, or of its cleanup, when the test's own
// context is over.
func within(t testing.TB, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience(limit))
	t.Cleanup(cancel)
	return ctx
}

// small is a sandbox that costs little.
func small() api.CreateSandbox {
	seconds := time.Hour.Seconds()
	return api.CreateSandbox{MemMiB: 256, TimeoutSeconds: &seconds}
}

// create makes a sandbox that goes with the test.
func (w world) create(req api.CreateSandbox) api.Sandbox {
	w.t.Helper()
	s, err := w.Client.CreateSandbox(within(w.t, 3*time.Minute), req, "")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { w.destroy(s.ID) })
	if s.State != string(sandbox.Running) {
		w.t.Fatalf("after create %s is %s", s.ID, s.State)
	}
	return s
}

func (w world) destroy(id string) {
	w.t.Helper()
	s, err := w.Client.Delete(within(w.t, time.Minute), id)
	if err != nil {
		w.t.Error(err)
	} else if !sandbox.State(s.State).Ended() {
		w.t.Errorf("after delete %s is %s", id, s.State)
	}
}

// commonBox is the sandbox of every test that leaves it as it was.
var commonBox string

func (w world) box() string {
	w.t.Helper()
	if commonBox == "" {
		seconds := (2 * time.Hour).Seconds()
		s, err := w.Client.CreateSandbox(within(w.t, 3*time.Minute), api.CreateSandbox{
			MemMiB: 768, DiskMiB: 8 << 10, TimeoutSeconds: &seconds,
		}, "")
		if err != nil {
			w.t.Fatal(err)
		}
		commonBox = s.ID
	}
	return commonBox
}

// exec runs a command that must run, whatever its status.
func (w world) exec(id string, req api.Exec) api.ExecResult {
	w.t.Helper()
	r, err := w.Client.Exec(within(w.t, 2*time.Minute), id, req)
	if err != nil {
		w.t.Fatalf("exec %q%q: %v", req.Command, req.Shell, err)
	}
	return r
}

// root runs a line as root that must succeed, and returns its output.
func (w world) root(id, line string) string {
	w.t.Helper()
	return w.line(id, "root", line)
}

// sh is root for the template's user.
func (w world) sh(id, line string) string {
	w.t.Helper()
	return w.line(id, "", line)
}

func (w world) line(id, user, line string) string {
	w.t.Helper()
	r := w.exec(id, api.Exec{Shell: line, User: user})
	if r.ExitCode != 0 {
		w.t.Fatalf("%q: %s\n%s%s", line, r.Status, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// await waits until a sandbox has ended.
func (w world) await(id string, limit time.Duration) api.Sandbox {
	w.t.Helper()
	ctx := within(w.t, limit)
	var s api.Sandbox
	testkit.Eventually(w.t, limit, id+" at its end", func() bool {
		var err error
		if s, err = w.Client.Get(ctx, id); err != nil {
			w.t.Fatalf("wait for the end of %s: %v", id, err)
		}
		return sandbox.State(s.State).Ended()
	})
	return s
}
