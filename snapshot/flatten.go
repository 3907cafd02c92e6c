package snapshot

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Flatten makes a manifest of the same bytes with fewer layers: those of the
// diffs become one. The layer with most of the image stays as it is, unless less
// than half of it is in use. What there was before stays valid: nothing of it is
// touched.
//
// The new manifest begins a line of its own, and is pinned.
func (s *Store) Flatten(ctx context.Context, d Digest) (_ *Pin, err error) {
	image, err := s.Image(d)
	if err != nil {
		return nil, fmt.Errorf("flatten: %w", err)
	}
	defer func() { err = errors.Join(err, image.Close()) }()
	m := image.Manifest()
	keep := m.mainLayer()
	if len(m.Layers) < 2 && keep >= 0 {
		return s.Pin(d)
	}
	pin, err := s.rewrite(ctx, image, keep)
	if err != nil {
		return nil, fmt.Errorf("flatten: %w", err)
	}
	return pin, nil
}

// mainLayer is the layer that most blocks of the image lie in, or -1 when none is
// worth keeping.
func (m *Manifest) mainLayer() int {
	used := make([]int64, len(m.Layers))
	for e := range m.all() {
		if e.Layer != Zero {
			used[e.Layer] += e.Blocks
		}
	}
	main := -1
	for i, n := range used {
		if main < 0 || n > used[main] {
			main = i
		}
	}
	if main >= 0 && used[main]*2 < m.Layers[main].Blocks {
		return -1
	}
	return main
}

// all yields the extents in order.
func (m *Manifest) all() iter.Seq[Extent] {
	return func(yield func(Extent) bool) {
		for i := range m.Extents() {
			if !yield(m.Extent(i)) {
				return
			}
		}
	}
}

// rewrite copies what lies in other layers than keep into a new one.
func (s *Store) rewrite(ctx context.Context, image *Image, keep int) (_ *Pin, err error) {
	w, err := newLayerWriter(s.layersDir())
	if err != nil {
		return nil, sandbox.NoSpace(err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(sandbox.NoSpace(err), w.abandon())
		}
	}()
	list, err := copyOut(ctx, image, keep, w)
	if err != nil {
		return nil, err
	}
	defer s.publishing()()
	old := image.Manifest()
	m := Manifest{Kind: old.Kind, Blocks: old.Blocks}
	if keep >= 0 {
		m.Layers = append(m.Layers, old.Layers[keep])
	}
	if w.blocks > 0 {
		ref, err := s.publishLayer(w)
		if err != nil {
			return nil, err
		}
		m.Layers = append(m.Layers, ref)
	} else if err := w.abandon(); err != nil {
		return nil, err
	}
	number := func(e Extent) Extent { // from keptLayer and newLayer
		switch {
		case e.Layer == newLayer:
			e.Layer = len(m.Layers) - 1
		case e.Layer == keptLayer:
			e.Layer = 0
		}
		return e
	}
	flat, err := newManifest(m, func(yield func(Extent) bool) {
		for _, e := range list {
			if !yield(number(e)) {
				return
			}
		}
	})
	if err != nil {
		return nil, err
	}
	if err := s.writeManifest(flat.digest, flat.Encode()); err != nil {
		return nil, err
	}
	return s.pin(flat.digest), nil
}

// Where an extent will lie, before the new layer is one.
const (
	keptLayer = 0
	newLayer  = 1
)

// copyOut writes what does not lie in the layer keep, and says where all is.
func copyOut(ctx context.Context, image *Image, keep int, w *layerWriter) ([]Extent, error) {
	m := image.Manifest()
	list := make([]Extent, 0, m.Extents())
	buf := make([]byte, chunkBytes)
	for e := range m.all() {
		switch e.Layer {
		case Zero:
			list = append(list, e)
			continue
		case keep:
			e.Layer = keptLayer
			list = append(list, e)
			continue
		}
		moved := Extent{Start: e.Start, Blocks: e.Blocks, Layer: newLayer, Offset: w.blocks}
		for at := e.Start; at < e.End(); at += chunkBlocks {
			if err := ctx.Err(); err != nil {
				return nil, context.Cause(ctx)
			}
			part := buf[:min(chunkBlocks, e.End()-at)*BlockBytes]
			if _, err := image.ReadAt(part, at*BlockBytes); err != nil {
				return nil, err
			}
			if _, err := w.add(part); err != nil {
				return nil, err
			}
		}
		list = append(list, moved)
	}
	return list, nil
}
