package host

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Copied is what has become of one copy.
type Copied struct {
	Status Status
	Err    error
}

// Fork makes copies of a sandbox as it is now. It runs on, or stays paused. The
// copies fail each for itself; the error is one that left none.
func (a *Agent) Fork(ctx context.Context, id string, copies []CreateRequest) ([]Copied, Saved, error) {
	if len(copies) < 1 || len(copies) > sandbox.MaxForks {
		return nil, Saved{}, sandbox.Errorf(sandbox.KindInvalid, "count is %d, must be from 1 to %d", len(copies), sandbox.MaxForks)
	}
	b, err := a.box(id)
	if err != nil {
		return nil, Saved{}, err
	}
	watch := newStopwatch(a.cfg.Now)
	p, release, err := a.forkPoint(ctx, b, watch)
	if err != nil {
		return nil, Saved{}, fmt.Errorf("fork %s: %w", b.id, err)
	}
	defer release()
	source := b.now().Spec
	out := make([]Copied, len(copies))
	var wg sync.WaitGroup
	for i, req := range copies {
		wg.Go(func() { out[i].Status, out[i].Err = a.createFrom(ctx, p, source, req) })
	}
	wg.Wait()
	return out, watch.saved(b, p), nil
}

// forkPoint is the moment that all copies begin with.
func (a *Agent) forkPoint(ctx context.Context, b *box, watch *stopwatch) (*point, func(), error) {
	b.op.Lock()
	defer b.op.Unlock()
	if a.cfg.Snapshots == nil {
		return nil, nil, errNoStore
	}
	return a.pointOfNow(context.WithoutCancel(ctx), b, watch)
}

// createFrom makes one copy. It has the template and the shape of its source.
func (a *Agent) createFrom(ctx context.Context, p *point, source sandbox.Spec, req CreateRequest) (Status, error) {
	spec := source
	spec.Env = mergeEnv(source.Env, req.Spec.Env)
	req.Spec = spec
	planned, err := a.checked(req)
	if err != nil {
		return Status{}, err
	}
	if err := a.fits(p); err != nil {
		return Status{}, err
	}
	planned.begin(p, sandbox.StartFork)
	return a.createPlanned(ctx, planned)
}

// begin makes a plan go on from a point instead of booting.
func (p *plan) begin(from *point, how sandbox.Start) {
	p.from, p.start = from, how
	e := &p.entry
	e.Began, e.Last = from, from
	e.Env, e.DefaultUser, e.DefaultWorkdir = from.Env, from.DefaultUser, from.DefaultWorkdir
}

// shape says whether a create asks for what a snapshot has.
func (p *point) shape(name string, spec sandbox.Spec) error {
	var errs []error
	for _, part := range []struct {
		what       string
		asked, has int
	}{{"vcpus", spec.VCPUs, p.VCPUs}, {"mem_mib", spec.MemMiB, p.MemMiB}, {"disk_mib", spec.DiskMiB, p.DiskMiB}} {
		if part.asked != part.has {
			errs = append(errs, sandbox.Errorf(sandbox.KindInvalid, "%s is %d, snapshot %s has %d and cannot change", part.what, part.asked, name, part.has))
		}
	}
	return errors.Join(errs...)
}
