package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func isMissing(err error) bool {
	var none netlink.LinkNotFoundError
	return errors.As(err, &none) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT)
}

// createVeth makes the pair in one call: the host's end under the slot's name,
// the other end inside the namespace at path, so that it is never seen here.
func createVeth(ctx context.Context, name, path string) error {
	ns, err := vnetns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open namespace %s: %w", path, err)
	}
	defer func() { _ = ns.Close() }() // nothing was written
	return do(ctx, "veth-add", "add veth "+name, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: uplinkName, PeerNamespace: netlink.NsFd(ns)})
	})
}

// setUp gives an interface of the calling thread's namespace its address and
// starts it. The failpoints carry label, because names differ from slot to slot.
func setUp(ctx context.Context, label, name string, addr netip.Prefix) (netlink.Link, error) {
	var link netlink.Link
	err := do(ctx, label+"-find", "find "+name, func() (err error) {
		link, err = netlink.LinkByName(name)
		return err
	})
	if err != nil {
		return nil, err
	}
	if addr.IsValid() {
		err = do(ctx, label+"-address", fmt.Sprintf("give %s the address %v", name, addr), func() error {
			return netlink.AddrReplace(link, &netlink.Addr{IPNet: ipNet(addr)})
		})
		if err != nil {
			return nil, err
		}
	}
	err = do(ctx, label+"-up", "set "+name+" up", func() error { return netlink.LinkSetUp(link) })
	return link, err
}

// deleteLink removes an interface of the calling thread's namespace; a missing
// one is success.
func deleteLink(ctx context.Context, label, name string) error {
	return do(ctx, label+"-delete", "delete "+name, func() error {
		link, err := netlink.LinkByName(name)
		if err == nil {
			err = netlink.LinkDel(link)
		}
		if isMissing(err) {
			return nil
		}
		return err
	})
}

// strayVeths lists the slots of an instance that have a veth on the host.
func strayVeths(ctx context.Context, inst instance) ([]int, error) {
	var links []netlink.Link
	err := do(ctx, "veth-list", "list interfaces", func() (err error) {
		links, err = listLinks()
		return err
	})
	var found []int
	for _, link := range links {
		if index, ok := inst.index(link.Attrs().Name); ok {
			found = append(found, index)
		}
	}
	return found, err
}

// listLinks asks again when the kernel says that its list changed meanwhile.
func listLinks() ([]netlink.Link, error) {
	return untilConsistent(netlink.LinkList)
}

func untilConsistent[T any](list func() ([]T, error)) (got []T, err error) {
	for range 20 {
		got, err = list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return got, err
		}
	}
	return got, err
}

// isSlotLink says whether a veth belongs to any instance of ours.
func isSlotLink(name string) bool {
	rest, ok := strings.CutPrefix(name, linkPrefix)
	return ok && len(rest) > 6 && rest[5] == '-' && instanceForm.MatchString(rest[:5])
}
