package netns_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/netns"
)

func TestNextResolverIsAsked(t *testing.T) {
	n := network(t, netns.Config{Resolvers: []netip.AddrPort{
		netip.MustParseAddrPort("203.0.113.10:53"), // nobody listens
		netip.MustParseAddrPort(dnsServer),
	}})
	g := boot(t, acquire(t, n, netns.Policy{Internet: true}))
	if reply, err := resolve(g.ns, "udp", gatewayDNS, webName, dns.TypeA, noHurry); err != nil || len(reply.Answer) != 1 {
		t.Errorf("%v, error %v", reply, err)
	}
}

func TestNoResolverAnswers(t *testing.T) {
	n := network(t, netns.Config{Resolvers: []netip.AddrPort{netip.MustParseAddrPort("203.0.113.10:53")}})
	g := boot(t, acquire(t, n, netns.Policy{Internet: true}))
	if reply, err := resolve(g.ns, "udp", gatewayDNS, webName, dns.TypeA, noHurry); err != nil || reply.Rcode != dns.RcodeServerFailure {
		t.Errorf("%v, error %v", reply, err)
	}
}

func TestResolvConfIsReadAgain(t *testing.T) {
	world(t)
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	write := func(text string) {
		if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("nameserver 203.0.113.10\n")
	// Only this process and what it starts see it: TestMain has unshared mounts.
	if err := unix.Mount(conf, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/etc/resolv.conf", unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	n := network(t, netns.Config{Resolvers: []netip.AddrPort{}})
	g := boot(t, acquire(t, n, netns.Policy{Internet: true}))
	if reply, err := resolve(g.ns, "udp", gatewayDNS, webName, dns.TypeA, noHurry); err != nil || reply.Rcode != dns.RcodeServerFailure {
		t.Fatalf("by the first file: %v, error %v", reply, err)
	}
	write("nameserver 203.0.113.53\n")
	testkit.Eventually(t, 10*time.Second, "the new resolver asked", func() bool {
		reply, err := resolve(g.ns, "udp", gatewayDNS, webName, dns.TypeA, briefly)
		return err == nil && len(reply.Answer) == 1
	})
}
