package dm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
)

// Check asks the kernel whether it came across damage, and finds the damaged
// blocks of the layers in which it did. It costs little while there is none.
func (d *Driver) Check(ctx context.Context) (disk.Report, error) {
	var r disk.Report
	layers, err := d.devices(layerKind)
	if err != nil {
		return r, fmt.Errorf("check disks: %w", err)
	}
	var errs []error
	for _, l := range layers {
		damage, err := d.checkLayer(ctx, l)
		errs = append(errs, err)
		r.Damage = append(r.Damage, damage...)
	}
	overlays, err := d.devices(overlayKind)
	errs = append(errs, err)
	for _, l := range overlays {
		_, err := d.fill(l.name)
		var broken *brokenError
		switch {
		case errors.As(err, &broken):
			r.Broken = append(r.Broken, disk.Broken{Dir: d.dirOf(l.name), Cause: err.Error()})
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, errNoTable): // it is coming or going just now
		case err != nil:
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return r, fmt.Errorf("check disks: %w", err)
	}
	return r, nil
}

// checkedFor is for how long an answer of Verify, which reads a whole layer, is
// given again.
const checkedFor = 10 * time.Minute

// checked is what was found in the layer of a device.
type checked struct {
	dev    uint64
	at     time.Time
	damage []disk.Damage
}

// checkLayer looks for damage if dm-verity saw some. That it saw some the kernel
// never forgets, as long as the device lives.
func (d *Driver) checkLayer(ctx context.Context, l listed) ([]disk.Damage, error) {
	info, err := d.k.Info(l.name)
	if err != nil || len(info) != 1 {
		return nil, nil // it went away, or is not ready yet
	}
	if word, _, _ := strings.Cut(info[0].params, " "); word != "C" {
		return nil, nil
	}
	d.mu.Lock()
	before := d.checked[l.name]
	d.mu.Unlock()
	if before.dev == l.dev && time.Since(before.at) < checkedFor {
		return before.damage, nil
	}
	file, err := d.layerFile(l.name)
	if err != nil {
		return nil, err
	}
	damage, err := d.Verify(ctx, file.path)
	if err != nil {
		return nil, err
	}
	if len(damage) == 0 {
		d.log.Warn("the kernel read damage that is not in the file now", "file", file.path, "device", l.name)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.checked[l.name] = checked{l.dev, time.Now(), damage}
	return damage, nil
}

// dirOf is the directory of the disk with this device, as far as the kernel says.
func (d *Driver) dirOf(name string) string {
	deps, _ := d.k.Deps(name) // none if it went away
	for _, dev := range deps {
		if l, err := d.k.LoopAt(dev); err == nil && (l.tag == name || strings.HasPrefix(l.tag, name+".")) {
			return filepath.Dir(l.path)
		}
	}
	return ""
}
