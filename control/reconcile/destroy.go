package reconcile

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

var errStopping = sandbox.Errorf(sandbox.KindTransient, "the server is stopping")

// flight is one destroy under way. There is at most one for a sandbox.
type flight struct {
	done chan struct{}
	err  error
}

// Destroy takes a sandbox to its end and returns when the host has nothing of it
// left and the database says so. When ctx ends earlier the destroy goes on; when
// the host fails, later passes repeat it.
func (r *Reconciler) Destroy(ctx context.Context, row store.Sandbox, cause sandbox.Cause) error {
	f := r.begin(row, cause)
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// begin starts a destroy, or joins the one that is under way.
func (r *Reconciler) begin(row store.Sandbox, cause sandbox.Cause) *flight {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f, ok := r.flights[row.ID]; ok {
		return f
	}
	f := &flight{done: make(chan struct{})}
	if r.closed {
		f.err = errStopping
		close(f.done)
		return f
	}
	r.flights[row.ID] = f
	r.wg.Go(func() {
		f.err = r.destroy(row, cause)
		if f.err != nil && r.ctx.Err() == nil {
			r.cfg.Log.Warn("destroy will be repeated", "sandbox", row.ID, "host", row.Host, "op", "destroy", "err", f.err)
		}
		r.mu.Lock()
		delete(r.flights, row.ID)
		r.mu.Unlock()
		close(f.done)
	})
	return f
}

func (r *Reconciler) underWay() []*flight {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []*flight
	for _, f := range r.flights {
		out = append(out, f)
	}
	return out
}

// destroy notes the intent, lets the host act, and records the end.
func (r *Reconciler) destroy(row store.Sandbox, cause sandbox.Cause) error {
	ctx, cancel := context.WithTimeout(r.ctx, r.cfg.DestroyLimit)
	defer cancel()
	if !row.State.Ended() && row.State != sandbox.Destroying {
		var err error
		if row, err = r.cfg.Store.Destroying(ctx, row, cause); err != nil {
			return err
		}
	}
	if err := fault.Point(ctx, "control/destroy/marked"); err != nil {
		return err
	}
	resp, err := r.cfg.Host.DestroySandbox(ctx, connect.NewRequest(
		&hostv1.DestroySandboxRequest{Id: string(row.ID), Cause: string(cause)}))
	if err != nil {
		return fmt.Errorf("destroy on host: %w", hostapi.FromConnect(err))
	}
	if err := fault.Point(ctx, "control/destroy/destroyed"); err != nil {
		return err
	}
	status := resp.Msg.GetStatus()
	if err := r.recordDestroyed(ctx, row, cause, status); err != nil {
		return err
	}
	if err := fault.Point(ctx, "control/destroy/recorded"); err != nil {
		return err
	}
	if status.GetState() == hostv1.State_STATE_ENDED {
		return r.acknowledge(ctx, []string{string(row.ID)})
	}
	return nil
}

// recordDestroyed ends the row, whatever happened to it meanwhile.
func (r *Reconciler) recordDestroyed(ctx context.Context, row store.Sandbox, cause sandbox.Cause, status *hostv1.SandboxStatus) error {
	v := Verdict{Do: End, Cause: cause}
	if status.GetState() == hostv1.State_STATE_ENDED {
		v = ended(row, status)
	}
	for !row.State.Ended() {
		err := r.record(ctx, row, v)
		if err == nil {
			return nil
		}
		if !errors.Is(err, store.ErrStale) {
			return err
		}
		if row, err = r.cfg.Store.Sandbox(ctx, row.ID); err != nil {
			return err
		}
	}
	return nil
}
