package netns

import (
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Config says what Open makes true.
type Config struct {
	// Instance is five of [a-z0-9], made from the data directory. Every name
	// on the host carries it.
	Instance string
	// Pool holds the addresses of the veth pairs, a /31 for each slot. Zero
	// means the pool that the instance had before, else the first of
	// 100.96.0.0/16, 100.97.0.0/16, … that nothing else on this host uses.
	Pool netip.Prefix
	// Prepare is how many slots are kept ready ahead.
	Prepare int
	// MaxSlots bounds the slots, prepared ones included. Zero: what Pool has.
	MaxSlots int
	// DenyExtra are further networks that no guest reaches.
	DenyExtra []netip.Prefix
	// Resolvers answer the guests' DNS questions, asked from the host. Empty
	// means those of /etc/resolv.conf, read again when it changes.
	Resolvers []netip.AddrPort
	// Log gets one line for each change of state. Nil drops them.
	Log *slog.Logger
}

// check refuses what cannot work and fills in what was left out, but the pool.
func (c Config) check() (Config, error) {
	if !instanceForm.MatchString(c.Instance) {
		return c, sandbox.Errorf(sandbox.KindInvalid, "instance %q is not five of a-z and 0-9", c.Instance)
	}
	if c.Pool.IsValid() && (!c.Pool.Addr().Is4() || c.Pool.Bits() > 31) {
		return c, sandbox.Errorf(sandbox.KindInvalid, "the pool %v is not an IPv4 network of at least two addresses", c.Pool)
	}
	c.Pool = c.Pool.Masked()
	if c.Pool.IsValid() && c.Pool.Overlaps(guestPrefix) {
		return c, sandbox.Errorf(sandbox.KindInvalid, "the pool %v overlaps %v, which every guest has: choose another pool",
			c.Pool, guestPrefix.Masked())
	}
	if c.Prepare < 0 || c.MaxSlots < 0 {
		return c, sandbox.Errorf(sandbox.KindInvalid, "a negative number of slots: prepare %d, at most %d", c.Prepare, c.MaxSlots)
	}
	for _, p := range c.DenyExtra {
		if !p.IsValid() {
			return c, sandbox.Errorf(sandbox.KindInvalid, "a network to deny is not valid: %v", p)
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// bound applies the pool's size to MaxSlots.
func (c Config) bound() (Config, error) {
	has := capacity(c.Pool)
	if c.MaxSlots == 0 {
		c.MaxSlots = has
	}
	if c.MaxSlots > has {
		return c, sandbox.WithKind(sandbox.KindInvalid,
			fmt.Errorf("%d slots do not fit the pool %v, which has %d", c.MaxSlots, c.Pool, has))
	}
	return c, nil
}
