package past

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ForgetNeighbours removes what the machine has learned about who has which
// address on the wire. What an administrator has set stays.
func ForgetNeighbours() error {
	neighbours, err := netlink.NeighList(0, 0)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("list neighbours: %w", err)
	}
	var errs []error
	for _, n := range neighbours {
		if n.State&(netlink.NUD_PERMANENT|netlink.NUD_NOARP) != 0 {
			continue
		}
		if err := netlink.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("forget %s: %w", n.IP, err))
		}
	}
	return errors.Join(errs...)
}
