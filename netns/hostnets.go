package netns

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// private is what no guest reaches: every range that is not the public
// internet. The documentation ranges (RFC 5737) are not in it; they are routed
// nowhere, and tests play the internet with them.
var private = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),      // "this network"
	netip.MustParsePrefix("10.0.0.0/8"),     // RFC 1918
	netip.MustParsePrefix("100.64.0.0/10"),  // RFC 6598: carriers, overlays, our own pools
	netip.MustParsePrefix("127.0.0.0/8"),    // loopback
	netip.MustParsePrefix("169.254.0.0/16"), // link-local: metadata services
	netip.MustParsePrefix("172.16.0.0/12"),  // RFC 1918
	netip.MustParsePrefix("192.0.0.0/24"),   // protocol assignments, some clouds' metadata
	netip.MustParsePrefix("192.168.0.0/16"), // RFC 1918
	netip.MustParsePrefix("198.18.0.0/15"),  // benchmarks
	netip.MustParsePrefix("224.0.0.0/4"),    // multicast
	netip.MustParsePrefix("240.0.0.0/4"),    // reserved, broadcast
}

// hostNet is a network of the host and the interface that has it.
type hostNet struct {
	prefix netip.Prefix
	link   string
}

func fromIPNet(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP.To4())
	ones, bits := n.Mask.Size()
	return netip.PrefixFrom(addr, ones), ok && bits == 32
}

// hostNets lists the host's own addresses and what is directly connected to
// it; with routed also what it reaches through a router. Our own veths, of
// this instance and of others, are left out.
func hostNets(ctx context.Context, routed bool) (found []hostNet, err error) {
	names := map[int]string{}
	err = do(ctx, "host-links", "list interfaces", func() error {
		links, err := listLinks()
		for _, link := range links {
			names[link.Attrs().Index] = link.Attrs().Name
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	add := func(n *net.IPNet, index int) {
		if p, ok := fromIPNet(n); ok && !isSlotLink(names[index]) {
			found = append(found, hostNet{p.Masked(), names[index]})
		}
	}
	err = do(ctx, "host-addresses", "list addresses", func() error {
		addrs, err := untilConsistent(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, unix.AF_INET) })
		for _, a := range addrs {
			add(a.IPNet, a.LinkIndex)
			add(a.Peer, a.LinkIndex)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	err = do(ctx, "host-routes", "list routes", func() error {
		routes, err := untilConsistent(func() ([]netlink.Route, error) { return netlink.RouteList(nil, unix.AF_INET) })
		for _, r := range routes {
			if isLocalRoute(r) || (routed && !isWide(r.Dst)) {
				add(r.Dst, r.LinkIndex)
			}
		}
		return err
	})
	return found, err
}

// isLocalRoute says whether a route leads to neighbours without a router.
func isLocalRoute(r netlink.Route) bool {
	return r.Gw == nil && r.Via == nil && len(r.MultiPath) == 0 && r.Type == unix.RTN_UNICAST && !isWide(r.Dst)
}

// isWide says whether a route is a default route or, as VPN clients set, a
// piece of one: the internet behind a tunnel is not a LAN.
func isWide(dst *net.IPNet) bool {
	if dst == nil {
		return true
	}
	ones, _ := dst.Mask.Size()
	return ones < 8
}

// deniedSpans is what the host's ruleset denies right now.
func deniedSpans(ctx context.Context, pool netip.Prefix, extra []netip.Prefix) ([]span, error) {
	nets, err := hostNets(ctx, false)
	if err != nil {
		return nil, err
	}
	all := append([]netip.Prefix{pool}, private...)
	all = append(all, extra...)
	for _, n := range nets {
		all = append(all, n.prefix)
	}
	return merge(all), nil
}

// checkPool refuses a pool that something else on this host uses.
func checkPool(pool netip.Prefix, nets []hostNet) error {
	for _, n := range nets {
		if pool.Overlaps(n.prefix) {
			return sandbox.Errorf(sandbox.KindConflict, "the pool %v overlaps %v, which %s has: choose another pool",
				pool, n.prefix, n.link)
		}
	}
	return nil
}

// choosePool finds the first default pool that nothing uses: neither the host
// nor another instance, whose table says which one it took.
func choosePool(ctx context.Context, nets []hostNet, taken []netip.Prefix) (netip.Prefix, error) {
	for _, p := range taken {
		nets = append(nets, hostNet{p, "another instance"})
	}
	var first error
	for second := 96; second < 127; second++ {
		pool := netip.PrefixFrom(netip.AddrFrom4([4]byte{100, byte(second), 0, 0}), 16)
		err := checkPool(pool, nets)
		if err == nil {
			return pool, nil
		}
		if first == nil {
			first = err
		}
	}
	return netip.Prefix{}, fmt.Errorf("no default pool is free: %w", first)
}
