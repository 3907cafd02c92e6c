package netns_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/netns"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// listener counts the datagrams that reach a port in a namespace, by content.
func listener(t *testing.T, ns, addr string) <-chan string {
	t.Helper()
	got := make(chan string, 64)
	err := within(ns, func() error {
		p, err := net.ListenPacket("udp", addr)
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = p.Close() })
		go func() {
			buf := make([]byte, 2048)
			for {
				n, _, err := p.ReadFrom(buf)
				if err != nil {
					return
				}
				got <- string(buf[:n])
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func send(ns, from, to, text string) error {
	return within(ns, func() error {
		d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}
		c, err := d.Dial("udp", to)
		if err != nil {
			return err
		}
		_, err = c.Write([]byte(text))
		return errors.Join(err, c.Close())
	})
}

// The honest datagram takes the same way after the forged one: when it has
// arrived, the forged one never will.
func TestForgedSourcesAreDropped(t *testing.T) {
	n := network(t, netns.Config{})
	s := acquire(t, n, netns.Policy{Internet: true})
	g := boot(t, s)
	const server = "203.0.113.10:9999"
	got := listener(t, "inet", server)
	const honest = "100.127.255.2"
	veth, _ := netns.SlotAddrs(n.Pool(), s.Index()+1)
	run(t, fmt.Sprintf("ip -n %[1]s addr add 100.96.200.1/32 dev lo; ip -n %[1]s addr add %[2]v/32 dev lo; ip -n %[1]s addr add %[3]s/32 dev lo",
		g.ns, veth, hostUplink))
	for _, forged := range []string{"100.96.200.1", veth.String(), hostUplink} {
		if err := send(g.ns, forged, server, "forged "+forged); err != nil {
			t.Fatal(err)
		}
	}
	if err := send(g.ns, honest, server, "honest"); err != nil {
		t.Fatal(err)
	}
	expect(t, got, "honest")

	run(t, "ip -n "+g.ns+" link set eth0 address 02:64:6d:00:00:99; ip -n "+g.ns+" route replace default via 100.127.255.1")
	run(t, "ip -n "+g.ns+" neigh replace 100.127.255.1 lladdr 02:64:6d:00:00:01 dev eth0")
	if err := send(g.ns, honest, server, "forged MAC"); err != nil {
		t.Fatal(err)
	}
	run(t, "ip -n "+g.ns+" link set eth0 address "+s.MAC())
	if err := send(g.ns, honest, server, "honest again"); err != nil {
		t.Fatal(err)
	}
	expect(t, got, "honest again")
}

func expect(t *testing.T, got <-chan string, want string) {
	t.Helper()
	select {
	case text := <-got:
		if text != want {
			t.Fatalf("%q arrived, not %q", text, want)
		}
	case <-time.After(3 * time.Second):
		t.Fatalf("%q did not arrive", want)
	}
}

func TestNothingOpensAConnectionIntoAGuest(t *testing.T) {
	n := network(t, netns.Config{})
	s := acquire(t, n, netns.Policy{Internet: true})
	g := boot(t, s)
	serveFor(t, g.ns, "0.0.0.0:8080")
	conn, err := s.Dial(t.Context(), "100.127.255.2:8080")
	if err != nil {
		t.Fatalf("the agent itself: %v", err)
	}
	_ = conn.Close()
	_, peer := netns.SlotAddrs(n.Pool(), s.Index())
	run(t, "ip -n inet route replace 100.127.255.0/30 via 198.51.100.2; ip -n inet route replace "+n.Pool().String()+" via 198.51.100.2")
	run(t, fmt.Sprintf("ip route replace 100.127.255.0/30 via %v", peer))
	t.Cleanup(func() {
		run(t, "ip route del 100.127.255.0/30 2>/dev/null; ip -n inet route flush 100.96.0.0/11; true")
	})
	for _, from := range []string{"", "inet"} {
		for _, to := range []string{"100.127.255.2:8080", peer.String() + ":8080"} {
			if _, err := dial(from, to, briefly); err == nil {
				t.Errorf("%s is reached from %q", to, from)
			}
		}
	}
}

func TestGuestHasNoIPv6(t *testing.T) {
	n := network(t, netns.Config{})
	s := acquire(t, n, netns.Policy{Internet: true})
	g := boot(t, s)
	if out := run(t, "ip -n dmtest0-0 -6 addr; ip -6 addr show dev dmtest0-0"); strings.Contains(out, "inet6") {
		t.Errorf("an interface of the slot has an IPv6 address:\n%s", out)
	}
	testkit.Eventually(t, 5*time.Second, "the guest's own IPv6 ready", func() bool {
		out := run(t, "ip -n "+g.ns+" -6 addr show dev eth0")
		return strings.Contains(out, "fe80:") && !strings.Contains(out, "tentative")
	})
	if answersIPv6(t, g.ns) {
		t.Error("the gateway answers over IPv6")
	}
	// The question itself is right: without the rules it is answered.
	run(t, "ip netns exec dmtest0-0 sh -c 'nft flush ruleset; echo 0 > /proc/sys/net/ipv6/conf/tap0/disable_ipv6'; ip -n dmtest0-0 addr add fe80::1/64 dev tap0 nodad; ip -n dmtest0-0 addr add fd99::1/64 dev tap0 nodad")
	testkit.Eventually(t, 5*time.Second, "answered without the rules: the test proves nothing", func() bool {
		return answersIPv6(t, g.ns)
	})
}

// answersIPv6 asks all nodes on the guest's link for an echo, and says whether
// another one than the guest answers.
func answersIPv6(t *testing.T, ns string) (answered bool) {
	t.Helper()
	err := within(ns, func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		own, err := eth0.Addrs()
		if err != nil {
			return err
		}
		p, err := net.ListenPacket("ip6:ipv6-icmp", "::")
		if err != nil {
			return err
		}
		defer func() { _ = p.Close() }()
		_ = p.SetDeadline(time.Now().Add(500 * time.Millisecond))
		echoRequest := []byte{128, 0, 0, 0, 0, 1, 0, 1} // the kernel fills in the checksum
		if _, err := p.WriteTo(echoRequest, &net.IPAddr{IP: net.ParseIP("ff02::1"), Zone: "eth0"}); err != nil {
			return err
		}
		buf := make([]byte, 1500)
		for {
			n, from, err := p.ReadFrom(buf)
			if err != nil {
				return nil // the time is over
			}
			mine := slices.ContainsFunc(own, func(a net.Addr) bool {
				return a.(*net.IPNet).IP.Equal(from.(*net.IPAddr).IP)
			})
			if n > 0 && buf[0] == 129 && !mine {
				answered = true
				return nil
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return answered
}

// A guest that was resumed in another slot still has the connections of the
// one before: they end at once, not after minutes.
func TestOldConnectionsAreReset(t *testing.T) {
	n := network(t, netns.Config{})
	// A server behind a firewall does not answer what it does not know.
	run(t, `ip netns exec inet nft 'table inet quiet { chain c { type filter hook input priority 0; ct state new tcp flags & syn == 0 drop; }; }'`)
	t.Cleanup(func() { run(t, "ip netns exec inet nft delete table inet quiet") })
	before, after := acquire(t, n, netns.Policy{Internet: true}), acquire(t, n, netns.Policy{Internet: true})
	g := boot(t, before)
	var conn net.Conn
	err := within(g.ns, func() (err error) { conn, err = net.Dial("tcp", webServer); return err })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Read(make([]byte, 64)); err != nil {
		t.Fatal(err)
	}
	g.plug(t, after)
	_ = conn.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err = conn.Write([]byte("still there?")); err == nil {
		_, err = conn.Read(make([]byte, 64))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the old connection: %v", err)
	}
	if _, err := dial(g.ns, webServer, noHurry); err != nil {
		t.Errorf("a new connection: %v", err)
	}
}

func TestPolicyEndsOpenConnections(t *testing.T) {
	n := network(t, netns.Config{})
	s := acquire(t, n, netns.Policy{Internet: true})
	g := boot(t, s)
	var conn net.Conn
	err := within(g.ns, func() (err error) { conn, err = net.Dial("tcp", webServer); return err })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Read(make([]byte, 64)); err != nil {
		t.Fatal(err)
	}
	if err := s.SetPolicy(t.Context(), netns.Policy{}); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(3 * time.Second))
	_, _ = conn.Write([]byte("still there?")) // into the socket's buffer
	if n, err := io.ReadFull(conn, make([]byte, 12)); err == nil {
		t.Errorf("%d bytes came back", n)
	}
}

func TestDial(t *testing.T) {
	n := network(t, netns.Config{})
	s := acquire(t, n, netns.Policy{})
	if _, err := s.Dial(t.Context(), "localhost:80"); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("a name: %v", err)
	}
	// Nobody is at the guest's address yet: the deadline holds.
	g := boot(t, s)
	run(t, "ip -n "+g.ns+" link set eth0 down")
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Dial(short, "100.127.255.2:1"); !sandbox.Is(err, sandbox.KindTimeout) {
		t.Errorf("nobody there: %v", err)
	}
	run(t, "ip -n "+g.ns+" link set eth0 up")
	if _, err := s.Dial(t.Context(), "100.127.255.2:1"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Dial(t.Context(), "100.127.255.2:1"); err == nil {
		t.Error("a closed slot was dialled")
	}
}

// TestDialsHoldNoThreads: guests that answer nothing could otherwise use up what
// a process may have of them.
func TestDialsHoldNoThreads(t *testing.T) {
	n := network(t, netns.Config{})
	s := acquire(t, n, netns.Policy{})
	g := boot(t, s)
	run(t, "ip -n "+g.ns+" link set eth0 down")
	before := threads(t)
	ctx, cancel := context.WithCancel(t.Context())
	const dials = 200
	ended := make(chan error, dials)
	for range dials {
		go func() {
			_, err := s.Dial(ctx, "100.127.255.2:1")
			ended <- err
		}()
	}
	testkit.Eventually(t, 10*time.Second, "under way, all of them", func() bool {
		return strings.Count(run(t, "ss -N dmtest0-0 -Htn state syn-sent"), "\n") == dials
	})
	if during := threads(t); during > before+dials*3/4 { // the busy scheduler has some; one a dial is too many
		t.Errorf("%d threads before %d dials, %d meanwhile", before, dials, during)
	}
	cancel()
	for range dials {
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Fatalf("a dial ended with %v", err)
		}
	}
}

func threads(t *testing.T) int {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	return len(tasks)
}

func TestTapHasOneQueue(t *testing.T) {
	n := network(t, netns.Config{})
	s := acquire(t, n, netns.Policy{})
	first, err := s.OpenTap()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.OpenTap(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("a second queue: %v", err)
	}
	// A descriptor that somebody forgot does not keep the guest connected.
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := first.Write(make([]byte, 74)); err == nil {
		t.Error("the TAP still takes frames")
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	testkit.Eventually(t, time.Second, "gone", func() bool { return len(remains(t, "test0")) == 0 })
}
