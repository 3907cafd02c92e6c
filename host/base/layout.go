package base

import (
	"context"
	"fmt"

	"github.com/dormouse-sandbox/dormouse/disk/dm"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// Sealer gives layers the hash trees that device-mapper checks them with; it is
// *dm.Driver.
type Sealer interface {
	IsSealed(layer string) (bool, error)
	Seal(ctx context.Context, layer string) error
}

// WriteLayout publishes how device-mapper puts a manifest's image together, for
// disk.Config.Layout. The layers are those of the store, at their places in it;
// whoever has the disk keeps the manifest from being collected.
//
// A layer that is used for the first time is read twice: its digests say that it is
// what was written, then it gets its hash tree. A manifest with more layers or
// extents than a table can have is an error: it has to be flattened.
func WriteLayout(ctx context.Context, store *snapshot.Store, d snapshot.Digest, path string, sealer Sealer) error {
	m, err := store.Manifest(d)
	if err != nil {
		return err
	}
	for _, l := range m.Layers {
		if err := seal(ctx, store, l.Digest, sealer); err != nil {
			return fmt.Errorf("seal layer %s: %w", l.Digest, err)
		}
	}
	return dm.WriteLayout(path, layoutOf(store, m))
}

func seal(ctx context.Context, store *snapshot.Store, layer snapshot.Digest, sealer Sealer) error {
	sealed, err := sealer.IsSealed(store.LayerPath(layer))
	if err != nil || sealed {
		return err
	}
	if err := store.VerifyLayer(ctx, layer); err != nil {
		return err
	}
	return sealer.Seal(ctx, store.LayerPath(layer))
}

func layoutOf(store *snapshot.Store, m *snapshot.Manifest) dm.Layout {
	var out dm.Layout
	for _, l := range m.Layers {
		out.Layers = append(out.Layers, store.LayerPath(l.Digest))
	}
	for i := range m.Extents() {
		e := m.Extent(i)
		to := dm.Extent{Bytes: e.Blocks * snapshot.BlockBytes, Layer: dm.Zero}
		if e.Layer != snapshot.Zero {
			to.Layer, to.Offset = e.Layer, e.Offset*snapshot.BlockBytes
		}
		out.Extents = append(out.Extents, to)
	}
	return out
}
