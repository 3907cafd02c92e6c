package netns_test

import (
	"net/netip"
	"testing"

	"github.com/dormouse-sandbox/dormouse/netns"
)

func TestSlotAddrs(t *testing.T) {
	for _, tt := range []struct {
		pool       string
		index      int
		host, peer string
	}{
		{"100.96.0.0/16", 0, "100.96.0.0", "100.96.0.1"},
		{"100.96.0.0/16", 127, "100.96.0.254", "100.96.0.255"},
		{"100.96.0.0/16", 128, "100.96.1.0", "100.96.1.1"},
		{"100.96.0.0/16", 255, "100.96.1.254", "100.96.1.255"},
		{"100.96.0.0/16", 256, "100.96.2.0", "100.96.2.1"},
		{"100.96.0.0/16", 32767, "100.96.255.254", "100.96.255.255"},
		{"100.96.0.0/15", 32768, "100.97.0.0", "100.97.0.1"},
		{"10.0.0.0/8", 8388607, "10.255.255.254", "10.255.255.255"},
		{"100.96.0.7/16", 1, "100.96.0.2", "100.96.0.3"},
	} {
		host, peer := netns.SlotAddrs(netip.MustParsePrefix(tt.pool), tt.index)
		if host.String() != tt.host || peer.String() != tt.peer {
			t.Errorf("slot %d of %s has %v and %v, want %s and %s", tt.index, tt.pool, host, peer, tt.host, tt.peer)
		}
	}
}

func TestParseResolvers(t *testing.T) {
	got := netns.ParseResolvers("# comment\nsearch lan\nnameserver 127.0.0.53\n nameserver\tfd00::1 # mine\nnameserver\nnameserver nonsense\n")
	want := []string{"127.0.0.53:53", "[fd00::1]:53"}
	if len(got) != len(want) || got[0].String() != want[0] || got[1].String() != want[1] {
		t.Errorf("got %v, want %v", got, want)
	}
}
