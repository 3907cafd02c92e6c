// Package chaos_test kills what can be killed, at every step, and asks what is
// left: whole servers with real VMs, through the public API.
package chaos_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

func TestMain(m *testing.M) {
	code := m.Run()
	rig.RemoveBinaries()
	os.Exit(code)
}

// Bounds of waiting. They are far above what anything takes on a loaded machine:
// what reaches one is stuck.
var (
	createLimit = testkit.Patience(2 * time.Minute)
	settleLimit = testkit.Patience(time.Minute)
)

// small is the cheapest sandbox.
func small(timeout time.Duration) api.CreateSandbox {
	seconds := timeout.Seconds()
	return api.CreateSandbox{Template: "base", VCPUs: 1, MemMiB: 256, TimeoutSeconds: &seconds}
}

// try creates a sandbox and returns whatever comes of it.
func try(t testing.TB, s *rig.Server) (api.Sandbox, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), createLimit)
	defer cancel()
	return s.Client.CreateSandbox(ctx, small(time.Hour), "")
}

func create(t testing.TB, s *rig.Server) string {
	t.Helper()
	return createFor(t, s, time.Hour)
}

func createFor(t testing.TB, s *rig.Server, life time.Duration) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), createLimit)
	defer cancel()
	sb, err := s.Client.CreateSandbox(ctx, small(life), "")
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	return sb.ID
}

// warm creates and deletes a sandbox: those that come after it do not boot.
func warm(t testing.TB, s *rig.Server) {
	t.Helper()
	id := create(t, s)
	if _, err := remove(t, s, id); err != nil {
		t.Fatal(err)
	}
}

// sh runs a shell line in a sandbox and returns its output.
func sh(t testing.TB, s *rig.Server, id, line string) string {
	t.Helper()
	out, err := shell(t.Context(), s, id, line)
	if err != nil {
		t.Fatalf("exec in %s: %v", id, err)
	}
	return out
}

func shell(ctx context.Context, s *rig.Server, id, line string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	got, err := s.Client.Exec(ctx, id, api.Exec{Shell: line, TimeoutSeconds: settleLimit.Seconds() - 10})
	if err != nil {
		return "", err
	}
	if got.ExitCode != 0 {
		return "", fmt.Errorf("%q: %s: %s", line, got.Status, got.Stderr)
	}
	return strings.TrimSpace(got.Stdout), nil
}

// get asks for a sandbox; it fails the test when there is no answer.
func get(t testing.TB, s *rig.Server, id string) api.Sandbox {
	t.Helper()
	sb, err := s.Client.Get(t.Context(), id)
	if err != nil {
		t.Fatalf("get %s: %v", id, err)
	}
	return sb
}

// settled waits until a sandbox is in none of the states that something has to
// lead out of.
func settled(t testing.TB, s *rig.Server, id string) api.Sandbox {
	t.Helper()
	var sb api.Sandbox
	testkit.Eventually(t, time.Minute, "settled: "+id, func() bool {
		sb = get(t, s, id)
		return sb.State == "running" || sb.State == "failed" || sb.State == "gone"
	})
	return sb
}

// ended waits for the end of a sandbox.
func ended(t testing.TB, s *rig.Server, id string) api.Sandbox {
	t.Helper()
	var sb api.Sandbox
	testkit.Eventually(t, time.Minute, "ended: "+id, func() bool {
		sb = get(t, s, id)
		return sb.State == "failed" || sb.State == "gone"
	})
	return sb
}

// wantEnd checks how a sandbox ended.
func wantEnd(t testing.TB, sb api.Sandbox, state, cause string) {
	t.Helper()
	if sb.State != state || sb.Cause != cause {
		t.Errorf("%s is %s with cause %q (%s), want %s with cause %s", sb.ID, sb.State, sb.Cause, sb.CauseDetail, state, cause)
	}
	if sb.EndedAt == nil {
		t.Errorf("%s has ended, but not said when", sb.ID)
	}
}

// onlyThese checks that nothing of any sandbox but these is on the machine: VM
// processes, network namespaces beyond those that the server keeps ready,
// folders, and where the server uses them, control groups and devices.
func onlyThese(t testing.TB, s *rig.Server, ids ...string) {
	t.Helper()
	slices.Sort(ids)
	folders := map[string]string{
		"disk folders": filepath.Join(s.Data, "host", "sandboxes"),
		"run folders":  "/run/dormouse-" + s.Instance,
	}
	host, err := s.Client.Host(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var wrong []string
	clean := testkit.Poll(settleLimit, func() bool {
		wrong = nil
		if got := s.Groups(); host.Cgroup && !slices.Equal(got, ids) {
			wrong = append(wrong, fmt.Sprintf("control groups are %q, want %q", got, ids))
		}
		if got := s.Overlays(); host.DiskDriver == "dm" && !slices.Equal(got, ids) {
			wrong = append(wrong, fmt.Sprintf("overlays are %q, want %q", got, ids))
		}
		for what, dir := range folders {
			if got := entries(t, dir); !slices.Equal(got, ids) {
				wrong = append(wrong, fmt.Sprintf("%s are %q, want %q", what, got, ids))
			}
		}
		if got := s.VMs(); len(got) != len(ids) {
			wrong = append(wrong, fmt.Sprintf("VM processes are %v, want %d of them", got, len(ids)))
		}
		if got := s.Namespaces(); len(got) > len(ids)+preparedSlots {
			wrong = append(wrong, fmt.Sprintf("namespaces are %q, want at most %d", got, len(ids)+preparedSlots))
		}
		return len(wrong) == 0
	})
	if !clean {
		t.Errorf("left on the machine:\n%s", strings.Join(wrong, "\n"))
	}
}

// preparedSlots is how many namespaces the server keeps ready ahead.
const preparedSlots = 4

func entries(t testing.TB, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	names := []string{}
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

// isDead waits for the death of a server that is to kill itself.
func isDead(t testing.TB, s *rig.Server) bool {
	t.Helper()
	select {
	case <-s.Ended():
		return true
	case <-time.After(settleLimit):
		t.Errorf("the server lives:\n%s", s.Log())
		return false
	}
}

// failedID is the sandbox that a failed create is about.
func failedID(err error) string {
	var e *client.Error
	if errors.As(err, &e) {
		return e.SandboxID
	}
	return ""
}

// all lists every sandbox that the API knows.
func all(t testing.TB, s *rig.Server) map[string]api.Sandbox {
	t.Helper()
	out := map[string]api.Sandbox{}
	for sb, err := range s.Client.Sandboxes(t.Context(), client.ListOptions{All: true}) {
		if err != nil {
			t.Fatal(err)
		}
		out[sb.ID] = sb
	}
	return out
}
