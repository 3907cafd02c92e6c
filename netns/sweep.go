package netns

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/dormouse-sandbox/dormouse/internal/undo"
)

// dismantle removes everything that carries a slot's names: its right to the
// internet first, so that it is cut off whatever else fails. What is missing
// is success; every step runs; the errors are joined.
func (i instance) dismantle(ctx context.Context, index int) error {
	path, name := i.path(index), i.name(index)
	var errs []error
	errs = append(errs, i.denyInternet(ctx, name))
	if isNamespace(path) {
		// A descriptor that somebody still holds keeps the namespace alive,
		// but not the interfaces in it.
		errs = append(errs, visit(ctx, path, func() error { return deleteLink(ctx, "tap", tapName) }))
	}
	errs = append(errs, deleteLink(ctx, "veth", name), removeNamespace(ctx, path))
	return errors.Join(errs...)
}

// remains lists every index of which anything is on the host.
func (i instance) remains(ctx context.Context) ([]int, error) {
	spaces, err1 := leftovers(ctx, i)
	veths, err2 := strayVeths(ctx, i)
	names, err3 := i.allowed(ctx)
	all := append(spaces, veths...)
	for _, name := range names {
		if index, ok := i.index(name); ok {
			all = append(all, index)
		}
	}
	slices.Sort(all)
	return slices.Compact(all), errors.Join(err1, err2, err3)
}

// Sweep removes every slot of this instance that is neither adopted nor
// acquired nor prepared, also half-made ones. Call it after the Adopts. Slots
// are prepared from now on, and indexes that were left behind are used again.
func (n *Network) Sweep(ctx context.Context) error {
	found, err := n.inst.remains(ctx)
	errs := []error{err}
	for _, index := range found {
		if !n.claimStray(index) {
			continue
		}
		if err := n.inst.dismantle(ctx, index); err != nil {
			n.settle(index, &entry{state: stateLeaked})
			errs = append(errs, fmt.Errorf("sweep slot %d: %w", index, err))
			continue
		}
		n.settle(index, nil)
		n.cfg.Log.Info("slot is swept", "slot", index)
	}
	n.mu.Lock()
	n.swept = true
	n.forgetLeaks()
	n.signal()
	n.mu.Unlock()
	return errors.Join(errs...)
}

// claimStray reserves an index for its removal if nobody has it.
func (n *Network) claimStray(index int) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e, taken := n.slots[index]; taken && e.state != stateLeaked {
		return false
	}
	n.slots[index] = &entry{state: stateMaking}
	return true
}

// forgetLeaks frees the indexes that were marked and of which the host has
// nothing any more. mu is held; an index that is not clean is found by clear.
func (n *Network) forgetLeaks() {
	for index, e := range n.slots {
		if e.state == stateLeaked {
			delete(n.slots, index)
		}
	}
}

// Remove takes everything of an instance off the host: namespaces, veths, the
// table, and IPv4 forwarding if an instance turned it on and none is left. It
// needs no state and may be called twice. No process of the instance runs.
func Remove(ctx context.Context, cfg Config) error {
	cfg, err := cfg.check()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undo.Limit)
	defer cancel()
	inst := instance(cfg.Instance)
	found, err := inst.remains(ctx)
	errs := []error{err}
	for _, index := range found {
		errs = append(errs, inst.dismantle(ctx, index))
	}
	// The table goes last: while anything is left it denies, and remembers.
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove the network of %s: %w", inst, err)
	}
	if err := inst.forget(ctx); err != nil {
		return fmt.Errorf("remove the network of %s: %w", inst, err)
	}
	return nil
}

// forget restores what the memo says, then removes the memo with its table.
func (i instance) forget(ctx context.Context) error {
	all, err := memos(ctx)
	if err != nil {
		return err
	}
	if own, had := all[i.table()]; had {
		if err := restoreForwarding(ctx, own, len(all)-1); err != nil {
			return err
		}
	}
	return i.removeTable(ctx)
}
