package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Policy is what a guest may reach beyond its gateway.
type Policy struct {
	// Internet lets it reach every public address, and ask the resolver.
	Internet bool
}

// Slot is the network of one sandbox. It is used once: Close destroys it.
type Slot struct {
	net   *Network
	index int
	dns   *forwarder

	// changing serialises SetPolicy and Close.
	changing sync.Mutex
}

func (n *Network) newSlot(index int, sockets dnsSockets, p Policy) *Slot {
	dns := newForwarder(sockets, n.resolvers)
	dns.allow(p.Internet)
	return &Slot{net: n, index: index, dns: dns}
}

// Index finds the slot again: Adopt takes it.
func (s *Slot) Index() int { return s.index }

// NetNS is the path of the mounted namespace.
func (s *Slot) NetNS() string { return s.net.inst.path(s.index) }

// TapName is the TAP's name inside the namespace, the same for every slot.
func (s *Slot) TapName() string { return tapName }

// MAC is the guest's Ethernet address, the same for every slot.
func (s *Slot) MAC() string { return guestMAC }

// Guest is the guest's address and network, the same for every slot.
func (s *Slot) Guest() netip.Prefix { return guestPrefix }

// Gateway is the guest's router and resolver, the same for every slot.
func (s *Slot) Gateway() netip.Addr { return gatewayPrefix.Addr() }

// OpenTap attaches to the TAP's only queue (IFF_TAP, IFF_NO_PI,
// IFF_VNET_HDR). The caller owns the file; while a VMM holds a copy the queue
// is busy. The descriptor is non-blocking and close-on-exec.
func (s *Slot) OpenTap() (f *os.File, err error) {
	ctx := context.Background()
	err = visit(ctx, s.NetNS(), func() error {
		err := do(ctx, "tap-open", "open "+tapName, func() (err error) {
			f, err = attachTap(tapName)
			return err
		})
		if err == nil {
			awaitCarrier(tapName)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("slot %d: %w", s.index, err)
	}
	return f, nil
}

// carrierLimit is far above what it takes, and what a lost first packet costs.
const carrierLimit = time.Second

// awaitCarrier waits until the kernel has noticed that somebody is at the TAP,
// which it does in the background: until then it drops what is sent there, and
// the first connection to the guest loses a second to a retransmission.
func awaitCarrier(name string) {
	for end := time.Now().Add(carrierLimit); time.Now().Before(end); time.Sleep(time.Millisecond) {
		link, err := netlink.LinkByName(name)
		if err != nil || link.Attrs().OperState == netlink.OperUp {
			return
		}
	}
}

// Dial connects to a TCP port of the guest, from inside the namespace. address
// is an address and a port, no name. The connection belongs to the namespace for
// as long as it is open; while the guest does not answer, no thread waits for it.
func (s *Slot) Dial(ctx context.Context, address string) (conn net.Conn, err error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil || !to.Addr().Is4() {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "dial %s in slot %d: it is not an IPv4 address and a port", address, s.index)
	}
	var socket *os.File
	err = visit(ctx, s.NetNS(), func() (err error) {
		socket, err = tcpSocket()
		return err
	})
	if err == nil {
		conn, err = connect(ctx, socket, to)
	}
	var slow net.Error
	if errors.As(err, &slow) && slow.Timeout() {
		err = sandbox.WithKind(sandbox.KindTimeout, err)
	}
	if err != nil {
		return nil, fmt.Errorf("slot %d: %w", s.index, err)
	}
	return conn, nil
}

// SetPolicy makes p true, also for connections that are open already. Without
// internet the resolver refuses: a question for a name carries data out.
func (s *Slot) SetPolicy(ctx context.Context, p Policy) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	if !s.net.owns(s) {
		return sandbox.Errorf(sandbox.KindConflict, "set policy of slot %d: it is closed", s.index)
	}
	set := s.net.inst.denyInternet
	if p.Internet {
		set = s.net.inst.allowInternet
	} else {
		s.dns.allow(false)
	}
	if err := set(ctx, s.net.inst.name(s.index)); err != nil {
		return fmt.Errorf("set policy of slot %d: %w", s.index, err)
	}
	s.dns.allow(p.Internet)
	return nil
}

// owns says whether the index still belongs to s: after a failed Close the
// Network may have repaired it and given it away.
func (n *Network) owns(s *Slot) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	e := n.slots[s.index]
	return e != nil && e.slot == s
}

// Close removes everything of the slot from the host. It tries everything,
// ignores the caller's cancellation and joins the errors; called again it
// removes what was left. The VMM is gone before it is called.
func (s *Slot) Close(ctx context.Context) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	if !s.net.owns(s) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undo.Limit)
	defer cancel()
	err := errors.Join(s.dns.close(), s.net.inst.dismantle(ctx, s.index))
	if err != nil {
		s.net.settle(s.index, &entry{stateLeaked, s})
		return fmt.Errorf("close slot %d: %w", s.index, err)
	}
	s.net.settle(s.index, nil)
	s.net.cfg.Log.Info("slot is removed", "slot", s.index)
	return nil
}

// takeOver makes a Slot of what an earlier process left, if it is whole.
func (n *Network) takeOver(ctx context.Context, index int) (*Slot, error) {
	path, name := n.inst.path(index), n.inst.name(index)
	if !isNamespace(path) {
		return nil, sandbox.Errorf(sandbox.KindNotFound, "no namespace at %s", path)
	}
	host, peer := SlotAddrs(n.cfg.Pool, index)
	if err := whole(ctx, "adopt-veth", name, host); err != nil {
		return nil, err
	}
	allowed, err := n.inst.allowed(ctx)
	if err != nil {
		return nil, err
	}
	var sockets dnsSockets
	err = visit(ctx, path, func() error {
		if err := whole(ctx, "adopt-uplink", uplinkName, peer); err != nil {
			return err
		}
		if err := whole(ctx, "adopt-tap", tapName, gatewayPrefix.Addr()); err != nil {
			return err
		}
		if !hasSlotRules() {
			return sandbox.Errorf(sandbox.KindNotFound, "the rules are missing in %s", path)
		}
		var err error
		sockets, err = listenDNS(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	return n.newSlot(index, sockets, Policy{Internet: slices.Contains(allowed, name)}), nil
}

// whole checks that an interface is there, is up and has its address.
func whole(ctx context.Context, label, name string, addr netip.Addr) error {
	return do(ctx, label, "look at "+name, func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return sandbox.WithKind(sandbox.KindNotFound, err)
		}
		if link.Attrs().Flags&net.FlagUp == 0 {
			return sandbox.Errorf(sandbox.KindNotFound, "%s is down", name)
		}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if p, ok := fromIPNet(a.IPNet); ok && p.Addr() == addr {
				return nil
			}
		}
		return sandbox.Errorf(sandbox.KindNotFound, "%s does not have the address %v", name, addr)
	})
}
