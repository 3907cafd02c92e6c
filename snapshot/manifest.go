package snapshot

import (
	"fmt"
	"math"
	"slices"
	"sort"
)

// BlockBytes is the unit of everything.
const BlockBytes = 4096

// Bounds of one manifest.
const (
	MaxBlocks = math.MaxUint32 // 16 TiB, less a block
	MaxLayers = 4096
)

// Kind is what an image is of.
type Kind uint32

// The kinds.
const (
	Memory Kind = 1
	Disk   Kind = 2
)

func (k Kind) String() string {
	switch k {
	case Memory:
		return "memory"
	case Disk:
		return "disk"
	}
	return fmt.Sprintf("kind %d", uint32(k))
}

// LayerRef names a layer that a manifest uses.
type LayerRef struct {
	Digest Digest
	Blocks int64 // how many it has
}

// Zero is the layer of an extent of zeros.
const Zero = -1

// Extent is a run of blocks of an image that lie in one place.
type Extent struct {
	Start  int64 // in the image
	Blocks int64
	Layer  int   // index in Manifest.Layers, or Zero
	Offset int64 // in the layer; 0 for zeros
}

// End is the first block behind it.
func (e Extent) End() int64 { return e.Start + e.Blocks }

// Manifest says of every block of an image where it is. It is immutable.
type Manifest struct {
	Kind       Kind
	Blocks     int64  // of the image
	Generation uint32 // how many diffs lie between this and the first of its line
	Parent     Digest // the manifest that this is a diff to; zero: none
	Layers     []LayerRef

	extents extents
	digest  Digest
}

// Digest names the manifest: it is the hash of its encoding.
func (m *Manifest) Digest() Digest { return m.digest }

// Bytes is the size of the image.
func (m *Manifest) Bytes() int64 { return m.Blocks * BlockBytes }

// Extents is how many there are.
func (m *Manifest) Extents() int { return len(m.extents.starts) }

// Extent is the i-th one, in the order of the image.
func (m *Manifest) Extent(i int) Extent { return m.extents.at(i, m.Blocks) }

// Find is the extent that a block lies in. It is a binary search.
func (m *Manifest) Find(block int64) Extent { return m.Extent(m.extents.find(block)) }

// DataBlocks counts the blocks that lie in layers.
func (m *Manifest) DataBlocks() (n int64) {
	for i := range m.Extents() {
		if e := m.Extent(i); e.Layer != Zero {
			n += e.Blocks
		}
	}
	return n
}

// extents is a sorted list without gaps, in 12 bytes each: a guest of 64 GiB may
// have 16 million of them. An extent ends where the next begins, so that none can
// overlap.
type extents struct {
	starts []uint32
	places []place
}

// place is where an extent lies.
type place struct {
	layer  int32
	offset uint32
}

func (x *extents) at(i int, blocks int64) Extent {
	end := blocks
	if i+1 < len(x.starts) {
		end = int64(x.starts[i+1])
	}
	start := int64(x.starts[i])
	return Extent{Start: start, Blocks: end - start, Layer: int(x.places[i].layer), Offset: int64(x.places[i].offset)}
}

func (x *extents) find(block int64) int {
	return sort.Search(len(x.starts), func(i int) bool { return int64(x.starts[i]) > block }) - 1
}

// add appends an extent that begins where the last one ended, and joins the two
// if they lie behind one another.
func (x *extents) add(e Extent) {
	if n := len(x.starts); n > 0 {
		last := x.places[n-1]
		before := e.Start - int64(x.starts[n-1])
		if int(last.layer) == e.Layer && (e.Layer == Zero || int64(last.offset)+before == e.Offset) {
			return
		}
	}
	x.starts = append(x.starts, uint32(e.Start))
	x.places = append(x.places, place{int32(e.Layer), uint32(e.Offset)})
}

// newManifest completes a manifest from extents in order, drops the layers that
// no extent names, and hashes it.
func newManifest(m Manifest, list func(yield func(Extent) bool)) (*Manifest, error) {
	m.extents = extents{}
	var end int64
	for e := range list {
		if err := m.checkExtent(e, end); err != nil {
			return nil, err
		}
		m.extents.add(e)
		end = e.End()
	}
	if end != m.Blocks {
		return nil, fmt.Errorf("its extents end at block %d of %d", end, m.Blocks)
	}
	m.dropUnused()
	if err := m.check(); err != nil {
		return nil, err
	}
	m.digest = DigestOf(m.encode())
	return &m, nil
}

func (m *Manifest) check() error {
	switch {
	case m.Kind != Memory && m.Kind != Disk:
		return fmt.Errorf("%v is neither memory nor disk", m.Kind)
	case m.Blocks < 1 || m.Blocks > MaxBlocks:
		return fmt.Errorf("%d blocks are not possible, from 1 to %d", m.Blocks, int64(MaxBlocks))
	case len(m.Layers) > MaxLayers:
		return fmt.Errorf("%d layers are more than %d", len(m.Layers), MaxLayers)
	case m.Generation > 0 && m.Parent.IsZero():
		return fmt.Errorf("it is of generation %d and has no parent", m.Generation)
	}
	for i, l := range m.Layers {
		if l.Blocks < 1 || l.Blocks > MaxBlocks || l.Digest.IsZero() {
			return fmt.Errorf("layer %d with %d blocks and digest %s is not possible", i, l.Blocks, l.Digest)
		}
		if slices.ContainsFunc(m.Layers[:i], func(o LayerRef) bool { return o.Digest == l.Digest }) {
			return fmt.Errorf("layer %s is named twice", l.Digest)
		}
	}
	return nil
}

// checkExtent says whether an extent can follow on block end.
func (m *Manifest) checkExtent(e Extent, end int64) error {
	ok := e.Start == end && e.Blocks > 0 && e.Blocks <= m.Blocks-e.Start
	if e.Layer == Zero {
		ok = ok && e.Offset == 0
	} else {
		ok = ok && e.Layer >= 0 && e.Layer < len(m.Layers) && e.Offset >= 0 && e.Offset <= m.Layers[e.Layer].Blocks-e.Blocks
	}
	if !ok {
		return fmt.Errorf("extent of %d blocks at block %d, in layer %d at %d, is not possible", e.Blocks, e.Start, e.Layer, e.Offset)
	}
	return nil
}

// dropUnused renumbers the layers that are left.
func (m *Manifest) dropUnused() {
	used := make([]bool, len(m.Layers))
	for _, p := range m.extents.places {
		if p.layer != Zero {
			used[p.layer] = true
		}
	}
	number := make([]int32, len(m.Layers))
	var kept []LayerRef
	for i, l := range m.Layers {
		if used[i] {
			number[i] = int32(len(kept))
			kept = append(kept, l)
		}
	}
	m.Layers = kept
	for i, p := range m.extents.places {
		if p.layer != Zero {
			m.extents.places[i].layer = number[p.layer]
		}
	}
}
