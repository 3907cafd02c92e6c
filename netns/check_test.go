package netns_test

import (
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/netns"
)

func finding(t *testing.T, name string) netns.Finding {
	t.Helper()
	for _, f := range netns.Check(t.Context()) {
		if f.Name == name {
			return f
		}
	}
	t.Fatalf("no finding is called %s", name)
	return netns.Finding{}
}

func TestCheckKernel(t *testing.T) {
	world(t)
	// The kernel calls a link up a moment after it was set up.
	testkit.Eventually(t, 10*time.Second, "up, the links of the world", func() bool {
		return strings.Count(run(t, "ip -o link show dev uplink0; ip -o link show dev lan0"), "state UP") == 2
	})
	before := run(t, "ip -o link; nft list ruleset")
	for _, name := range []string{"tun", "veth", "nftables", "ip-forward"} {
		if f := finding(t, name); !f.OK {
			t.Errorf("%s: %s", name, f.Text)
		}
	}
	if after := run(t, "ip -o link; nft list ruleset"); after != before {
		t.Errorf("Check changed the host from\n%s\nto\n%s", before, after)
	}
}

// Each verdict of Check is compared with what really happens to a packet.
func TestCheckForwardDrop(t *testing.T) {
	n := network(t, netns.Config{})
	g := boot(t, acquire(t, n, netns.Policy{Internet: true}))
	const docker = `nft 'table ip filter {
		chain DOCKER-USER { }
		chain DOCKER { oifname "docker0" drop; }
		chain FORWARD { type filter hook forward priority 0; policy drop;
			jump DOCKER-USER
			oifname "docker0" ct state established,related accept
			oifname "docker0" jump DOCKER
			iifname "docker0" accept; }; }'; `
	for _, tt := range []struct {
		what, rules string
		ok          bool
		cure        string
	}{
		{"no other table", "true", true, ""},
		{"Docker's policy", docker, false, "iptables -I DOCKER-USER"},
		{"Docker's policy with the cure", docker +
			`nft insert rule ip filter DOCKER-USER iifname '"dm*"' accept; nft insert rule ip filter DOCKER-USER oifname '"dm*"' accept`, true, ""},
		{"half of the cure", docker + `nft insert rule ip filter DOCKER-USER iifname '"dm*"' accept`, false, "iptables -I DOCKER-USER"},
		{"a policy of drop that lets established pass", docker +
			`nft insert rule ip filter DOCKER-USER ct state established,related accept; nft insert rule ip filter DOCKER-USER iifname '"dm*"' accept`, true, ""},
		{"a last rule that rejects", `nft 'table inet fw { chain f { type filter hook forward priority 10; policy accept;
			ct state established accept; iifname "lan0" accept; reject with icmpx type admin-prohibited; }; }'`, false, "nft insert rule inet fw f"},
		{"a drop of something else", `nft 'table inet fw { chain f { type filter hook forward priority 10; policy accept;
			iifname "lan0" drop; ip saddr 10.0.0.0/8 drop; }; }'`, true, ""},
	} {
		t.Run(tt.what, func(t *testing.T) {
			t.Cleanup(func() { run(t, "nft delete table ip filter 2>/dev/null; nft delete table inet fw 2>/dev/null; true") })
			run(t, "set -e; "+tt.rules)
			compareFinding(t, g, tt.ok, tt.cure)
		})
	}
	t.Run("iptables", func(t *testing.T) {
		testkit.Tool(t, "iptables-nft")
		t.Cleanup(func() {
			run(t, "iptables-nft -P FORWARD ACCEPT; iptables-nft -F; iptables-nft -X; nft delete table ip filter")
		})
		run(t, "set -e; iptables-nft -P FORWARD DROP; iptables-nft -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT")
		compareFinding(t, g, false, "iptables -I FORWARD -i dm+ -j ACCEPT")
		run(t, strings.ReplaceAll(finding(t, "forward-drop").Cure, "iptables ", "iptables-nft "))
		compareFinding(t, g, true, "")
	})
}

func compareFinding(t *testing.T, g *guest, ok bool, cure string) {
	t.Helper()
	f := finding(t, "forward-drop")
	if f.OK != ok || !strings.Contains(f.Cure, cure) {
		t.Errorf("found %+v", f)
	}
	limit := briefly
	if ok {
		limit = noHurry
	}
	if _, err := dial(g.ns, webServer, limit); (err == nil) != ok {
		t.Errorf("while Check says %v, a connection has the error %v", f.OK, err)
	}
}
