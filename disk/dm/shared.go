package dm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// pinBase finds or makes the devices of a base, and keeps them until unpin: by
// then a table holds them, or giveBack takes them.
func (d *Driver) pinBase(ctx context.Context, b base) (origin uint64, unpin func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if origin, err = d.useBase(ctx, b); err != nil {
		return 0, nil, err
	}
	name := d.baseName(b.id)
	d.pinned[name]++
	return origin, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.pinned[name]--; d.pinned[name] == 0 {
			delete(d.pinned, name)
		}
	}, nil
}

// useBase finds or makes the devices of a base; the caller holds mu.
func (d *Driver) useBase(ctx context.Context, b base) (uint64, error) {
	return d.useShared(ctx, "base", d.baseName(b.id), func() ([]target, func() error, error) {
		devs := make([]uint64, len(b.layers))
		for i, l := range b.layers {
			var err error
			if devs[i], err = d.useLayer(ctx, l); err != nil {
				return nil, nil, fmt.Errorf("layer %s: %w", l.path, err)
			}
		}
		return b.table(devs), func() error { return nil }, nil
	})
}

// useLayer finds or makes the device that reads a layer and checks it.
func (d *Driver) useLayer(ctx context.Context, l layer) (uint64, error) {
	return d.useShared(ctx, "layer", d.layerName(l), func() (_ []target, release func() error, err error) {
		data, err := d.attach(ctx, "layer", l.path, d.layerName(l), true)
		if err != nil {
			return nil, nil, err
		}
		hash, err := d.attach(ctx, "tree", l.path+treeSuffix, d.hashTag(l), true)
		if err != nil {
			return nil, nil, errors.Join(err, data.close())
		}
		return verityTable(l.seal, data.dev, hash.dev), func() error { return errors.Join(data.close(), hash.close()) }, nil
	})
}

// useShared takes a device that is there, or makes it from the table that lower
// gives; release is called when the table holds what is in it. The name says
// all that is in the table.
func (d *Driver) useShared(ctx context.Context, what, name string, lower func() ([]target, func() error, error)) (uint64, error) {
	dev, err := d.k.Status(name)
	switch {
	case err == nil && dev.active && !dev.suspended:
		return dev.dev, nil
	case err == nil: // somebody died while it was made
		if err := d.drop(ctx, what, name); err != nil {
			return 0, err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return 0, fmt.Errorf("look for device %s: %w", name, err)
	}
	table, release, err := lower()
	if err != nil {
		return 0, err
	}
	if err := errors.Join(d.build(ctx, what, name, true, table), release()); err != nil {
		return 0, err
	}
	if dev, err = d.k.Status(name); err != nil {
		return 0, fmt.Errorf("look at device %s: %w", name, err)
	}
	return dev.dev, nil
}

// attach puts a loop device over a file.
func (d *Driver) attach(ctx context.Context, what, path, tag string, readOnly bool) (_ held, err error) {
	flag := os.O_RDWR | unix.O_NOFOLLOW
	if readOnly {
		flag = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return held{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }() // the loop device has its own
	if !readOnly {
		if err := d.claim(ctx, f); err != nil {
			return held{}, err
		}
	}
	var h held
	if err := d.step(ctx, what+"/loop", func() (err error) { h, err = d.k.Attach(f, tag, readOnly); return }); err != nil {
		if h.close != nil {
			err = errors.Join(err, h.close())
		}
		return held{}, fmt.Errorf("attach loop to %s: %w", path, err)
	}
	return h, nil
}

// claim makes sure that no second device is made over a copy-on-write file, by
// whatever path and whoever's driver: each would write over what the other
// wrote. The lock belongs to the open file, which the loop device keeps: the
// kernel gives it back with the device, whatever becomes of this process.
func (d *Driver) claim(ctx context.Context, f *os.File) error {
	err := d.notBusy(ctx, func() error {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			return unix.EBUSY
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("lock %s, over which there is another device: %w", f.Name(), err)
	}
	return nil
}

// tidy is giveBack for who wants something else. What a stranger has open stays,
// for the next time, and that is not an error of the one disk that happens to go.
func (d *Driver) tidy(ctx context.Context) error {
	err := d.giveBack(ctx)
	if sandbox.Is(err, sandbox.KindBusy) {
		d.log.Warn("a device that no disk needs stays", "err", err)
		return nil
	}
	return err
}

// giveBack drops the shared devices that no table holds any more. The lock is
// not held while one that is busy, or its loop devices, are waited for.
func (d *Driver) giveBack(ctx context.Context) error {
	var below []loop
	err := d.notBusy(ctx, func() error {
		d.mu.Lock()
		defer d.mu.Unlock()
		var err error
		below, err = d.trim(ctx, below)
		return err
	})
	var stuck *stuckError
	if errors.As(err, &stuck) && sandbox.Is(err, sandbox.KindBusy) {
		err = fmt.Errorf("%w%s", err, d.whoHas(stuck.name))
	}
	return errors.Join(err, d.loopsGone(ctx, below))
}

// stuckError is a shared device that could not be dropped.
type stuckError struct {
	name string
	err  error
}

func (e *stuckError) Error() string { return fmt.Sprintf("give back device %s: %v", e.name, e.err) }
func (e *stuckError) Unwrap() error { return e.err }

// trim drops what can be dropped, once, and adds the loop devices below it to
// below; the caller holds mu. Bases come first: they hold layers.
func (d *Driver) trim(ctx context.Context, below []loop) ([]loop, error) {
	var errs []error
	for _, shared := range []struct{ kind, what string }{{baseKind, "base"}, {layerKind, "layer"}} {
		all, err := d.devices(shared.kind)
		if err != nil {
			return below, err
		}
		for _, l := range all {
			holders, err := d.k.Holders(l.dev)
			if errors.Is(err, fs.ErrNotExist) { // it never had a table, so that nothing is over it; or it is gone
				err = nil
			}
			if err == nil && holders == 0 && d.pinned[l.name] == 0 {
				var loops []loop
				loops, err = d.dropOnce(ctx, shared.what, l.name)
				below = append(below, loops...)
			}
			if err != nil {
				errs = append(errs, &stuckError{l.name, err})
			}
		}
	}
	return below, errors.Join(errs...)
}

// devices lists our devices of one kind.
func (d *Driver) devices(kind string) ([]listed, error) {
	all, err := d.k.List()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	return slices.DeleteFunc(all, func(l listed) bool { return !strings.HasPrefix(l.name, d.prefix()+kind) }), nil
}

// Layer is a layer that is in use, and how much.
type Layer struct {
	File  string // as the kernel calls it
	Loop  string // the loop device
	Disks int    // that lie on it
}

// Layers lists the layers that are in use. All of it is what the kernel says.
func (d *Driver) Layers() ([]Layer, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	overlays, err := d.users(overlayKind, partKind) // of a disk that has moved on the first part is over the base
	if err != nil {
		return nil, err
	}
	bases, err := d.devices(baseKind)
	if err != nil {
		return nil, err
	}
	disks := map[uint64]int{} // by the device of a layer
	for _, b := range bases {
		deps, err := d.k.Deps(b.name)
		if err != nil {
			return nil, fmt.Errorf("look below device %s: %w", b.name, err)
		}
		for _, dev := range deps {
			disks[dev] += overlays[b.dev]
		}
	}
	all, err := d.devices(layerKind)
	if err != nil {
		return nil, err
	}
	out := make([]Layer, 0, len(all))
	for _, l := range all {
		file, err := d.layerFile(l.name)
		if err != nil {
			return nil, err
		}
		out = append(out, Layer{File: file.path, Loop: fmt.Sprintf("/dev/loop%d", unix.Minor(file.dev)), Disks: disks[l.dev]})
	}
	return out, nil
}

// users counts, for each device, how many of our devices of some kinds use it.
func (d *Driver) users(kinds ...string) (map[uint64]int, error) {
	var all []listed
	for _, kind := range kinds {
		some, err := d.devices(kind)
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	count := map[uint64]int{}
	for _, l := range all {
		deps, err := d.k.Deps(l.name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // it may go at any time
			return nil, fmt.Errorf("look below device %s: %w", l.name, err)
		}
		for _, dev := range deps {
			count[dev]++
		}
	}
	return count, nil
}

// layerFile is the loop device over the file of a layer's device.
func (d *Driver) layerFile(name string) (loop, error) {
	deps, err := d.k.Deps(name)
	if err != nil {
		return loop{}, fmt.Errorf("look below device %s: %w", name, err)
	}
	for _, dev := range deps {
		if l, err := d.k.LoopAt(dev); err == nil && l.tag == name {
			return l, nil
		}
	}
	return loop{}, fmt.Errorf("no file is below device %s", name)
}
