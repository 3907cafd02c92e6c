package dm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// overlay is one disk. It holds nothing open.
type overlay struct {
	d      *Driver
	config disk.Config
	name   string // of the device and of its node
}

func (d *Driver) overlay(config disk.Config) *overlay {
	config.Dir = filepath.Clean(config.Dir)
	return &overlay{d: d, config: config, name: d.overlayName(config.Dir)}
}

func (o *overlay) Path() string   { return filepath.Join(o.d.cfg.NodeDir, o.name) }
func (o *overlay) Format() string { return "raw" }

// Close takes the device away, unless a VMM has it open: then it stays.
func (o *overlay) Close(ctx context.Context) error {
	unlock, err := o.d.busy.lock(ctx, o.name)
	if err != nil {
		return err
	}
	defer unlock()
	dev, err := o.d.k.Status(o.name)
	if err == nil && dev.open > 0 {
		return nil
	}
	if err := o.d.detach(ctx, o); err != nil {
		return fmt.Errorf("close disk: %w", err)
	}
	return nil
}

// Remove takes the device away and deletes the overlay. While a VMM has it open
// that is an error, and nothing is changed.
func (o *overlay) Remove(ctx context.Context) error {
	unlock, err := o.d.busy.lock(ctx, o.name)
	if err != nil {
		return err
	}
	defer unlock()
	if err := o.d.disconnect(ctx, o); err != nil {
		return fmt.Errorf("remove disk: %w", err)
	}
	if err := o.d.step(ctx, "overlay/delete", o.removeFiles); err != nil {
		return fmt.Errorf("remove disk: %w", err)
	}
	if err := o.d.tidy(ctx); err != nil {
		return fmt.Errorf("remove disk: %w", err)
	}
	return nil
}

// Discard is Remove for what Restore cannot attach any more, because its base
// is gone or damaged.
func (d *Driver) Discard(ctx context.Context, dir string) error {
	if !filepath.IsAbs(dir) {
		return sandbox.Errorf(sandbox.KindInvalid, "discard disk: directory %q must be an absolute path", dir)
	}
	return d.overlay(disk.Config{Dir: dir}).Remove(ctx)
}

// removeFiles deletes the record first: with it goes the disk, and as long as it
// cannot be deleted the disk is all there. The directory may be gone too.
func (o *overlay) removeFiles() error {
	numbers, err := cows(o.config.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	paths := []string{filepath.Join(o.config.Dir, recordFile)}
	for _, n := range numbers {
		paths = append(paths, o.cow(n))
	}
	temps, err := filepath.Glob(filepath.Join(globEscape(o.config.Dir), ".tmp-overlay.*"))
	if err != nil {
		return err
	}
	for _, path := range append(paths, temps...) {
		if err := osfs.Remove("disk-overlay", path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func globEscape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

// disconnect takes the node and the device away. It is an error, and nothing is
// changed, while somebody has the device open.
func (d *Driver) disconnect(ctx context.Context, o *overlay) error {
	parts, err := o.parts()
	if err != nil {
		return err
	}
	if err := d.nobodyHas(ctx, o, parts); err != nil {
		return err
	}
	// The node goes first: its number may be another disk's at once.
	uid, gid, missing := d.k.NodeOwner(o.name)
	if err := d.step(ctx, "node/remove", func() error { return d.k.RemoveNode(o.name) }); err != nil {
		return fmt.Errorf("remove node: %w", err)
	}
	err = d.drop(ctx, "overlay", o.name)
	if err == nil {
		return d.dropParts(ctx, o, parts)
	}
	if missing != nil {
		return err
	}
	// Somebody opened it just now, by number: it stays as it was.
	if dev, gone := d.k.Status(o.name); gone == nil {
		err = errors.Join(err, d.k.MakeNode(o.name, dev.dev, uid, gid))
	}
	return err
}

// nobodyHas waits until neither the overlay nor a part of it is open. A part is
// open in the table above it, too.
func (d *Driver) nobodyHas(ctx context.Context, o *overlay, parts []int) error {
	names := []string{o.name}
	for _, n := range parts {
		names = append(names, o.part(n))
	}
	for _, name := range names {
		err := d.notBusy(ctx, func() error {
			dev, err := d.k.Status(name)
			if err != nil || dev.open == 0 {
				return err
			}
			if holders, err := d.k.Holders(dev.dev); err != nil || dev.open > holders {
				return errors.Join(err, unix.EBUSY)
			}
			return nil
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // there still may be a node
			return fmt.Errorf("device %s: %w%s", name, err, d.whoHas(name))
		}
	}
	return nil
}

// dropParts takes the parts away, the topmost first.
func (d *Driver) dropParts(ctx context.Context, o *overlay, parts []int) error {
	for _, n := range parts {
		if err := d.drop(ctx, "part", o.part(n)); err != nil {
			return err
		}
	}
	return nil
}

// detach is disconnect and giveBack.
func (d *Driver) detach(ctx context.Context, o *overlay) error {
	if err := d.disconnect(ctx, o); err != nil {
		return err
	}
	return d.tidy(ctx)
}

// Sweep takes away what a crash left: every device, loop device and node of
// this instance that does not belong to a disk in one of the directories. What
// somebody has open stays, and is an error.
func (d *Driver) Sweep(ctx context.Context, keep []string) error {
	names := map[string]bool{}
	for _, dir := range keep {
		names[d.overlayName(filepath.Clean(dir))] = true
	}
	errs := []error{d.sweepOverlays(ctx, names), d.giveBack(ctx), d.sweepNodes(names), d.sweepLoops()}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("sweep disks: %w", err)
	}
	return nil
}

func (d *Driver) sweepOverlays(ctx context.Context, keep map[string]bool) error {
	names, err := d.overlays()
	errs := []error{err}
	for _, name := range names {
		if keep[name] {
			continue
		}
		unlock, err := d.busy.lock(ctx, name)
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		err = d.disconnect(ctx, &overlay{d: d, name: name})
		unlock()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		d.log.Info("disk swept", "disk", name)
	}
	return errors.Join(errs...)
}

// overlays names every overlay of which there is a device, be it of a part only.
func (d *Driver) overlays() ([]string, error) {
	tops, err := d.devices(overlayKind)
	parts, err2 := d.devices(partKind)
	var names []string
	for _, l := range tops {
		names = append(names, l.name)
	}
	for _, l := range parts {
		names = append(names, d.overlayOf(l.name).name)
	}
	slices.Sort(names)
	return slices.Compact(names), errors.Join(err, err2)
}

// sweepNodes removes the nodes without a device.
func (d *Driver) sweepNodes(keep map[string]bool) error {
	there, err := d.devices(overlayKind)
	if err != nil {
		return err
	}
	for _, l := range there {
		keep[l.name] = true // somebody has it open
	}
	names, err := d.k.Nodes(d.prefix())
	errs := []error{err}
	for _, name := range names {
		if !keep[name] {
			errs = append(errs, d.k.RemoveNode(name))
		}
	}
	return errors.Join(errs...)
}

// sweepLoops clears loop devices that no table uses. Only somebody else who has
// them open can have kept them.
func (d *Driver) sweepLoops() error {
	all, err := d.k.Loops(d.prefix())
	errs := []error{err}
	for _, l := range slices.DeleteFunc(all, func(l loop) bool { n, err := d.k.Holders(l.dev); return err != nil || n > 0 }) {
		errs = append(errs, d.k.Clear(l.dev))
	}
	return errors.Join(errs...)
}
