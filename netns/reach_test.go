package netns_test

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"

	"github.com/dormouse-sandbox/dormouse/netns"
)

const gatewayDNS = "100.127.255.1:53"

func TestGuestWithInternet(t *testing.T) {
	n := network(t, netns.Config{DenyExtra: []netip.Prefix{netip.MustParsePrefix("203.0.113.99/32")}})
	s := acquire(t, n, netns.Policy{Internet: true})
	g := boot(t, s)

	t.Run("reaches the internet as the host", func(t *testing.T) {
		seen, err := dial(g.ns, webServer, noHurry)
		if err != nil || !strings.HasPrefix(seen, hostUplink+":") {
			t.Fatalf("the server saw %q, error %v", seen, err)
		}
		if err := echo(g.ns, webServer, noHurry); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("resolves a name over UDP and TCP", func(t *testing.T) {
		for _, network := range []string{"udp", "tcp"} {
			reply, err := resolve(g.ns, network, gatewayDNS, webName, dns.TypeA, noHurry)
			if err != nil || len(reply.Answer) != 1 || !strings.Contains(reply.Answer[0].String(), "203.0.113.10") {
				t.Fatalf("%s: %v, error %v", network, reply, err)
			}
		}
	})
	t.Run("is told to ask again over TCP for a long answer", func(t *testing.T) {
		reply, err := resolve(g.ns, "udp", gatewayDNS, "long.example.", dns.TypeTXT, noHurry)
		if err != nil || !reply.Truncated {
			t.Fatalf("udp: %v, error %v", reply, err)
		}
		reply, err = resolve(g.ns, "tcp", gatewayDNS, "long.example.", dns.TypeTXT, noHurry)
		if err != nil || len(reply.Answer) != 100 {
			t.Fatalf("tcp: %v, error %v", reply, err)
		}
	})
	other := acquire(t, n, netns.Policy{Internet: true})
	boot(t, other)
	for _, slot := range []*netns.Slot{s, other} { // what a careless agent could leave listening
		serveFor(t, filepath.Base(slot.NetNS()), "0.0.0.0:7070")
	}
	all := denials(n.Pool(), s.Index(), other.Index())
	found := make([]error, len(all))
	var wg sync.WaitGroup // what is dropped takes its time; all of it at once
	for i, d := range all {
		wg.Go(func() { found[i] = d.check(g.ns) })
	}
	wg.Wait()
	for i, d := range all {
		t.Run("does not reach "+d.what, func(t *testing.T) {
			if found[i] != nil {
				t.Error(found[i])
			}
		})
	}
}

func (d denial) check(from string) error {
	if d.proof != "-" {
		if _, err := dial(d.proof, d.addr, noHurry); err != nil {
			return fmt.Errorf("nothing to deny: %w", err)
		}
	}
	if seen, err := dial(from, d.addr, briefly); err == nil {
		return fmt.Errorf("TCP to %s works, seen as %s", d.addr, seen)
	}
	if err := echo(from, d.addr, briefly); err == nil {
		return fmt.Errorf("UDP to %s works", d.addr)
	}
	return nil
}

type denial struct {
	what, addr string
	proof      string // from where it is reached: a namespace, "" the host, "-" nowhere
}

func denials(pool netip.Prefix, own, other int) []denial {
	ownHost, ownPeer := netns.SlotAddrs(pool, own)
	otherHost, otherPeer := netns.SlotAddrs(pool, other)
	return []denial{
		{"the host by its uplink", hostUplink + ":7070", "inet"},
		{"the host by its LAN address", hostLAN + ":7070", "lan"},
		{"the host by its end of the veth", ownHost.String() + ":7070", ""},
		{"the host by another veth", otherHost.String() + ":7070", ""},
		{"the host by IPv6", "[fd77::1]:7071", ""},
		{"the namespace's end of the veth", ownPeer.String() + ":7070", "-"},
		{"the other guest by its veth", otherPeer.String() + ":7070", "-"},
		{"the LAN", lanServer, ""},
		{"a LAN with public addresses", lanPublic, ""},
		{"the metadata service", metadata, ""},
		{"what the configuration denies", denyServer, ""},
		{"its gateway on another port", "100.127.255.1:7070", "-"},
	}
}

func TestGuestWithoutInternet(t *testing.T) {
	n := network(t, netns.Config{})
	s := acquire(t, n, netns.Policy{Internet: true})
	g := boot(t, s)
	if _, err := dial(g.ns, webServer, noHurry); err != nil {
		t.Fatalf("with internet: %v", err)
	}
	if err := s.SetPolicy(t.Context(), netns.Policy{}); err != nil {
		t.Fatal(err)
	}
	if _, err := dial(g.ns, webServer, briefly); err == nil {
		t.Error("the internet is reached without policy")
	}
	if err := echo(g.ns, webServer, briefly); err == nil {
		t.Error("UDP to the internet works without policy")
	}
	reply, err := resolve(g.ns, "udp", gatewayDNS, webName, dns.TypeA, noHurry)
	if err != nil || reply.Rcode != dns.RcodeRefused {
		t.Errorf("the resolver answers %v, error %v", reply, err)
	}
	if _, err := resolve(g.ns, "udp", dnsServer, webName, dns.TypeA, briefly); err == nil {
		t.Error("another resolver is reached without policy")
	}
}
