package netns_test

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/netns"
)

var update = flag.Bool("update", false, "write the golden files")

// The kernel is asked what it understood, in nft's words. They differ a little
// from version to version; the goldens have those of Debian 12.
func TestRulesets(t *testing.T) {
	world(t)
	testkit.Require(t, "nft-1.0.6", strings.Contains(run(t, "nft --version"), "v1.0.6 "), "another version prints other words")
	n := network(t, netns.Config{
		Instance:  "gold0",
		Pool:      netip.MustParsePrefix("100.96.0.0/16"),
		DenyExtra: []netip.Prefix{netip.MustParsePrefix("203.0.113.99/32")},
	})
	acquire(t, n, netns.Policy{Internet: true})
	for _, tt := range []struct{ golden, list string }{
		{"host.nft", "nft -s list table inet dormouse_gold0"},
		{"slot.nft", "ip netns exec dmgold0-0 nft -s list ruleset"},
	} {
		path := filepath.Join("testdata", tt.golden)
		// ip_forward depends on which test ran before.
		got := strings.ReplaceAll(run(t, tt.list), "ip_forward=1", "ip_forward=0")
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Errorf("%s (write it anew with -update): %s", tt.golden, diff)
		}
	}
}

func TestOtherTablesAreNotTouched(t *testing.T) {
	world(t)
	run(t, `nft 'table inet other { chain c { type filter hook forward priority 0; policy accept; ip saddr 10.1.2.3 drop; }; }'`)
	t.Cleanup(func() { run(t, "nft delete table inet other") })
	before := run(t, "nft -s list table inet other")
	n := network(t, netns.Config{})
	s := acquire(t, n, netns.Policy{Internet: true})
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if err := netns.Remove(t.Context(), netns.Config{Instance: "test0"}); err != nil {
		t.Fatal(err)
	}
	if after := run(t, "nft -s list ruleset"); after != before {
		t.Errorf("the ruleset was\n%s\nand is\n%s", before, after)
	}
}
