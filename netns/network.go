package netns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Network is all slots of one instance on this host. Its methods may be called
// from several goroutines.
type Network struct {
	cfg       Config
	inst      instance
	resolvers *resolvers
	stop      context.CancelFunc
	done      sync.WaitGroup
	wake      chan struct{} // the preparer looks again

	// mu guards what follows. No call to the kernel is made while it is held.
	mu      sync.Mutex
	slots   map[int]*entry
	swept   bool
	closed  bool
	changed chan struct{} // closed and replaced when a slot changes its state
}

// entry is what is known of one index. An index without entry is free, as far
// as this process knows.
type entry struct {
	state slotState
	slot  *Slot // nil while it is made, swept or leaked by a sweep
}

type slotState int

const (
	stateMaking    slotState = iota // being made for an Acquire or Adopt
	statePreparing                  // being made by the preparer
	statePrepared
	stateUsed
	stateLeaked // its removal failed: repaired by the next Close, Sweep or Acquire
)

// Open declares the instance's ruleset on the host. Slots of an earlier
// process keep running as they are: Adopt those that are still wanted, then
// call Sweep. Slots are prepared from the Sweep on.
func Open(ctx context.Context, cfg Config) (*Network, error) {
	cfg, err := cfg.check()
	if err != nil {
		return nil, err
	}
	inst := instance(cfg.Instance)
	rules, err := plan(ctx, cfg, inst)
	if err != nil {
		return nil, err
	}
	cfg.Pool = rules.memo.pool
	if cfg, err = cfg.bound(); err != nil {
		return nil, err
	}
	if err := rules.declare(ctx); err != nil {
		return nil, sandbox.WithKind(kindOfKernel(err), err)
	}
	// The memo is written, so a crash from here on does not forget the value.
	if err := enableForwarding(ctx); err != nil {
		return nil, err
	}
	live, stop := context.WithCancel(context.WithoutCancel(ctx))
	n := &Network{
		cfg: cfg, inst: inst, stop: stop, resolvers: newResolvers(cfg.Resolvers),
		wake: make(chan struct{}, 1), slots: map[int]*entry{}, changed: make(chan struct{}),
	}
	n.done.Go(func() { n.followHost(live, rules.denied) })
	n.done.Go(func() { n.prepare(live) })
	cfg.Log.Info("network is declared", "table", inst.table(), "pool", cfg.Pool.String(), "slots", cfg.MaxSlots)
	return n, nil
}

// Pool is the network of the veth addresses, as configured or chosen.
func (n *Network) Pool() netip.Prefix { return n.cfg.Pool }

// plan works out the ruleset from the config and from what is on the host.
func plan(ctx context.Context, cfg Config, inst instance) (r ruleset, err error) {
	others, err := memos(ctx)
	if err != nil {
		return r, sandbox.WithKind(kindOfKernel(err), err)
	}
	own := others[inst.table()]
	delete(others, inst.table())
	r.inst, r.memo = inst, own
	if r.memo.forwarding == "" {
		if r.memo.forwarding, err = forwardingBefore(ctx, others); err != nil {
			return r, err
		}
	}
	if r.memo.pool, err = planPool(ctx, cfg.Pool, own.pool, others); err != nil {
		return r, err
	}
	if r.internet, err = inst.allowed(ctx); err != nil {
		return r, err
	}
	r.denied, err = deniedSpans(ctx, r.memo.pool, cfg.DenyExtra)
	return r, err
}

func planPool(ctx context.Context, want, had netip.Prefix, others map[string]memo) (netip.Prefix, error) {
	nets, err := hostNets(ctx, true)
	if err != nil {
		return netip.Prefix{}, err
	}
	var taken []netip.Prefix
	for table, m := range others {
		if m.pool.IsValid() && want.IsValid() && want.Overlaps(m.pool) {
			return netip.Prefix{}, sandbox.Errorf(sandbox.KindConflict,
				"the pool %v overlaps %v, which the instance with table %s has: choose another pool", want, m.pool, table)
		}
		if m.pool.IsValid() {
			taken = append(taken, m.pool)
		}
	}
	switch {
	case want.IsValid():
		return want, checkPool(want, nets)
	case had.IsValid() && checkPool(had, nets) == nil:
		return had, nil
	}
	return choosePool(ctx, nets, taken)
}

// signal tells everybody who waits for a slot. mu is held.
func (n *Network) signal() {
	close(n.changed)
	n.changed = make(chan struct{})
	select {
	case n.wake <- struct{}{}:
	default: // it has not looked since the last time
	}
}

// Acquire hands out a prepared slot, or makes one. Its policy is to deny
// everything. When all slots are taken the error is of kind busy.
func (n *Network) Acquire(ctx context.Context) (*Slot, error) {
	tried := map[int]bool{} // what this call could not repair
	for {
		s, index, wait, err := n.claim(stateMaking, tried)
		switch {
		case err != nil:
			return nil, err
		case s != nil:
			return s, nil
		case wait != nil:
			select {
			case <-wait:
				continue
			case <-ctx.Done():
				return nil, fmt.Errorf("wait for a slot: %w", ctx.Err())
			}
		}
		s, err = n.build(ctx, index, stateUsed)
		if errors.Is(err, errTaken) {
			tried[index] = true
			continue // another one serves
		}
		return s, err
	}
}

// claim takes a prepared slot (only for an Acquire), or reserves an index, or
// returns a channel to wait on while the preparer holds the last ones.
func (n *Network) claim(as slotState, tried map[int]bool) (s *Slot, index int, wait <-chan struct{}, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, 0, nil, sandbox.Errorf(sandbox.KindConflict, "the network is closed")
	}
	if as == stateMaking {
		if s := n.takePrepared(); s != nil {
			return s, s.index, nil, nil
		}
	}
	preparing, leaked := false, -1
	for i := range n.cfg.MaxSlots {
		e, taken := n.slots[i]
		if !taken {
			n.slots[i] = &entry{state: as}
			return nil, i, nil, nil
		}
		preparing = preparing || e.state == statePreparing
		if e.state == stateLeaked && leaked < 0 && !tried[i] {
			leaked = i
		}
	}
	switch {
	case preparing && as == stateMaking:
		return nil, 0, n.changed, nil
	case leaked >= 0 && n.swept && as == stateMaking:
		// Nothing else is left: try to repair, after everything that works.
		n.slots[leaked] = &entry{state: as}
		return nil, leaked, nil, nil
	}
	return nil, 0, nil, sandbox.Errorf(sandbox.KindBusy, "all %d network slots are taken", n.cfg.MaxSlots)
}

// takePrepared hands out the lowest prepared slot. mu is held.
func (n *Network) takePrepared() *Slot {
	lowest := -1
	for i, e := range n.slots {
		if e.state == statePrepared && (lowest < 0 || i < lowest) {
			lowest = i
		}
	}
	if lowest < 0 {
		return nil
	}
	n.slots[lowest].state = stateUsed
	n.signal()
	return n.slots[lowest].slot
}

// settle records what became of an index that claim or Adopt reserved.
func (n *Network) settle(index int, e *entry) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e == nil {
		delete(n.slots, index)
	} else {
		n.slots[index] = e
	}
	n.signal()
}

// Adopt takes over a slot that an earlier process of this instance made, with
// the policy that it has. When it is not whole the error is of kind not found,
// and Sweep will remove the rest of it.
func (n *Network) Adopt(ctx context.Context, index int) (*Slot, error) {
	if index < 0 || index >= n.cfg.MaxSlots {
		return nil, sandbox.Errorf(sandbox.KindNotFound, "adopt slot %d: the pool %v has slots 0 to %d",
			index, n.cfg.Pool, n.cfg.MaxSlots-1)
	}
	n.mu.Lock()
	// An Acquire before the Sweep marks what it must not touch as leaked.
	if e, taken := n.slots[index]; (taken && (e.state != stateLeaked || n.swept)) || n.closed {
		n.mu.Unlock()
		return nil, sandbox.Errorf(sandbox.KindConflict, "adopt slot %d: it is in use, or the network is closed", index)
	}
	n.slots[index] = &entry{state: stateMaking}
	n.mu.Unlock()

	s, err := n.takeOver(ctx, index)
	if err != nil {
		n.settle(index, nil)
		return nil, fmt.Errorf("adopt slot %d: %w", index, err)
	}
	n.settle(index, &entry{stateUsed, s})
	n.cfg.Log.Info("slot is adopted", "slot", index)
	return s, nil
}

// Close stops what this process runs and removes the slots that were prepared
// and not used. Slots in use stay as they are, without DNS, for the next
// process to adopt. The ruleset stays; Remove takes it off.
func (n *Network) Close() error {
	n.mu.Lock()
	n.closed = true
	n.mu.Unlock()
	n.stop()
	n.done.Wait()

	n.mu.Lock()
	var prepared, used []*Slot
	for _, e := range n.slots {
		switch e.state {
		case statePrepared:
			prepared = append(prepared, e.slot)
		case stateUsed:
			used = append(used, e.slot)
		}
	}
	n.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), undo.Limit)
	defer cancel()
	var errs []error
	for _, s := range prepared {
		errs = append(errs, s.Close(ctx))
	}
	for _, s := range used {
		errs = append(errs, s.dns.close())
	}
	return errors.Join(errs...)
}

// prepareRetry is the pause after a slot could not be prepared.
const prepareRetry = time.Second
