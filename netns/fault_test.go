package netns_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/netns"
)

// steps lists the failpoints of this package that fn passes, in their order;
// the background's are left out.
func steps(fn func()) []string {
	var mu sync.Mutex
	var names []string
	fault.Observe(func(point string) {
		mu.Lock()
		defer mu.Unlock()
		background := strings.HasPrefix(point, "netns/host-") || point == "netns/denied-set"
		if strings.HasPrefix(point, "netns/") && !background && !slices.Contains(names, point) {
			names = append(names, point)
		}
	})
	defer fault.Observe(nil)
	fn()
	return names
}

func TestAcquireFailsAtEachStep(t *testing.T) {
	n := network(t, netns.Config{})
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	var probe *netns.Slot
	points := steps(func() {
		var err error
		if probe, err = n.Acquire(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	if err := probe.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(points) < 25 {
		t.Fatalf("only %d steps: %v", len(points), points)
	}
	for _, point := range points {
		t.Run(strings.TrimPrefix(point, "netns/"), func(t *testing.T) {
			disarm := fault.Set(point, fault.Nth(1, fault.Fail))
			_, err := n.Acquire(t.Context())
			disarm()
			if !errors.Is(err, fault.ErrInjected) {
				t.Fatalf("acquire: %v", err)
			}
			if left := remains(t, "test0"); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			s, err := n.Acquire(t.Context())
			if err != nil {
				t.Fatalf("the next acquire: %v", err)
			}
			if s.Index() != 0 {
				t.Errorf("the next acquire got slot %d", s.Index())
			}
			if err := s.Close(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAcquireIsCancelledAtEachStep(t *testing.T) {
	n := network(t, netns.Config{})
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, point := range []string{"netns/namespace-mount", "netns/veth-add", "netns/tap-create", "netns/slot-rules", "netns/dns-tcp"} {
		ctx, cancel := context.WithCancel(t.Context())
		disarm := fault.Set(point, func(context.Context, string) error {
			cancel()
			return nil
		})
		_, err := n.Acquire(ctx)
		disarm()
		cancel()
		if point != "netns/dns-tcp" && !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", point, err)
		}
		if left := remains(t, "test0"); err != nil && len(left) > 0 {
			t.Errorf("%s left %v", point, left)
		}
	}
}

func TestCloseFailsAtEachStep(t *testing.T) {
	n := network(t, netns.Config{})
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	probe := acquire(t, n, netns.Policy{Internet: true})
	points := steps(func() {
		if err := probe.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	if len(points) < 6 {
		t.Fatalf("only %d steps: %v", len(points), points)
	}
	broken := func(t *testing.T, point string) *netns.Slot {
		s := acquire(t, n, netns.Policy{Internet: true})
		disarm := fault.Set(point, fault.Fail)
		err := s.Close(t.Context())
		disarm()
		if !errors.Is(err, fault.ErrInjected) {
			t.Fatalf("close: %v", err)
		}
		return s
	}
	for _, point := range points {
		t.Run(strings.TrimPrefix(point, "netns/"), func(t *testing.T) {
			s := broken(t, point)
			if err := s.Close(t.Context()); err != nil {
				t.Fatalf("close again: %v", err)
			}
			if left := remains(t, "test0"); len(left) > 0 {
				t.Errorf("left after the second close: %v", left)
			}
			broken(t, point)
			if err := n.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			if left := remains(t, "test0"); len(left) > 0 {
				t.Errorf("left after the sweep: %v", left)
			}
		})
	}
}

func TestOpenFailsAtEachStep(t *testing.T) {
	world(t)
	cfg := netns.Config{Instance: "test0"}
	t.Cleanup(func() { _ = netns.Remove(context.Background(), cfg) }) // done below
	var points []string
	fault.Observe(func(point string) {
		if !slices.Contains(points, point) {
			points = append(points, point)
		}
		if point == "netns/forwarding-set" {
			fault.Observe(nil) // the last step; what follows runs beside the test
		}
	})
	n := open(t, cfg)
	fault.Observe(nil)
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	for _, point := range points {
		if err := netns.Remove(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		disarm := fault.Set(point, fault.Nth(1, fault.Fail))
		_, err := netns.Open(t.Context(), cfg)
		disarm()
		if !errors.Is(err, fault.ErrInjected) {
			t.Errorf("%s: %v", point, err)
		}
	}
	for point := range strings.SplitSeq("table-list forwarding-read internet-list host-links host-addresses host-routes table-declare forwarding-set", " ") {
		if !slices.Contains(points, "netns/"+point) {
			t.Errorf("%s is not a step of Open: %v", point, points)
		}
	}
}

func TestRemoveFailsAtEachStep(t *testing.T) {
	world(t)
	cfg := netns.Config{Instance: "test0"}
	set := func() {
		run(t, "echo 0 > /proc/sys/net/ipv4/ip_forward")
		n := open(t, cfg)
		if _, err := n.Acquire(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
	remove := func() error { return netns.Remove(t.Context(), cfg) }
	set()
	points := steps(func() {
		if err := remove(); err != nil {
			t.Fatal(err)
		}
	})
	for _, point := range points {
		set()
		disarm := fault.Set(point, fault.Fail)
		err := remove()
		disarm()
		if !errors.Is(err, fault.ErrInjected) {
			t.Errorf("%s: %v", point, err)
		}
		if err := remove(); err != nil {
			t.Errorf("%s: again: %v", point, err)
		}
		if left := remains(t, "test0"); len(left) > 0 {
			t.Errorf("%s left %v", point, left)
		}
		if got := strings.TrimSpace(run(t, "cat /proc/sys/net/ipv4/ip_forward")); got != "0" {
			t.Errorf("%s: ip_forward is %s", point, got)
		}
	}
}

// A step of Adopt or SetPolicy that fails leaves the slot as it was, and works
// the next time.
func TestAdoptAndPolicyFailAtEachStep(t *testing.T) {
	first := network(t, netns.Config{})
	s, err := first.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	g := boot(t, s)
	adopt := func(n *netns.Network) error {
		s, err := n.Adopt(t.Context(), s.Index())
		if err != nil {
			return err
		}
		return errors.Join(s.SetPolicy(t.Context(), netns.Policy{Internet: true}), s.SetPolicy(t.Context(), netns.Policy{}))
	}
	reopened := open(t, netns.Config{Instance: "test0"})
	points := steps(func() { err = adopt(reopened) })
	if err != nil || len(points) < 8 {
		t.Fatalf("adopt: %v, by the steps %v", err, points)
	}
	if err := reopened.Close(); err != nil {
		t.Fatal(err)
	}
	for _, point := range points {
		n := open(t, netns.Config{Instance: "test0"})
		disarm := fault.Set(point, fault.Fail)
		if err := adopt(n); !errors.Is(err, fault.ErrInjected) {
			t.Errorf("%s: %v", point, err)
		}
		disarm()
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		last := open(t, netns.Config{Instance: "test0"})
		if err := adopt(last); err != nil {
			t.Errorf("%s: again: %v", point, err)
		}
		if _, err := dial(g.ns, webServer, briefly); err == nil {
			t.Errorf("%s: the internet is open", point)
		}
		if err := last.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
