package netns_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/dormouse-sandbox/dormouse/netns"
)

// victim makes the test binary a server that is killed: its value is what it
// does before, and DORMOUSE_FAULT says at which step it dies.
const victim = "DORMOUSE_NETNS_TEST_VICTIM"

// live is what a victim does; it returns only if no step killed it.
func live(what string) error {
	ctx := context.Background()
	n, err := netns.Open(ctx, netns.Config{Instance: "test0"})
	if err != nil {
		return err
	}
	if err := n.Sweep(ctx); err != nil {
		return err
	}
	s, err := n.Acquire(ctx)
	if err != nil {
		return err
	}
	if err := s.SetPolicy(ctx, netns.Policy{Internet: true}); err != nil {
		return err
	}
	if what == "close" {
		return s.Close(ctx)
	}
	return nil
}

func runVictim(what, point string) error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), victim+"="+what, "DORMOUSE_FAULT="+point+"=kill")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return nil
	}
	return fmt.Errorf("it was not killed: %w: %s", err, out)
}

func TestSweepAfterAKillAtEachStep(t *testing.T) {
	n := network(t, netns.Config{})
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	var s *netns.Slot
	creating := steps(func() { s = acquire(t, n, netns.Policy{Internet: true}) })
	closing := steps(func() {
		if err := s.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	for what, points := range map[string][]string{"acquire": creating, "close": closing} {
		for _, point := range points {
			if strings.HasSuffix(point, "-list") {
				continue // also a step of the victim's own Sweep, before it has made anything
			}
			if what == "close" && (point == "netns/namespace-open" || point == "netns/namespace-enter") {
				continue // the victim passes them before, when it creates
			}
			t.Run(what+" "+strings.TrimPrefix(point, "netns/"), func(t *testing.T) {
				if err := runVictim(what, point); err != nil {
					t.Fatal(err)
				}
				next := open(t, netns.Config{Instance: "test0"})
				if err := next.Sweep(t.Context()); err != nil {
					t.Fatal(err)
				}
				if left := remains(t, "test0"); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
				if err := next.Close(); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}
