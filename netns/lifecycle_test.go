package netns_test

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/netns"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// remains lists what the host has of an instance, its table aside.
func remains(t testing.TB, instance string) []string {
	t.Helper()
	var found []string
	for _, name := range strings.Fields(run(t, `ls /run/netns; ip -o link | sed 's/^[0-9]*: //; s/[@:].*//'`)) {
		if strings.HasPrefix(name, "dm"+instance+"-") {
			found = append(found, name)
		}
	}
	for _, word := range strings.Fields(run(t, "nft list set inet dormouse_"+instance+" internet 2>/dev/null || true")) {
		if strings.Contains(word, "dm"+instance+"-") {
			found = append(found, "set:"+word)
		}
	}
	return found
}

func open(t testing.TB, cfg netns.Config) *netns.Network {
	t.Helper()
	if cfg.Resolvers == nil {
		cfg.Resolvers = []netip.AddrPort{netip.MustParseAddrPort(dnsServer)}
	}
	n, err := netns.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.Close() }) // a second time, in most tests
	return n
}

// A process that ends without Close leaves its DNS sockets to nobody; closing
// the Network is how a test does that.
func TestAdoptAfterRestart(t *testing.T) {
	first := network(t, netns.Config{})
	online, err := first.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := online.SetPolicy(t.Context(), netns.Policy{Internet: true}); err != nil {
		t.Fatal(err)
	}
	offline, err := first.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stray, err := first.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	run(t, "ip -n dmtest0-2 link set lo alias stray")
	g, quiet := boot(t, online), boot(t, offline)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := dial(g.ns, webServer, noHurry); err != nil {
		t.Fatalf("while no server runs: %v", err)
	}

	second := open(t, netns.Config{Instance: "test0", Prepare: 2})
	if _, err := dial(g.ns, webServer, noHurry); err != nil {
		t.Fatalf("while it is not adopted yet: %v", err)
	}
	early := acquire(t, second, netns.Policy{}) // neither this nor the preparer takes what may be adopted
	if early.Index() <= stray.Index() {
		t.Errorf("a slot of the first process was handed out: %d", early.Index())
	}
	for _, s := range []*netns.Slot{offline, online} {
		if _, err := second.Adopt(t.Context(), s.Index()); err != nil {
			t.Fatal(err)
		}
	}
	if err := second.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The preparer may have made a new one under the name already.
	if out := run(t, "ip -n dmtest0-2 link show lo 2>/dev/null || true"); strings.Contains(out, "stray") {
		t.Errorf("what was not adopted is still there: %s", out)
	}
	if reply, err := resolve(g.ns, "udp", gatewayDNS, webName, dns.TypeA, noHurry); err != nil || len(reply.Answer) != 1 {
		t.Errorf("DNS after the restart: %v, error %v", reply, err)
	}
	if _, err := dial(g.ns, webServer, noHurry); err != nil {
		t.Errorf("after the restart: %v", err)
	}
	if reply, err := resolve(quiet.ns, "udp", gatewayDNS, webName, dns.TypeA, noHurry); err != nil || reply.Rcode != dns.RcodeRefused {
		t.Errorf("DNS without internet: %v, error %v", reply, err)
	}
	if _, err := second.Adopt(t.Context(), 30); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("adopting what is gone: %v", err)
	}
	if _, err := second.Adopt(t.Context(), online.Index()); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("adopting twice: %v", err)
	}
}

// TestNobodyMountsOverNamespaces does what the first `ip netns add` does: it
// mounts the folder over itself, unless that is shared already.
func TestNobodyMountsOverNamespaces(t *testing.T) {
	testkit.Root(t)
	dir := filepath.Join(t.TempDir(), "netns")
	t.Cleanup(func() { run(t, "umount "+dir) }) // fails if it was mounted not at all
	var g errgroup.Group
	for range 8 {
		g.Go(func() error { return netns.MakeDir(dir) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(mounts), " "+dir+" "); n != 1 {
		t.Errorf("it is mounted %d times", n)
	}
	run(t, "mount --make-shared "+dir) // fails if the folder is no mount
}

func TestAdoptRefusesWhatIsNotWhole(t *testing.T) {
	for _, tt := range []struct{ what, breakIt string }{
		{"the veth is gone", "ip link del %s"},
		{"the TAP is gone", "ip -n %s link del tap0"},
		{"the TAP is down", "ip -n %s link set tap0 down"},
		{"the rules are gone", "ip netns exec %s nft flush ruleset"},
		{"the namespace is gone", "ip netns del %s"},
	} {
		t.Run(tt.what, func(t *testing.T) {
			first := network(t, netns.Config{})
			s, err := first.Acquire(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			run(t, strings.ReplaceAll(tt.breakIt, "%s", "dmtest0-0"))
			second := open(t, netns.Config{Instance: "test0"})
			if _, err := second.Adopt(t.Context(), s.Index()); !sandbox.Is(err, sandbox.KindNotFound) {
				t.Errorf("adopt: %v", err)
			}
			if err := second.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			if left := remains(t, "test0"); len(left) > 0 {
				t.Errorf("left after the sweep: %v", left)
			}
		})
	}
}

func TestLeftoverDoesNotPoisonItsSlot(t *testing.T) {
	n := network(t, netns.Config{MaxSlots: 3})
	world(t)
	// What a crash between two steps leaves: a file without a namespace, a
	// namespace without a veth, a veth without a namespace.
	run(t, `touch /run/netns/dmtest0-0; ip netns add dmtest0-1; ip link add dmtest0-2 type veth peer name strayed`)
	if _, err := n.Acquire(t.Context()); !sandbox.Is(err, sandbox.KindBusy) {
		t.Fatalf("before the sweep they may belong to a sandbox: %v", err)
	}
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := remains(t, "test0"); len(left) > 0 {
		t.Fatalf("left after the sweep: %v", left)
	}
	// And what appears later is repaired by the Acquire.
	run(t, `touch /run/netns/dmtest0-0; ip netns add dmtest0-1; ip link add dmtest0-2 type veth peer name strayed`)
	for range 3 {
		acquire(t, n, netns.Policy{})
	}
}

func TestWhatCannotBeRepairedIsSkipped(t *testing.T) {
	n := network(t, netns.Config{MaxSlots: 2, Prepare: 1})
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	first, second := acquire(t, n, netns.Policy{}), acquire(t, n, netns.Policy{})
	disarm := fault.Set("netns/veth-delete", fault.Fail)
	defer disarm()
	if err := first.Close(t.Context()); !errors.Is(err, fault.ErrInjected) {
		t.Fatalf("close: %v", err)
	}
	if _, err := n.Acquire(t.Context()); !sandbox.Is(err, sandbox.KindBusy) {
		t.Errorf("while the only free one is broken: %v", err)
	}
	disarm()
	if s := acquire(t, n, netns.Policy{}); s.Index() != first.Index() || s.Index() == second.Index() {
		t.Errorf("the repaired slot is %d", s.Index())
	}
	if err := first.Close(t.Context()); err != nil {
		t.Errorf("its first owner closes again: %v", err)
	}
}

func TestSlotsAreBoundedAndUsedAgain(t *testing.T) {
	n := network(t, netns.Config{MaxSlots: 2, Prepare: 2})
	a, b := acquire(t, n, netns.Policy{}), acquire(t, n, netns.Policy{})
	if _, err := n.Acquire(t.Context()); !sandbox.Is(err, sandbox.KindBusy) {
		t.Fatalf("a third of two: %v", err)
	}
	if err := a.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	c := acquire(t, n, netns.Policy{})
	if c.Index() != a.Index() || c.Index() == b.Index() {
		t.Errorf("the third got slot %d", c.Index())
	}
	if err := a.Close(t.Context()); err != nil {
		t.Errorf("closing again: %v", err)
	}
	if err := a.SetPolicy(t.Context(), netns.Policy{Internet: true}); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("policy of a closed slot: %v", err)
	}
	if _, err := os.Stat(c.NetNS()); err != nil {
		t.Errorf("the second close took the slot of its successor: %v", err)
	}
}

func TestPreparedSlots(t *testing.T) {
	n := network(t, netns.Config{Prepare: 2})
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	ready := func(want int) func() bool {
		return func() bool { return len(remains(t, "test0")) == 2*want } // a namespace and a veth each
	}
	testkit.Eventually(t, 5*time.Second, "two slots prepared", ready(2))
	g := boot(t, acquire(t, n, netns.Policy{Internet: true}))
	if _, err := dial(g.ns, webServer, noHurry); err != nil {
		t.Errorf("from a prepared slot: %v", err)
	}
	testkit.Eventually(t, 5*time.Second, "a third one prepared", func() bool { return len(remains(t, "test0")) == 3*2+1 })
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if left := remains(t, "test0"); len(left) != 3 { // with its entry in the set
		t.Errorf("left after Close: %v", left)
	}
}

func TestAcquireFromManyGoroutines(t *testing.T) {
	n := network(t, netns.Config{Prepare: 3})
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var indexes []int
	var wg sync.WaitGroup
	for range 12 {
		wg.Go(func() {
			s, err := n.Acquire(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			indexes = append(indexes, s.Index())
			mu.Unlock()
			if err := s.SetPolicy(t.Context(), netns.Policy{Internet: true}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	slices.Sort(indexes)
	if len(slices.Compact(indexes)) != 12 {
		t.Errorf("slots were handed out twice: %v", indexes)
	}
}

func TestCloseWithoutVeth(t *testing.T) {
	n := network(t, netns.Config{})
	s := acquire(t, n, netns.Policy{Internet: true})
	run(t, "ip link del dmtest0-0")
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if left := remains(t, "test0"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestCloseIgnoresTheCallersCancellation(t *testing.T) {
	n := network(t, netns.Config{})
	s := acquire(t, n, netns.Policy{})
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Close(gone); err != nil {
		t.Error(err)
	}
	if left := remains(t, "test0"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestTwoInstances(t *testing.T) {
	ours := network(t, netns.Config{Instance: "aaaaa"})
	theirs := network(t, netns.Config{Instance: "bbbbb"})
	if ours.Pool().Overlaps(theirs.Pool()) {
		t.Fatalf("both have %v and %v", ours.Pool(), theirs.Pool())
	}
	a := boot(t, acquire(t, ours, netns.Policy{Internet: true}))
	acquire(t, theirs, netns.Policy{Internet: true})
	before := run(t, "nft -s list table inet dormouse_aaaaa")
	if err := theirs.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := theirs.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := netns.Remove(t.Context(), netns.Config{Instance: "bbbbb"}); err != nil {
			t.Fatal(err)
		}
	}
	if left := remains(t, "bbbbb"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if after := run(t, "nft -s list table inet dormouse_aaaaa"); after != before {
		t.Errorf("the other instance's table was\n%s\nand is\n%s", before, after)
	}
	if _, err := dial(a.ns, webServer, noHurry); err != nil {
		t.Errorf("the other instance's guest: %v", err)
	}
}

func TestForwardingIsRestored(t *testing.T) {
	world(t)
	forwarding := func() string { return strings.TrimSpace(run(t, "cat /proc/sys/net/ipv4/ip_forward")) }
	for _, before := range []string{"0", "1"} {
		run(t, "echo "+before+" > /proc/sys/net/ipv4/ip_forward")
		first := open(t, netns.Config{Instance: "aaaaa"})
		second := open(t, netns.Config{Instance: "bbbbb"})
		again := open(t, netns.Config{Instance: "aaaaa"}) // reads its own memo
		if got := forwarding(); got != "1" {
			t.Errorf("from %s: %s while in use", before, got)
		}
		for _, n := range []*netns.Network{first, second, again} {
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := netns.Remove(t.Context(), netns.Config{Instance: "aaaaa"}); err != nil {
			t.Fatal(err)
		}
		if got := forwarding(); got != "1" {
			t.Errorf("from %s: %s while the second instance is there", before, got)
		}
		if err := netns.Remove(t.Context(), netns.Config{Instance: "bbbbb"}); err != nil {
			t.Fatal(err)
		}
		if got := forwarding(); got != before {
			t.Errorf("from %s: %s after the last instance is gone", before, got)
		}
	}
}

func TestDeniedNetworksFollowTheHost(t *testing.T) {
	n := network(t, netns.Config{})
	g := boot(t, acquire(t, n, netns.Policy{Internet: true}))
	if _, err := dial(g.ns, webServer, noHurry); err != nil {
		t.Fatal(err)
	}
	run(t, "ip addr add 203.0.113.1/25 dev lan0 noprefixroute")
	t.Cleanup(func() { run(t, "ip addr del 203.0.113.1/25 dev lan0 2>/dev/null || true") })
	testkit.Eventually(t, 5*time.Second, "the new LAN denied", func() bool {
		_, err := dial(g.ns, webServer, briefly)
		return err != nil
	})
	run(t, "ip addr del 203.0.113.1/25 dev lan0")
	testkit.Eventually(t, 5*time.Second, "the old LAN allowed", func() bool {
		_, err := dial(g.ns, webServer, briefly)
		return err == nil
	})
}

func TestOpenRefuses(t *testing.T) {
	world(t)
	for _, tt := range []struct {
		what string
		cfg  netns.Config
		kind sandbox.Kind
		says []string
	}{
		{"a pool that the host has", netns.Config{Pool: netip.MustParsePrefix("192.168.0.0/16")}, sandbox.KindConflict, []string{"192.168.0.0/16", "192.168.77.0/24", "lan0"}},
		{"a pool that guests have", netns.Config{Pool: netip.MustParsePrefix("100.127.0.0/16")}, sandbox.KindInvalid, []string{"100.127.0.0/16", "100.127.255.0/30"}},
		{"an IPv6 pool", netns.Config{Pool: netip.MustParsePrefix("fd00::/64")}, sandbox.KindInvalid, []string{"fd00::/64"}},
		{"more slots than the pool has", netns.Config{Pool: netip.MustParsePrefix("10.9.0.0/30"), MaxSlots: 3}, sandbox.KindInvalid, []string{"3", "10.9.0.0/30", "2"}},
		{"an instance that is a path", netns.Config{Instance: "../.."}, sandbox.KindInvalid, []string{"../.."}},
	} {
		t.Run(tt.what, func(t *testing.T) {
			if tt.cfg.Instance == "" {
				tt.cfg.Instance = "test0"
			}
			n, err := netns.Open(t.Context(), tt.cfg)
			if err == nil {
				_ = n.Close()
			}
			if !sandbox.Is(err, tt.kind) {
				t.Fatalf("error %v is not %s", err, tt.kind)
			}
			for _, word := range tt.says {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%q does not name %s", err, word)
				}
			}
		})
	}
}
