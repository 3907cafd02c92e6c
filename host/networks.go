package host

import (
	"context"

	"github.com/dormouse-sandbox/dormouse/netns"
)

// Slots offers the slots of package netns as Networks.
type Slots struct{ *netns.Network }

// Acquire hands out a slot.
func (s Slots) Acquire(ctx context.Context) (Network, error) {
	slot, err := s.Network.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	return slotNetwork{slot}, nil
}

// Adopt takes a slot over that an earlier process made.
func (s Slots) Adopt(ctx context.Context, index int) (Network, error) {
	slot, err := s.Network.Adopt(ctx, index)
	if err != nil {
		return nil, err
	}
	return slotNetwork{slot}, nil
}

type slotNetwork struct{ *netns.Slot }

func (s slotNetwork) SetInternet(ctx context.Context, allowed bool) error {
	return s.SetPolicy(ctx, netns.Policy{Internet: allowed})
}
