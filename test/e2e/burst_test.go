package e2e_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// TestTwentyCreatesInARow: twenty sandboxes, one after the other, each of which
// answers a question.
func TestTwentyCreatesInARow(t *testing.T) {
	w := shared(t)
	var slowest, whole time.Duration
	for i := range 20 {
		start := time.Now()
		s, err := w.Client.CreateSandbox(within(t, 3*time.Minute), small(), "")
		if err != nil {
			t.Fatalf("create %d: %v", i+1, err)
		}
		r := w.exec(s.ID, api.Exec{Command: []string{"python3", "-c", "print(6*7)"}})
		took := time.Since(start)
		if r.Stdout != "42\n" || r.ExitCode != 0 {
			t.Errorf("create %d answers %q, %s", i+1, r.Stdout, r.Status)
		}
		w.destroy(s.ID)
		slowest, whole = max(slowest, took), whole+took
	}
	t.Logf("20 creates in a row: 20 answers; create to answer %v on average, %v at most", whole/20, slowest)
}

// TestTwentySandboxesAtOnce: twenty sandboxes of 256 MiB run at the same time,
// each knows itself, and afterwards their VMs are gone.
func TestTwentySandboxesAtOnce(t *testing.T) {
	const many = 20
	w := shared(t)
	before := len(w.VMs())
	start := time.Now()
	ids := make([]string, many)
	t.Cleanup(func() {
		for _, id := range ids {
			if id != "" {
				w.destroy(id)
			}
		}
	})
	var creates errgroup.Group
	ctx := within(t, 5*time.Minute)
	for i := range many {
		creates.Go(func() error {
			req := small()
			req.Env = map[string]string{"NUMBER": fmt.Sprint(i)}
			s, err := w.Client.CreateSandbox(ctx, req, "")
			ids[i] = s.ID
			return err
		})
	}
	if err := creates.Wait(); err != nil {
		t.Fatal(err)
	}
	up := time.Since(start)
	if n := len(w.VMs()) - before; n != many {
		t.Errorf("%d VMs run, want %d", n, many)
	}
	running := 0
	for _, err := range w.Client.Sandboxes(ctx, client.ListOptions{States: []string{"running"}}) {
		if err != nil {
			t.Fatal(err)
		}
		running++
	}
	if running < many {
		t.Errorf("%d sandboxes are running, want at least %d", running, many)
	}
	answers(t, w, ids)
	answered := time.Since(start) - up

	var deletes errgroup.Group
	for _, id := range ids {
		deletes.Go(func() error { _, err := w.Client.Delete(ctx, id); return err })
	}
	if err := deletes.Wait(); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, 10*time.Second, "rid of their VMs", func() bool { return len(w.VMs()) == before })
	t.Logf("%d sandboxes at once: all running after %v, all answered within a further %v; %d VMs left of them afterwards",
		many, up, answered, len(w.VMs())-before)
}

// answers asks all sandboxes at the same time who they are.
func answers(t *testing.T, w world, ids []string) {
	t.Helper()
	var execs errgroup.Group
	ctx := within(t, 3*time.Minute)
	for i, id := range ids {
		execs.Go(func() error {
			r, err := w.Client.Exec(ctx, id, api.Exec{Shell: `echo "$(hostname) $NUMBER $((6*7))"`})
			if err != nil {
				return fmt.Errorf("exec in %s: %w", id, err)
			}
			// A host name is at most an ID, which may be cut.
			name, rest, _ := strings.Cut(strings.TrimSpace(r.Stdout), " ")
			if !strings.HasPrefix(id, name) || name == "" || rest != fmt.Sprint(i, " 42") {
				return fmt.Errorf("%s answers %q", id, r.Stdout)
			}
			return nil
		})
	}
	if err := execs.Wait(); err != nil {
		t.Error(err)
	}
}
