package qcow

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// A disk is a line of overlays. The first lies on the base, each of the others on
// the one before it, and a VMM writes to the last, or, where a server died or a
// VMM failed in between, to one that has nothing but empty ones after it.
const (
	overlayName   = "overlay.qcow2"
	overlayPrefix = "overlay-"
	overlaySuffix = ".qcow2"
)

// overlayPath is the n-th overlay's.
func overlayPath(dir string, n int) string {
	if n == 0 {
		return filepath.Join(dir, overlayName)
	}
	return filepath.Join(dir, overlayPrefix+strconv.Itoa(n)+overlaySuffix)
}

// headerOf is what the n-th overlay must have in its header.
func headerOf(config disk.Config, n int) header {
	if n == 0 {
		return header{backing: config.Base, format: "raw", size: config.SizeBytes}
	}
	return header{backing: overlayPath(config.Dir, n-1), format: "qcow2", size: config.SizeBytes}
}

// later lists the overlays of a folder that come after the first, in no order.
func later(dir string) (numbers []int, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		digits, ok := strings.CutPrefix(e.Name(), overlayPrefix)
		if !ok {
			continue
		}
		n, err := strconv.Atoi(strings.TrimSuffix(digits, overlaySuffix))
		if err == nil && n > 0 && e.Name() == filepath.Base(overlayPath(dir, n)) {
			numbers = append(numbers, n)
		}
	}
	return numbers, nil
}

// findLine checks every overlay of a disk, and says which is the last.
func findLine(config disk.Config) (top int, err error) {
	numbers, err := later(config.Dir)
	if err != nil {
		return 0, err
	}
	for _, n := range numbers {
		top = max(top, n)
	}
	if top != len(numbers) {
		return 0, sandbox.Errorf(sandbox.KindConflict, "the disk has lost some of its content: there are %d overlays in %s, and one is number %d",
			len(numbers)+1, config.Dir, top)
	}
	for n := range top + 1 {
		path := overlayPath(config.Dir, n)
		got, err := readHeader(path)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
		if want := headerOf(config, n); got != want {
			return 0, sandbox.Errorf(sandbox.KindConflict, "%s is %v, not %v", path, got, want)
		}
	}
	return top, nil
}

// Changed says what all overlays hold.
func (o *overlay) Changed(ctx context.Context) (disk.Changes, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c, err := openChanges(ctx, o.config, o.top+1)
	if err != nil {
		return nil, fmt.Errorf("changes of disk: %w", err)
	}
	return c, nil
}

// Prepare makes the next overlay. Until Next it does not belong to the line.
func (o *overlay) Prepare(ctx context.Context) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.top+1 >= disk.MaxOverlays {
		return nil
	}
	if err := o.prepare(ctx); err != nil {
		return fmt.Errorf("prepare disk: %w", err)
	}
	return nil
}

func (o *overlay) prepare(ctx context.Context) error {
	if o.spare {
		return nil
	}
	if err := o.d.publish(ctx, o.config, o.top+1); err != nil {
		return err
	}
	o.spare = true
	return nil
}

// Next makes the VMM write to the next overlay.
func (o *overlay) Next(ctx context.Context, switchTo func(context.Context, string) error) (_ disk.Changes, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("move disk on: %w", err)
		}
	}()
	o.mu.Lock()
	defer o.mu.Unlock()
	stays, err := o.isUnused()
	if err != nil {
		return nil, err
	}
	if stays {
		return openChanges(ctx, o.config, o.top)
	}
	if o.top+1 >= disk.MaxOverlays {
		return nil, sandbox.Errorf(sandbox.KindConflict, "the disk is made of %d overlays already: a pause makes them one", o.top+1)
	}
	if err := o.prepare(ctx); err != nil {
		return nil, err
	}
	c, err := openChanges(ctx, o.config, o.top+1)
	if err != nil {
		return nil, err
	}
	if err := o.move(ctx, switchTo); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// isUnused reports whether the VMM writes to the last overlay and has not written
// anything yet.
func (o *overlay) isUnused() (bool, error) {
	if o.top > 0 && !o.known {
		return false, nil
	}
	m, f, err := openOverlay(o.config, o.top)
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }() // read only
	return m.isEmpty(), nil
}

// move gives the prepared overlay to the VMM. From the moment that it may have
// gone over, the overlay belongs to the line: an empty one does no harm in it.
func (o *overlay) move(ctx context.Context, switchTo func(context.Context, string) error) error {
	path := overlayPath(o.config.Dir, o.top+1)
	if err := fault.Point(ctx, "qcow/switch"); err != nil {
		return err
	}
	o.top, o.spare, o.known = o.top+1, false, false
	if err := switchTo(ctx, path); err != nil {
		return err
	}
	o.known = true
	return nil
}
