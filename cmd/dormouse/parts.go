package main

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/dormouse-sandbox/dormouse/cgroup"
	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/disk/dm"
	"github.com/dormouse-sandbox/dormouse/disk/qcow"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// The values of --disk.
const (
	diskAuto = "auto"
	diskDM   = "dm"
	diskQcow = "qcow"
)

// disks are the drivers of this machine, the one for new disks first, and why it
// is that one.
type disks struct {
	drivers []disk.Driver
	reason  string
	dm      *dm.Driver // nil where the kernel has none
}

// openDisks finds what the machine can do. Where the choice is ours, it is
// device-mapper's.
func openDisks(choice string, inst instance, log *slog.Logger) (disks, error) {
	mapper, noMapper := dm.Open(dm.Config{Instance: inst.name, NodeDir: inst.nodeDir(), Log: log})
	if noMapper != nil && (choice == diskDM || !sandbox.Is(noMapper, sandbox.KindUnsupported)) {
		return disks{}, noMapper
	}
	images, noImages := qcow.New(qcow.Config{})
	if noImages != nil && (choice == diskQcow || noMapper != nil) {
		return disks{}, errors.Join(noImages, noMapper)
	}
	d := disks{dm: mapper, reason: "the kernel has device-mapper"}
	if noMapper == nil {
		d.drivers = append(d.drivers, mapper)
	} else {
		d.reason = noMapper.Error()
	}
	switch {
	case noImages != nil:
	case choice == diskQcow:
		d.drivers = append([]disk.Driver{images}, d.drivers...)
	default:
		d.drivers = append(d.drivers, images)
	}
	if choice != diskAuto {
		d.reason = "asked for with --disk"
	}
	return d, nil
}

func (d disks) close() error {
	if d.dm == nil {
		return nil
	}
	return d.dm.Close()
}

// openGroups gives each VMM a control group where the machine has them; nil and a
// reason where not.
func openGroups(instance string) (host.Groups, string, func() error, error) {
	tree, err := cgroup.Open(cgroup.Mount, instance)
	if sandbox.Is(err, sandbox.KindUnsupported) {
		return nil, err.Error(), func() error { return nil }, nil
	}
	if err != nil {
		return nil, "", nil, fmt.Errorf("open control groups: %w", err)
	}
	return host.ControlGroups{Tree: tree}, "", tree.Close, nil
}
