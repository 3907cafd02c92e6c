package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// errTaken says that something is at an index that must not be touched, or
// that cannot be removed.
var errTaken = errors.New("the slot's names are taken on this host")

// build makes the slot of an index that claim reserved, and records it. On an
// error nothing of it is left, and the index is free again.
func (n *Network) build(ctx context.Context, index int, as slotState) (*Slot, error) {
	start := time.Now()
	if err := n.clear(ctx, index); err != nil {
		n.settle(index, &entry{state: stateLeaked})
		n.cfg.Log.Warn("slot is skipped", "slot", index, "err", err)
		return nil, errTaken
	}
	s, err := n.create(ctx, index)
	if err != nil {
		n.settle(index, n.afterFailure(index))
		return nil, fmt.Errorf("make slot %d: %w", index, sandbox.WithKind(kindOfKernel(err), err))
	}
	n.settle(index, &entry{as, s})
	n.cfg.Log.Info("slot is made", "slot", index, "took", time.Since(start))
	return s, nil
}

// afterFailure frees an index, or marks it when its rollback failed as well.
func (n *Network) afterFailure(index int) *entry {
	if n.present(index) {
		return &entry{state: stateLeaked}
	}
	return nil
}

// present says whether the host has anything under a slot's names.
func (n *Network) present(index int) bool {
	if _, err := os.Lstat(n.inst.path(index)); err == nil {
		return true
	}
	_, err := netlink.LinkByName(n.inst.name(index))
	return err == nil
}

// clear makes sure that an index is free on the host. Before the first Sweep
// what is there may belong to a running sandbox that will be adopted.
func (n *Network) clear(ctx context.Context, index int) error {
	if !n.present(index) {
		return nil
	}
	n.mu.Lock()
	swept := n.swept
	n.mu.Unlock()
	if !swept {
		return errTaken
	}
	return n.inst.dismantle(ctx, index)
}

// create makes everything of one slot.
func (n *Network) create(ctx context.Context, index int) (_ *Slot, err error) {
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	path, name := n.inst.path(index), n.inst.name(index)
	host, peer := SlotAddrs(n.cfg.Pool, index)
	// Everything of a slot is found by its names, also what a step left half done.
	u.Push("slot", func(ctx context.Context) error { return n.inst.dismantle(ctx, index) })

	if err := createNamespace(ctx, path); err != nil {
		return nil, err
	}
	if err := createVeth(ctx, name, path); err != nil {
		return nil, err
	}
	if err := setUpHost(ctx, name, host); err != nil {
		return nil, err
	}
	var sockets dnsSockets
	err = visit(ctx, path, func() (err error) {
		if err = furnish(ctx, host, peer); err == nil {
			sockets, err = listenDNS(ctx)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return n.newSlot(index, sockets, Policy{}), nil
}

func setUpHost(ctx context.Context, name string, host netip.Addr) error {
	// Before it is up: a link that comes up gives itself an IPv6 address.
	if err := do(ctx, "veth-ipv6", "turn IPv6 off on "+name, func() error { return disableIPv6(name) }); err != nil {
		return err
	}
	_, err := setUp(ctx, "veth", name, netip.PrefixFrom(host, 31))
	return err
}

// furnish sets up the inside of a namespace, on a thread that is in it. The
// rules come before the guest's interface is up.
func furnish(ctx context.Context, host, peer netip.Addr) error {
	for _, iface := range []string{"all", "default"} {
		if err := do(ctx, "inside-ipv6", "turn IPv6 off", func() error { return disableIPv6(iface) }); err != nil {
			return err
		}
	}
	if err := do(ctx, "inside-forwarding", "turn forwarding on", func() error { return writeSysctl(forwardingSysctl, "1") }); err != nil {
		return err
	}
	if err := do(ctx, "tap-create", "make "+tapName, func() error { return createTap(tapName) }); err != nil {
		return err
	}
	if err := declareSlotRules(ctx, peer); err != nil {
		return err
	}
	if _, err := setUp(ctx, "loopback", "lo", netip.Prefix{}); err != nil {
		return err
	}
	if err := furnishUplink(ctx, host, peer); err != nil {
		return err
	}
	return furnishTap(ctx)
}

func furnishUplink(ctx context.Context, host, peer netip.Addr) error {
	uplink, err := setUp(ctx, "uplink", uplinkName, netip.PrefixFrom(peer, 31))
	if err != nil {
		return err
	}
	return do(ctx, "uplink-route", "route through the veth", func() error {
		return netlink.RouteReplace(&netlink.Route{LinkIndex: uplink.Attrs().Index, Gw: host.AsSlice()})
	})
}

func furnishTap(ctx context.Context) error {
	err := do(ctx, "tap-mac", "set the gateway's MAC", func() error {
		link, err := netlink.LinkByName(tapName)
		if err != nil {
			return err
		}
		mac, _ := net.ParseMAC(gatewayMAC) // a constant
		return netlink.LinkSetHardwareAddr(link, mac)
	})
	if err != nil {
		return err
	}
	tap, err := setUp(ctx, "tap", tapName, gatewayPrefix)
	if err != nil {
		return err
	}
	return do(ctx, "tap-neighbour", "name the guest's MAC", func() error {
		mac, _ := net.ParseMAC(guestMAC) // a constant
		return netlink.NeighSet(&netlink.Neigh{
			LinkIndex: tap.Attrs().Index, State: netlink.NUD_PERMANENT, IP: guestPrefix.Addr().AsSlice(), HardwareAddr: mac,
		})
	})
}

// kindOfKernel tells a missing kernel feature or right from a fault of ours.
func kindOfKernel(err error) sandbox.Kind {
	for _, errno := range []error{unix.EPERM, unix.EACCES, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.ENODEV} {
		if errors.Is(err, errno) {
			return sandbox.KindUnsupported
		}
	}
	return sandbox.KindOf(err)
}
