//go:build !release

package fault_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
)

func TestAnUnarmedPointPasses(t *testing.T) {
	if err := fault.Point(t.Context(), "nobody/armed/this"); err != nil {
		t.Fatal(err)
	}
}

func TestSetFailsOnePointUntilDisarmed(t *testing.T) {
	disarm := fault.Set("a/b", fault.Fail)
	err := fault.Point(t.Context(), "a/b")
	if !errors.Is(err, fault.ErrInjected) || !strings.Contains(err.Error(), "a/b") {
		t.Errorf("got %v, want an injected fault with the name of its point", err)
	}
	if err := fault.Point(t.Context(), "a/c"); err != nil {
		t.Errorf("its neighbour: %v", err)
	}
	disarm()
	if err := fault.Point(t.Context(), "a/b"); err != nil {
		t.Errorf("disarmed: %v", err)
	}
}

func TestNthActsOnce(t *testing.T) {
	defer fault.Set("nth", fault.Nth(3, fault.Fail))()
	var failed []int
	for i := 1; i <= 5; i++ {
		if fault.Point(t.Context(), "nth") != nil {
			failed = append(failed, i)
		}
	}
	if len(failed) != 1 || failed[0] != 3 {
		t.Errorf("failed at %v, want at 3 only", failed)
	}
}

func TestHangEndsWithTheContext(t *testing.T) {
	defer fault.Set("hang", fault.Hang)()
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- fault.Point(ctx, "hang") }()
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestObserveSeesEveryPoint(t *testing.T) {
	var seen []string
	fault.Observe(func(p string) { seen = append(seen, p) })
	defer fault.Observe(nil)
	for _, p := range []string{"one", "two"} {
		if err := fault.Point(t.Context(), p); err != nil {
			t.Fatal(err)
		}
	}
	if strings.Join(seen, " ") != "one two" {
		t.Errorf("saw %v", seen)
	}
}

func TestParse(t *testing.T) {
	for _, spec := range []string{"", "x", "x=explode", "x=error@0", "x=error@many", "x=error,y"} {
		if err := fault.Parse(spec); err == nil {
			t.Errorf("Parse(%q) takes it", spec)
		}
	}
	fault.Set("x", nil) // what the last one armed before it failed

	if err := fault.Parse("p=error,q=error@2"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		fault.Set("p", nil)
		fault.Set("q", nil)
	})
	for _, step := range []struct {
		point string
		fails bool
	}{{"p", true}, {"q", false}, {"q", true}, {"q", false}} {
		if err := fault.Point(t.Context(), step.point); (err != nil) != step.fails {
			t.Errorf("%s: %v", step.point, err)
		}
	}
}

// The test binary runs itself with DORMOUSE_FAULT set: the environment arms the
// point, and kill ends the process as kill -9 would.
func TestKillFromTheEnvironment(t *testing.T) {
	if os.Getenv("FAULT_TEST_CHILD") != "" {
		_ = fault.Point(t.Context(), "die/here") // does not return
		t.Fatal("survived its own death")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	child := exec.CommandContext(t.Context(), self, "-test.run=^TestKillFromTheEnvironment$")
	child.Env = append(os.Environ(), "FAULT_TEST_CHILD=1", "DORMOUSE_FAULT=die/here=kill")
	out, err := child.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatalf("the child ended with %v: %s", err, out)
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
		t.Errorf("the child ended with %v, want a SIGKILL: %s", exit, out)
	}
}

func TestABadEnvironmentIsRefusedAtStart(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	child := exec.CommandContext(t.Context(), self, "-test.run=^$")
	child.Env = append(os.Environ(), "DORMOUSE_FAULT=nonsense")
	out, err := child.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(string(out), "DORMOUSE_FAULT") {
		t.Errorf("the child ended with %v and said %q", err, out)
	}
}
