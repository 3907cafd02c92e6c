package reconcile

import "context"

// turn is one pass, for everybody who waits for it.
type turn struct {
	done chan struct{}
	err  error // valid once done is closed
}

// pass waits for a pass that begins after the call, or for the end of ctx. There
// is one pass at a time and at most one more is due: whoever comes while one is
// under way shares the one after it, because the one under way may have read
// already what the caller wants to see. A pass belongs to the Reconciler and not
// to who asked for it, so a host that hangs holds nobody longer than he wants.
func (r *Reconciler) pass(ctx context.Context) error {
	t, err := r.join()
	if err != nil {
		return err
	}
	select {
	case <-t.done:
		return t.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// join finds the next pass that has not begun, or makes one.
func (r *Reconciler) join() (*turn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, errStopping
	}
	if r.next != nil {
		return r.next, nil
	}
	t := &turn{done: make(chan struct{})}
	if r.current != nil {
		r.next = t
		return t, nil
	}
	r.current = t
	r.wg.Go(r.takeTurns)
	return t, nil
}

// takeTurns runs passes as long as somebody waits for another one.
func (r *Reconciler) takeTurns() {
	for {
		r.mu.Lock()
		t := r.current
		r.mu.Unlock()
		t.err = r.onePass(r.ctx)
		close(t.done)
		r.mu.Lock()
		r.current, r.next = r.next, nil
		more := r.current != nil
		r.mu.Unlock()
		if !more {
			return
		}
	}
}
