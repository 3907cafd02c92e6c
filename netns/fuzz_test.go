package netns_test

import (
	"net/netip"
	"testing"

	"github.com/dormouse-sandbox/dormouse/netns"
)

func FuzzParseResolvers(f *testing.F) {
	f.Add("nameserver 192.0.2.1\nnameserver\nnameserver x\nsearch a b\n# nameserver 192.0.2.2\n")
	f.Add("nameserver 2001:db8::1%eth0 # why\r\n\tnameserver\t192.0.2.3")
	f.Fuzz(func(t *testing.T, text string) {
		for _, server := range netns.ParseResolvers(text) {
			if !server.IsValid() || server.Port() != 53 {
				t.Errorf("resolver %v", server)
			}
		}
	})
}

// FuzzMemo: what an instance remembers is read from the kernel's table, where
// anybody with root may have written.
func FuzzMemo(f *testing.F) {
	whole := netns.MemoText(netip.MustParsePrefix("100.64.0.0/16"), "0")
	for n := range len(whole) + 1 { // also cut short anywhere
		f.Add(whole[:n])
	}
	f.Add("pool=100.64.0.0/16 ip_forward=0 tomorrow=1 pool=")
	f.Fuzz(func(t *testing.T, text string) {
		pool, forwarding, ok := netns.ParseMemo(text)
		if !ok {
			return
		}
		if !pool.IsValid() || forwarding == "" {
			t.Errorf("%q is taken for a memo: %v, %q", text, pool, forwarding)
		}
		again, same, ok := netns.ParseMemo(netns.MemoText(pool, forwarding))
		if !ok || again != pool || same != forwarding {
			t.Errorf("%q became %v, %q", text, again, same)
		}
	})
}
