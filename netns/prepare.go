package netns

import (
	"context"
	"errors"
	"time"
)

// prepare keeps cfg.Prepare slots ready from the Sweep on, one after the other,
// until ctx ends.
func (n *Network) prepare(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		}
		for n.wanted() {
			if n.prepareOne(ctx) {
				continue
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(prepareRetry):
			}
		}
	}
}

// wanted says whether one more slot should be ready, and can be.
func (n *Network) wanted() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	ready, taken := 0, 0
	for _, e := range n.slots {
		if e.state == statePrepared {
			ready++
		}
		taken++
	}
	return n.swept && !n.closed && ready < n.cfg.Prepare && taken < n.cfg.MaxSlots
}

// prepareOne reports whether it is worth trying again at once.
func (n *Network) prepareOne(ctx context.Context) bool {
	_, index, _, err := n.claim(statePreparing, nil)
	if err != nil {
		return false // all taken meanwhile, or closed
	}
	_, err = n.build(ctx, index, statePrepared)
	switch {
	case err == nil, errors.Is(err, errTaken):
		return true
	case ctx.Err() == nil:
		n.cfg.Log.Warn("slot could not be prepared", "slot", index, "err", err)
	}
	return false
}
