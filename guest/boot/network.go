package boot

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
)

// configureNetwork brings up the loopback and gives the first other interface
// the address and the default route of the command line.
func (s *System) configureNetwork() error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	var ethernet netlink.Link
	for _, link := range links {
		switch attrs := link.Attrs(); {
		case attrs.Flags&net.FlagLoopback != 0:
			if err := netlink.LinkSetUp(link); err != nil {
				return fmt.Errorf("set %s up: %w", attrs.Name, err)
			}
		case ethernet == nil && attrs.EncapType == "ether":
			ethernet = link
		}
	}
	if !s.Boot.Address.IsValid() {
		return nil // a machine without a network
	}
	if ethernet == nil {
		return s.missing(errors.New("no interface but the loopback"))
	}
	return s.configure(ethernet)
}

func (s *System) configure(link netlink.Link) error {
	name := link.Attrs().Name
	address, gateway := s.Boot.Address, s.Boot.Gateway
	addr := &netlink.Addr{IPNet: &net.IPNet{
		IP:   address.Addr().AsSlice(),
		Mask: net.CIDRMask(address.Bits(), address.Addr().BitLen()),
	}}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("give %s the address %s: %w", name, address, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	if !gateway.IsValid() {
		return nil
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway.AsSlice()}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("route through %s: %w", gateway, err)
	}
	return nil
}
