package snapshot

import (
	"fmt"
	"iter"
	"slices"
)

// apply makes the manifest of the next generation: the changes, which are extents
// in order, in front of what the parent has elsewhere. A change of a block that
// the parent's size does not have is refused.
func apply(parent *Manifest, fresh *LayerRef, changes []Extent) (*Manifest, error) {
	m := Manifest{
		Kind: parent.Kind, Blocks: parent.Blocks, Generation: parent.Generation + 1, Parent: parent.digest,
		Layers: slices.Clone(parent.Layers),
	}
	if fresh != nil {
		own := slices.IndexFunc(m.Layers, func(l LayerRef) bool { return l.Digest == fresh.Digest })
		if own < 0 { // the same bytes may have been written before
			own = len(m.Layers)
			m.Layers = append(m.Layers, *fresh)
		}
		changes = slices.Clone(changes)
		for i := range changes {
			if changes[i].Layer != Zero {
				changes[i].Layer = own
			}
		}
	}
	var end int64
	for _, c := range changes {
		if c.Start < end || c.Blocks < 1 || c.End() > parent.Blocks {
			return nil, fmt.Errorf("change of %d blocks at block %d does not follow on block %d of %d", c.Blocks, c.Start, end, parent.Blocks)
		}
		end = c.End()
	}
	return newManifest(m, merged(parent, changes))
}

// grown is the manifest with zeros behind it, and with its own digest still.
func (m *Manifest) grown(blocks int64) *Manifest {
	g := *m
	g.extents = extents{slices.Clone(m.extents.starts), slices.Clone(m.extents.places)}
	if blocks > m.Blocks {
		g.extents.add(Extent{Start: m.Blocks, Blocks: blocks - m.Blocks, Layer: Zero})
	}
	g.Blocks = blocks
	return &g
}

// merged yields the extents of the parent with the changes in front of them.
func merged(parent *Manifest, changes []Extent) iter.Seq[Extent] {
	return func(yield func(Extent) bool) {
		var at int64 // what was yielded ends here
		next := 0
		between := func(end int64) bool { // the parent's, up to a block
			for ; at < end; next++ {
				e := parent.Extent(next)
				if e.End() <= at {
					continue
				}
				cut := crop(e, at, end)
				if !yield(cut) {
					return false
				}
				at = cut.End()
				if at < e.End() {
					return true // the rest may be needed yet
				}
			}
			return true
		}
		for _, c := range changes {
			if !between(c.Start) || !yield(c) {
				return
			}
			at = c.End()
		}
		between(parent.Blocks)
	}
}

// crop is the part of an extent between two blocks of the image.
func crop(e Extent, from, to int64) Extent {
	start, end := max(e.Start, from), min(e.End(), to)
	out := Extent{Start: start, Blocks: end - start, Layer: e.Layer, Offset: e.Offset + start - e.Start}
	if e.Layer == Zero {
		out.Offset = 0
	}
	return out
}
