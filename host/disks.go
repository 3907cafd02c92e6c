package host

import (
	"context"
	"errors"
	"slices"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// driverOf finds the driver that made a sandbox's disk: a host may have come to
// another one since. Entries from before there were two name none.
func (a *Agent) driverOf(e entry) (disk.Driver, error) {
	name := e.DiskDriver
	if name == "" {
		name = "qcow"
	}
	i := slices.IndexFunc(a.cfg.Disks, func(d disk.Driver) bool { return d.Name() == name })
	if i < 0 {
		return nil, sandbox.Errorf(sandbox.KindUnsupported, "its disk was made by the driver %s, which this host does not have now", name)
	}
	return a.cfg.Disks[i], nil
}

// restoreDisk attaches the disk of a running sandbox.
func (a *Agent) restoreDisk(ctx context.Context, e entry) (disk.Disk, error) {
	d, err := a.driverOf(e)
	if err != nil {
		return nil, err
	}
	return d.Restore(ctx, *e.Disk)
}

// leftDisk is whatever disk is in a folder, to be removed: nothing need be known
// of it, nor its base be there.
type leftDisk struct {
	drivers []disk.Driver
	dir     string
}

func (l leftDisk) Path() string                { return "" }
func (l leftDisk) Format() string              { return "" }
func (l leftDisk) Allocated() (int64, error)   { return 0, nil }
func (l leftDisk) Close(context.Context) error { return nil }

func (l leftDisk) Prepare(context.Context) error                 { return errLeft }
func (l leftDisk) Changed(context.Context) (disk.Changes, error) { return nil, errLeft }

func (l leftDisk) Next(context.Context, func(context.Context, string) error) (disk.Changes, error) {
	return nil, errLeft
}

var errLeft = errors.New("a disk that is only to be removed")

func (l leftDisk) Remove(ctx context.Context) error {
	var errs []error
	for _, d := range l.drivers {
		errs = append(errs, d.Discard(ctx, l.dir))
	}
	return errors.Join(errs...)
}

// sweepDisks takes away what no sandbox owns, outside of the folders.
func (a *Agent) sweepDisks(ctx context.Context) error {
	var keep []string
	for _, b := range a.all() {
		if b.now().State != stateEnded {
			keep = append(keep, a.stateDir(b.id))
		}
	}
	var errs []error
	for _, d := range a.cfg.Disks {
		errs = append(errs, d.Sweep(ctx, keep))
	}
	return errors.Join(errs...)
}
