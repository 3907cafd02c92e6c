package netns

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// maxSlots is what fits the seven digits that an interface name leaves.
const maxSlots = 9_999_999

// Inside each namespace everything is the same, so that a snapshot restores
// anywhere: also the gateway's MAC, which the guest has in its ARP cache.
var (
	guestPrefix   = netip.MustParsePrefix("100.127.255.2/30")
	gatewayPrefix = netip.MustParsePrefix("100.127.255.1/30")
)

const (
	guestMAC   = "02:64:6d:00:00:02"
	gatewayMAC = "02:64:6d:00:00:01"
	tapName    = "tap0"
	uplinkName = "eth0" // the namespace's end of the veth
)

// capacity is how many /31 a pool has.
func capacity(pool netip.Prefix) int {
	bits := 32 - pool.Bits()
	if bits > 24 {
		return maxSlots
	}
	return 1 << (bits - 1)
}

// SlotAddrs returns the two addresses of a slot's veth: the host's end and the
// namespace's. They are the index-th /31 of the pool.
func SlotAddrs(pool netip.Prefix, index int) (host, peer netip.Addr) {
	base := toUint32(pool.Masked().Addr())
	first := base + 2*uint32(index)
	return fromUint32(first), fromUint32(first + 1)
}

func toUint32(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func fromUint32(n uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}

// span is a range of addresses, both ends included.
type span struct{ first, last uint32 }

// merge makes the fewest spans that hold the same addresses: the kernel
// refuses elements of an interval set that overlap.
func merge(prefixes []netip.Prefix) []span {
	var all []span
	for _, p := range prefixes {
		if !p.Addr().Is4() {
			continue // IPv6 is dropped as a whole
		}
		first := toUint32(p.Masked().Addr())
		all = append(all, span{first, first | uint32(uint64(1)<<(32-p.Bits())-1)})
	}
	slices.SortFunc(all, func(a, b span) int {
		switch {
		case a.first < b.first:
			return -1
		case a.first > b.first:
			return 1
		}
		return 0
	})
	var out []span
	for _, s := range all {
		if n := len(out); n > 0 && uint64(s.first) <= uint64(out[n-1].last)+1 {
			out[n-1].last = max(out[n-1].last, s.last)
			continue
		}
		out = append(out, s)
	}
	return out
}
