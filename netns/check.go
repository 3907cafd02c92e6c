package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Finding is one thing that Check looked at.
type Finding struct {
	Name string // "tun", "veth", "nftables", "ip-forward", "forward-drop"
	OK   bool
	Text string // what was found, one sentence
	Cure string // a command or an advice; empty when OK
}

// Check says whether this host can carry slots: what the kernel lacks, and
// what another tool's rules would drop. It changes nothing; features are tried
// in a namespace that ends with the call. It sees nftables and iptables-nft,
// and not the rules of iptables-legacy.
func Check(ctx context.Context) []Finding {
	if os.Geteuid() != 0 {
		return []Finding{{
			Name: "network", Text: "the network can be looked at by root only", Cure: "run it as root",
		}}
	}
	found := checkKernel(ctx)
	found = append(found, checkForwarding())
	return append(found, checkForwardDrop(ctx)...)
}

// checkKernel makes one of each thing that a slot has.
func checkKernel(ctx context.Context) []Finding {
	probes := []struct {
		name, what, cure string
		try              func() error
	}{
		{"tun", "TAP interfaces", "modprobe tun; in a container, pass /dev/net/tun in", func() error { return createTap(tapName) }},
		{"veth", "veth pairs", "modprobe veth", func() error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = linkPrefix + "probe"
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: uplinkName})
		}},
		{
			"nftables", "nftables with inet, netdev, conntrack and NAT (Linux 5.2)",
			"modprobe -a nf_tables nft_chain_nat nft_ct nft_masq nft_reject_inet", func() error { return probeRules(ctx) },
		},
	}
	var found []Finding
	err := away(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() error {
		for _, p := range probes {
			f := Finding{Name: p.name, OK: true, Text: "the kernel has " + p.what}
			if err := p.try(); err != nil {
				f = Finding{Name: p.name, Text: fmt.Sprintf("the kernel does not let us use %s: %v", p.what, err), Cure: p.cure}
			}
			found = append(found, f)
		}
		return nil
	})
	if err != nil {
		found = append(found, Finding{
			Name: "namespace", Text: fmt.Sprintf("network namespaces cannot be made: %v", err), Cure: "run it as root, with CAP_SYS_ADMIN",
		})
	}
	return found
}

// probeRules declares both rulesets in the calling thread's namespace. The
// netdev chain needs the TAP of the probe before it.
func probeRules(ctx context.Context) error {
	_, peer := SlotAddrs(guestPrefix, 0)
	host := ruleset{inst: "probe", memo: memo{pool: guestPrefix.Masked(), forwarding: "0"}, denied: merge(private)}
	return errors.Join(declareSlotRules(ctx, peer), host.declare(ctx))
}

func checkForwarding() Finding {
	f := Finding{Name: "ip-forward", OK: true}
	value, err := readSysctl(forwardingSysctl)
	switch {
	case err != nil:
		f.OK, f.Text, f.Cure = false, fmt.Sprintf("IPv4 forwarding cannot be read: %v", err), "mount /proc"
	case value == "1":
		f.Text = "IPv4 forwarding is on"
	default:
		f.Text = "IPv4 forwarding is off; it is turned on with the network, and off again with its removal"
		if err := unix.Access("/proc/sys/"+forwardingSysctl, unix.W_OK); err != nil {
			f.OK, f.Text = false, fmt.Sprintf("IPv4 forwarding is off and cannot be turned on: %v", err)
			f.Cure = "sysctl -w net.ipv4.ip_forward=1 (on the machine itself, when this is a container)"
		}
	}
	return f
}

// checkForwardDrop follows a guest's packet and its answer through every
// other tool's forward chains.
func checkForwardDrop(ctx context.Context) []Finding {
	chains, err := forwardChains(ctx)
	if err != nil {
		return []Finding{{Name: "forward-drop", Text: fmt.Sprintf("nftables cannot be read: %v", err), Cure: "see nftables above"}}
	}
	uplink := defaultInterface()
	var found []Finding
	for _, base := range chains {
		w, err := readTable(base.Table)
		if err != nil {
			continue // a table that the library cannot read is no proof of a drop
		}
		asks := w.passes(base, packet{in: anyVeth, out: uplink, state: ctNew})
		answers := w.passes(base, packet{in: uplink, out: anyVeth, state: ctReply})
		if asks && answers {
			continue
		}
		found = append(found, Finding{
			Name: "forward-drop",
			Text: fmt.Sprintf("the chain %s of table %s drops what guests send or receive", base.Name, base.Table.Name),
			Cure: w.cure(base),
		})
	}
	if len(found) == 0 {
		found = []Finding{{Name: "forward-drop", OK: true, Text: "no other tool's firewall drops what guests send or receive"}}
	}
	return found
}

// forwardChains lists the chains of other tools that see forwarded IPv4.
func forwardChains(ctx context.Context) (found []*nftables.Chain, err error) {
	err = do(ctx, "chain-list", "list nftables chains", func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		all, err := c.ListChains()
		for _, chain := range all {
			family := chain.Table.Family
			if chain.Hooknum == nil || *chain.Hooknum != *nftables.ChainHookForward || strings.HasPrefix(chain.Table.Name, tablePrefix) ||
				(family != nftables.TableFamilyIPv4 && family != nftables.TableFamilyINet) {
				continue
			}
			found = append(found, chain)
		}
		return err
	})
	return found, err
}

func defaultInterface() string {
	routes, err := netlink.RouteList(nil, unix.AF_INET)
	if err != nil {
		return ""
	}
	for _, r := range routes {
		if r.Dst != nil {
			if ones, _ := r.Dst.Mask.Size(); ones > 0 {
				continue
			}
		}
		if link, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
			return link.Attrs().Name
		}
	}
	return ""
}
