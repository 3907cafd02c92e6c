package netns

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// match is a part of a rule: some expressions that load and compare. Parts are
// joined in the order in which `nft` would print them.
type match []expr.Any

func join(parts ...match) []expr.Any {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func eq(data []byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data}
}

func meta(key expr.MetaKey) expr.Any { return &expr.Meta{Key: key, Register: 1} }

// ifname pads to the 16 bytes of an interface name: an exact match.
func ifname(name string) []byte {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return padded
}

func iif(name string) match { return match{meta(expr.MetaKeyIIFNAME), eq(ifname(name))} }
func oif(name string) match { return match{meta(expr.MetaKeyOIFNAME), eq(ifname(name))} }

// iifPrefix matches every interface whose name starts with prefix: `iifname "prefix*"`.
func iifPrefix(prefix string) match { return match{meta(expr.MetaKeyIIFNAME), eq([]byte(prefix))} }
func oifPrefix(prefix string) match { return match{meta(expr.MetaKeyOIFNAME), eq([]byte(prefix))} }

func iifIn(set *nftables.Set) match { return match{meta(expr.MetaKeyIIFNAME), in(set)} }

func in(set *nftables.Set) expr.Any {
	return &expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID}
}

func ipv4() match { return match{meta(expr.MetaKeyNFPROTO), eq([]byte{unix.NFPROTO_IPV4})} }
func ipv6() match { return match{meta(expr.MetaKeyNFPROTO), eq([]byte{unix.NFPROTO_IPV6})} }
func l4(proto byte) match {
	return match{meta(expr.MetaKeyL4PROTO), eq([]byte{proto})}
}

func etherType(t uint16) match {
	return match{meta(expr.MetaKeyPROTOCOL), eq(binaryutil.BigEndian.PutUint16(t))}
}

func payload(base expr.PayloadBase, offset, length uint32) expr.Any {
	return &expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: length}
}

// Offsets in the IPv4 header.
func loadSource() expr.Any      { return payload(expr.PayloadBaseNetworkHeader, 12, 4) }
func loadDestination() expr.Any { return payload(expr.PayloadBaseNetworkHeader, 16, 4) }

func source(a netip.Addr) match      { return match{loadSource(), eq(a.AsSlice())} }
func destination(a netip.Addr) match { return match{loadDestination(), eq(a.AsSlice())} }

func destinationIn(set *nftables.Set) match { return match{loadDestination(), in(set)} }

// sourceWithin compares the source with a network; op is equal or not equal.
func sourceWithin(op expr.CmpOp, p netip.Prefix) match {
	mask := fromUint32(^uint32(uint64(1)<<(32-p.Bits()) - 1))
	return match{
		loadSource(),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask.AsSlice(), Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

func destinationPort(port uint16) match {
	return match{payload(expr.PayloadBaseTransportHeader, 2, 2), eq(binaryutil.BigEndian.PutUint16(port))}
}

// tcpFlags compares the masked flags byte of the TCP header.
func tcpFlags(mask, value byte) match {
	return match{
		payload(expr.PayloadBaseTransportHeader, 13, 1),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{mask}, Xor: []byte{0}},
		eq([]byte{value}),
	}
}

// ctState matches connections in any of the states.
func ctState(states uint32) match {
	return match{
		&expr.Ct{Register: 1, Key: expr.CtKeySTATE},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(states), Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

const (
	ctReply = expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED
	ctNew   = expr.CtStateBitNEW
)

func verdict(kind expr.VerdictKind) match { return match{&expr.Verdict{Kind: kind}} }

func jump(chain string) match {
	return match{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}
}

func accept() match { return verdict(expr.VerdictAccept) }
func drop() match   { return verdict(expr.VerdictDrop) }

// refuse tells the sender with an ICMP message.
func refuse() match {
	return match{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}
}

func reset() match { return match{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}} }

// clampMSS lowers the MSS of a SYN to what the route's MTU carries.
func clampMSS() match {
	return match{
		&expr.Rt{Register: 1, Key: expr.RtTCPMSS},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 2, Size: 2},
		&expr.Exthdr{SourceRegister: 1, Type: 2, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
	}
}
