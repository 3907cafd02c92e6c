package netns

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	spoofTable = "dormouse_spoof" // netdev: what the guest may send at all
	slotTable  = "dormouse"       // inet: where it may go, and its translation
)

// declareSlotRules sets the rules inside a slot's namespace, on a thread that
// is in it. They know nothing of the policy: that is the host's table, which
// the guest's root cannot reach even if it broke out into the namespace.
func declareSlotRules(ctx context.Context, peer netip.Addr) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	spoof := c.AddTable(&nftables.Table{Name: spoofTable, Family: nftables.TableFamilyNetdev})
	spoofRules(&tableWriter{c, spoof})
	table := c.AddTable(&nftables.Table{Name: slotTable, Family: nftables.TableFamilyINet})
	slotRules(&tableWriter{c, table}, peer)
	return do(ctx, "slot-rules", "declare the namespace's rules", c.Flush)
}

// spoofRules let in only what carries the guest's own addresses: before ARP,
// IPv6 or connection tracking see a frame.
func spoofRules(w *tableWriter) {
	mac, _ := net.ParseMAC(guestMAC) // a constant
	policy := nftables.ChainPolicyDrop
	w.add(&nftables.Chain{
		Name: "ingress", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookIngress,
		Priority: nftables.ChainPriorityFilter, Policy: &policy, Device: tapName,
	},
		join(match{payload(expr.PayloadBaseLLHeader, 6, 6), &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: mac}}, drop()),
		join(etherType(unix.ETH_P_IP), source(guestPrefix.Addr()), accept()),
		join(etherType(unix.ETH_P_ARP), arpSender(mac, guestPrefix.Addr()), accept()),
	)
}

// arpSender matches the sender's two addresses in an Ethernet ARP message.
func arpSender(mac net.HardwareAddr, ip netip.Addr) match {
	return match{
		payload(expr.PayloadBaseNetworkHeader, 8, 6), eq(mac),
		payload(expr.PayloadBaseNetworkHeader, 14, 4), eq(ip.AsSlice()),
	}
}

func slotRules(w *tableWriter, peer netip.Addr) {
	guest, gateway := guestPrefix.Addr(), gatewayPrefix.Addr()
	toGateway := func(m ...match) []expr.Any {
		return join(append([]match{iif(tapName), ipv4(), destination(gateway)}, append(m, accept())...)...)
	}
	drops := nftables.ChainPolicyDrop
	w.base("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, drops,
		join(ipv6(), drop()),
		join(ctState(ctReply), accept()),
		toGateway(l4(unix.IPPROTO_UDP), destinationPort(53)),
		toGateway(l4(unix.IPPROTO_TCP), destinationPort(53)),
		toGateway(l4(unix.IPPROTO_ICMP), match{payload(expr.PayloadBaseTransportHeader, 0, 1), eq([]byte{8})}))
	w.base("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, drops,
		join(ipv6(), drop()),
		// A connection from before a resume or fork is in the middle, and new
		// to this namespace: reset it, or the guest waits minutes for it.
		join(iif(tapName), ctState(ctNew), l4(unix.IPPROTO_TCP), tcpFlags(syn, 0), reset()),
		join(iif(tapName), oif(uplinkName), ipv4(), source(guest), accept()),
		join(iif(uplinkName), oif(tapName), ctState(ctReply), accept()))
	w.base("output", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter, drops,
		join(ipv6(), drop()),
		join(ctState(ctReply), accept()),
		join(oif(tapName), accept()))
	w.base("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept,
		join(oif(uplinkName), ipv4(), source(guest), translate(peer)))
}

// translate gives packets the veth's address, the only one that the host knows.
func translate(to netip.Addr) match {
	return match{
		&expr.Immediate{Register: 1, Data: to.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}
}

// hasSlotRules says whether the calling thread's namespace has both tables.
func hasSlotRules() bool {
	c, err := nftables.New()
	if err != nil {
		return false
	}
	_, spoof := c.ListTableOfFamily(spoofTable, nftables.TableFamilyNetdev)
	_, slot := c.ListTableOfFamily(slotTable, nftables.TableFamilyINet)
	return spoof == nil && slot == nil
}
