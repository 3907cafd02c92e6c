package netns

import (
	"context"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
)

const (
	// followPause gathers a burst of changes, such as a slot that is made.
	followPause = 200 * time.Millisecond
	// followEvery looks without being told: a message can be lost.
	followEvery = 30 * time.Second
)

// followHost keeps the denied ranges true while the host's own addresses and
// routes change, until ctx ends.
func (n *Network) followHost(ctx context.Context, known []span) {
	events := subscribe(ctx)
	timer := time.NewTimer(followEvery)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-events:
			select {
			case <-ctx.Done():
				return
			case <-time.After(followPause):
			}
		}
		timer.Reset(followEvery)
		now, err := deniedSpans(ctx, n.cfg.Pool, n.cfg.DenyExtra)
		if err == nil && !slices.Equal(now, known) {
			if err = n.inst.setDenied(ctx, now); err == nil {
				known = now
				n.cfg.Log.Info("denied networks have changed", "ranges", len(now))
			}
		}
		if err != nil && ctx.Err() == nil {
			n.cfg.Log.Warn("denied networks are not up to date", "err", err)
			timer.Reset(prepareRetry)
		}
	}
}

// subscribe reports changes of the host's addresses and routes. Without a
// subscription followHost still looks every followEvery.
func subscribe(ctx context.Context) <-chan struct{} {
	changed := make(chan struct{}, 1)
	tell := func() {
		select {
		case changed <- struct{}{}:
		default: // told already
		}
	}
	addrs, routes := make(chan netlink.AddrUpdate), make(chan netlink.RouteUpdate)
	ignore := func(error) {} // it ends the subscription, and followEvery stays
	if netlink.AddrSubscribeWithOptions(addrs, ctx.Done(), netlink.AddrSubscribeOptions{ErrorCallback: ignore}) == nil {
		go drain(addrs, tell)
	}
	if netlink.RouteSubscribeWithOptions(routes, ctx.Done(), netlink.RouteSubscribeOptions{ErrorCallback: ignore}) == nil {
		go drain(routes, tell)
	}
	return changed
}

func drain[T any](updates <-chan T, tell func()) {
	for range updates {
		tell()
	}
}
