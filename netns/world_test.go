package netns_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/netns"
)

// The world around the test's host:
//
//	ns inet: 198.51.100.1 (the host's router), 203.0.113.10, .99, .53 (DNS), 169.254.169.254
//	ns lan:  192.168.77.10, and 192.0.2.10: a LAN with public addresses
const (
	webServer  = "203.0.113.10:80"
	denyServer = "203.0.113.99:80"
	dnsServer  = "203.0.113.53:53"
	metadata   = "169.254.169.254:80"
	lanServer  = "192.168.77.10:80"
	lanPublic  = "192.0.2.10:80"
	hostUplink = "198.51.100.2"
	hostLAN    = "192.168.77.1"
	webName    = "web.example."
)

const worldSetup = `
ip netns add inet; ip netns add lan
ip link add uplink0 type veth peer name u0 netns inet
ip link add lan0 type veth peer name l0 netns lan
ip addr add 198.51.100.2/24 dev uplink0; ip link set uplink0 up
ip addr add 192.168.77.1/24 dev lan0; ip addr add 192.0.2.1/24 dev lan0; ip link set lan0 up
ip addr add fd77::1/64 dev lan0 nodad
ip route add default via 198.51.100.1
ip -n inet link set lo up; ip -n inet addr add 198.51.100.1/24 dev u0; ip -n inet link set u0 up
for a in 203.0.113.10 203.0.113.99 203.0.113.53 169.254.169.254; do ip -n inet addr add $a/32 dev lo; done
ip -n lan link set lo up; ip -n lan addr add 192.168.77.10/24 dev l0; ip -n lan addr add 192.0.2.10/24 dev l0
ip -n lan link set l0 up; ip -n lan route add default via 192.168.77.1
`

var buildWorld = sync.OnceValue(func() error {
	if err := command("sh", "-ec", worldSetup); err != nil {
		return err
	}
	for _, s := range []struct{ ns, addr string }{
		{"inet", webServer}, {"inet", denyServer}, {"inet", metadata}, {"lan", lanServer}, {"lan", lanPublic}, {"", "0.0.0.0:7070"}, {"", "[::]:7071"},
	} {
		if _, err := serve(s.ns, s.addr); err != nil {
			return err
		}
	}
	return serveDNS("inet", dnsServer)
})

// world gives the test's host its surroundings; they live as long as the process.
func world(t testing.TB) {
	t.Helper()
	testkit.Root(t)
	testkit.Tool(t, "ip")
	testkit.Tool(t, "nft")
	if err := buildWorld(); err != nil {
		t.Fatal(err)
	}
}

// serve tells every TCP client its own address, and echoes UDP, until stop.
func serve(ns, addr string) (stop func(), err error) {
	err = within(ns, func() error {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		p, err := net.ListenPacket("udp", addr)
		if err != nil {
			return err
		}
		stop = func() { _ = l.Close(); _ = p.Close() }
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					_, _ = fmt.Fprintln(c, c.RemoteAddr())
					_, _ = io.Copy(c, c)
					_ = c.Close()
				}()
			}
		}()
		go func() {
			buf := make([]byte, 2048)
			for {
				n, from, err := p.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = p.WriteTo(buf[:n], from)
			}
		}()
		return nil
	})
	return stop, err
}

// serveFor is serve for one test.
func serveFor(t testing.TB, ns, addr string) {
	t.Helper()
	stop, err := serve(ns, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
}

func serveDNS(ns, addr string) error {
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		reply := new(dns.Msg).SetReply(q)
		switch name := q.Question[0].Name; {
		case name == webName:
			rr, _ := dns.NewRR(webName + " 60 IN A 203.0.113.10")
			reply.Answer = append(reply.Answer, rr)
		case name == "long.example." && w.LocalAddr().Network() == "udp":
			reply.Truncated = true
		case name == "long.example.":
			for i := range 100 {
				rr, _ := dns.NewRR(fmt.Sprintf("long.example. 60 IN TXT \"%03d %s\"", i, strings.Repeat("x", 40)))
				reply.Answer = append(reply.Answer, rr)
			}
		default:
			reply.Rcode = dns.RcodeNameError
		}
		_ = w.WriteMsg(reply)
	})
	return within(ns, func() error {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		p, err := net.ListenPacket("udp", addr)
		if err != nil {
			return err
		}
		go func() { _ = (&dns.Server{Listener: l, Handler: handler}).ActivateAndServe() }()
		go func() { _ = (&dns.Server{PacketConn: p, Handler: handler}).ActivateAndServe() }()
		return nil
	})
}

// network opens a Network that is removed with the test.
func network(t testing.TB, cfg netns.Config) *netns.Network {
	t.Helper()
	world(t)
	if cfg.Instance == "" {
		cfg.Instance = "test0"
	}
	if cfg.Resolvers == nil {
		cfg.Resolvers = []netip.AddrPort{netip.MustParseAddrPort(dnsServer)}
	}
	if testing.Verbose() && cfg.Log == nil {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	t.Cleanup(func() {
		if err := netns.Remove(context.Background(), cfg); err != nil {
			t.Error(err)
		}
	})
	n, err := netns.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func acquire(t testing.TB, n *netns.Network, p netns.Policy) *netns.Slot {
	t.Helper()
	s, err := n.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if err := s.SetPolicy(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	return s
}

// guest is a namespace that plays the guest of a slot. Its eth0 is a TAP whose
// frames are carried to and from the slot's, as a VMM does.
type guest struct {
	ns   string
	card *os.File
	pull func() // the cable
}

func boot(t testing.TB, s *netns.Slot) *guest {
	t.Helper()
	g := &guest{ns: fmt.Sprintf("guest%d", s.Index()), pull: func() {}}
	run(t, "ip netns add "+g.ns)
	t.Cleanup(func() { run(t, "ip netns del "+g.ns) })
	if err := within(g.ns, func() (err error) { g.card, err = openCard("eth0"); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.pull(); _ = g.card.Close() })
	run(t, fmt.Sprintf(`set -e; ip -n %[1]s link set lo up
		ip -n %[1]s link set eth0 address %[2]s; ip -n %[1]s addr add %[3]v dev eth0; ip -n %[1]s addr add fd99::2/64 dev eth0 nodad
		ip -n %[1]s link set eth0 up; ip -n %[1]s route add default via %[4]v; ip -n %[1]s -6 route add default dev eth0`,
		g.ns, s.MAC(), s.Guest(), s.Gateway()))
	g.plug(t, s)
	return g
}

// plug connects the guest's card to a slot, and disconnects it from the one before.
func (g *guest) plug(t testing.TB, s *netns.Slot) {
	t.Helper()
	g.pull()
	vmm, err := s.OpenTap()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { carry(vmm, g.card) })
	wg.Go(func() { carry(g.card, vmm) })
	g.pull = sync.OnceFunc(func() {
		_ = vmm.SetReadDeadline(time.Now())
		_ = g.card.SetReadDeadline(time.Now())
		wg.Wait()
		_ = vmm.Close()
		_ = g.card.SetReadDeadline(time.Time{})
	})
}

func openCard(name string) (*os.File, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), name), nil
}

// carry moves frames until a deadline on from ends it. A frame for an interface
// that is still down is lost, as on a wire.
func carry(from, to *os.File) {
	buf := make([]byte, 65536+64)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		_, _ = to.Write(buf[:n])
	}
}

// How long dial, echo and resolve wait: noHurry where an answer must come, also on
// a busy machine, and briefly where none may, or where somebody asks again.
const (
	noHurry = 10 * time.Second
	briefly = time.Second
)

// dial connects from a namespace and returns what the server says first: the
// address that it saw.
func dial(ns, addr string, limit time.Duration) (seen string, err error) {
	err = within(ns, func() error {
		c, err := net.DialTimeout("tcp", addr, limit)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(limit))
		buf := make([]byte, 64)
		n, err := c.Read(buf)
		seen = strings.TrimSpace(string(buf[:n]))
		return err
	})
	return seen, err
}

// echo sends a datagram from a namespace and waits for it to come back.
func echo(ns, addr string, limit time.Duration) error {
	return within(ns, func() error {
		c, err := net.Dial("udp", addr)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(limit))
		if _, err := c.Write([]byte("hello")); err != nil {
			return err
		}
		_, err = c.Read(make([]byte, 64))
		return err
	})
}

// resolve asks a DNS server from a namespace.
func resolve(ns, network, server, name string, kind uint16, limit time.Duration) (reply *dns.Msg, err error) {
	err = within(ns, func() (err error) {
		client := &dns.Client{Net: network, Timeout: limit}
		reply, _, err = client.Exchange(new(dns.Msg).SetQuestion(name, kind), server)
		return err
	})
	return reply, err
}
