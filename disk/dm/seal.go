package dm

import (
	"context"
	"errors"
	"io/fs"
)

// Seal makes the hash tree of a layer if it has none yet. Create would do it
// too, but an image takes seconds, which a caller may want to spend earlier.
func (d *Driver) Seal(ctx context.Context, layer string) error {
	_, err := d.sealed(ctx, layer)
	return err
}

// IsSealed reports whether a layer has its hash tree: from then on what is read of
// it is what it was then, or an error.
func (d *Driver) IsSealed(layer string) (bool, error) {
	size, err := layerSize(layer)
	if err != nil {
		return false, err
	}
	_, err = wholeSeal(layer, size)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
