package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Builder makes one manifest: the first of a line, in which everything that is
// not put is zero, or the next generation of another, in which everything that is
// not put is the parent's.
//
// Blocks are put in ascending order. Those that are what they were before are
// dropped, and those that are zero are kept as such: a manifest costs what has
// changed. After an error nothing is published any more. A Builder is for one
// goroutine, and ends with Publish or Abandon.
type Builder struct {
	store   *Store
	parent  *Image // nil for the first of a line
	base    *Manifest
	writer  *layerWriter // nil until the first block of data
	changes []Extent
	next    int64 // blocks below were put, or passed over
	compare []byte
	stats   Stats
	broken  error // of a put: what was put is not whole
}

// Stats is what a Builder did.
type Stats struct {
	Put     int64 // blocks that were put
	Equal   int64 // of these, dropped since they had not changed
	Zero    int64 // of these, kept as zeros
	Written int64 // of these, written into the layer
	Bytes   int64 // that were written to the store, the manifest included
}

// First begins the line of an image of so many blocks.
func (s *Store) First(kind Kind, blocks int64) (*Builder, error) {
	m := Manifest{Kind: kind, Blocks: blocks}
	base, err := newManifest(m, func(yield func(Extent) bool) { yield(Extent{Blocks: blocks, Layer: Zero}) })
	if err != nil {
		return nil, fmt.Errorf("begin a line: %w", err)
	}
	return &Builder{store: s, base: base}, nil
}

// Next begins the next generation of an image, which must stay open until then.
func (s *Store) Next(parent *Image) *Builder {
	return &Builder{store: s, parent: parent, base: parent.Manifest()}
}

// Grow makes the image larger than its parent, before anything is put: what is
// not put behind the parent's end is zero. A disk may be larger than what it was
// made from.
func (b *Builder) Grow(blocks int64) error {
	if b.next > 0 || blocks < b.base.Blocks || blocks > MaxBlocks {
		return fmt.Errorf("grow an image of %d blocks, %d of which are passed, to %d", b.base.Blocks, b.next, blocks)
	}
	b.base = b.base.grown(blocks)
	return nil
}

// Put says what blocks hold from block start on. The data is not kept.
func (b *Builder) Put(ctx context.Context, start int64, data []byte) (err error) {
	defer func() { b.broken = errors.Join(b.broken, err) }()
	n := int64(len(data)) / BlockBytes
	if n*BlockBytes != int64(len(data)) {
		return fmt.Errorf("put %d bytes at block %d: that is no number of blocks", len(data), start)
	}
	if err := b.advance(start, n); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	for at := range n {
		if err := b.putBlock(start+at, data[at*BlockBytes:][:BlockBytes]); err != nil {
			return fmt.Errorf("put block %d: %w", start+at, err)
		}
	}
	return nil
}

// PutZero says that blocks are zero, without anybody having to look.
func (b *Builder) PutZero(start, n int64) (err error) {
	defer func() { b.broken = errors.Join(b.broken, err) }()
	if err := b.advance(start, n); err != nil {
		return err
	}
	b.stats.Put += n
	for at := start; at < start+n; {
		e := crop(b.base.Find(at), at, start+n)
		if e.Layer == Zero {
			b.stats.Equal += e.Blocks
		} else {
			b.change(Extent{Start: at, Blocks: e.Blocks, Layer: Zero})
			b.stats.Zero += e.Blocks
		}
		at = e.End()
	}
	return nil
}

// advance checks that a put follows on the one before.
func (b *Builder) advance(start, n int64) error {
	if start < b.next || n < 0 || n > b.base.Blocks-start {
		return fmt.Errorf("put %d blocks at block %d: they must follow on block %d and end at %d", n, start, b.next, b.base.Blocks)
	}
	b.next = start + n
	return nil
}

func (b *Builder) putBlock(at int64, data []byte) error {
	b.stats.Put++
	before := b.base.Find(at)
	if sparse.IsZero(data) {
		if before.Layer == Zero {
			b.stats.Equal++
			return nil
		}
		b.stats.Zero++
		b.change(Extent{Start: at, Blocks: 1, Layer: Zero})
		return nil
	}
	if before.Layer != Zero {
		same, err := b.isSame(at, data)
		if err != nil {
			return err
		}
		if same {
			b.stats.Equal++
			return nil
		}
	}
	return b.write(at, data)
}

// isSame compares with what the parent has.
func (b *Builder) isSame(at int64, data []byte) (bool, error) {
	if b.compare == nil {
		b.compare = make([]byte, BlockBytes)
	}
	if _, err := b.parent.ReadAt(b.compare, at*BlockBytes); err != nil {
		return false, fmt.Errorf("compare with the parent: %w", err)
	}
	return bytes.Equal(b.compare, data), nil
}

// begin begins the layer at the first block.
func (b *Builder) begin() error {
	if b.writer != nil {
		return nil
	}
	w, err := newLayerWriter(b.store.layersDir())
	if err != nil {
		return fmt.Errorf("begin layer: %w", err)
	}
	b.writer = w
	return nil
}

func (b *Builder) write(at int64, data []byte) error {
	if err := b.begin(); err != nil {
		return err
	}
	offset, err := b.writer.add(data)
	if err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	b.stats.Written++
	b.change(Extent{Start: at, Blocks: 1, Layer: 0, Offset: offset})
	return nil
}

// change notes an extent, and joins it with the one before where they touch in
// the image and in the layer.
func (b *Builder) change(e Extent) {
	if n := len(b.changes); n > 0 {
		last := &b.changes[n-1]
		if last.End() == e.Start && last.Layer == e.Layer && (e.Layer == Zero || last.Offset+last.Blocks == e.Offset) {
			last.Blocks += e.Blocks
			return
		}
	}
	b.changes = append(b.changes, e)
}

// Publish makes layer and manifest durable. The manifest is pinned: Collect keeps
// it until the pin is released, by when a reference should have it. The same bytes
// as the parent's give the parent's own manifest.
func (b *Builder) Publish(ctx context.Context) (_ *Pin, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("publish: %w", sandbox.NoSpace(err)), b.Abandon())
		}
	}()
	if b.broken != nil {
		return nil, fmt.Errorf("not after an error: %w", b.broken)
	}
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	if len(b.changes) == 0 && b.parent != nil && b.base.Blocks == b.parent.Manifest().Blocks {
		return b.store.Pin(b.base.digest)
	}
	unlock := b.store.publishing()
	defer unlock()
	var fresh *LayerRef
	if b.writer != nil {
		ref, err := b.store.publishLayer(b.writer)
		if err != nil {
			return nil, fmt.Errorf("layer: %w", err)
		}
		b.writer = nil
		fresh = &ref
		b.stats.Bytes += ref.Blocks*BlockBytes + tailBytes(ref.Blocks)
	}
	m, err := b.manifest(fresh)
	if err != nil {
		return nil, err
	}
	data := m.Encode()
	if err := b.store.writeManifest(m.digest, data); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	b.stats.Bytes += int64(len(data))
	return b.store.pin(m.digest), nil
}

func (b *Builder) manifest(fresh *LayerRef) (*Manifest, error) {
	m, err := apply(b.base, fresh, b.changes)
	if err != nil || b.parent != nil {
		return m, err
	}
	first := *m // of a line: it is a diff to nothing
	first.Generation, first.Parent = 0, Digest{}
	first.digest = DigestOf(first.encode())
	return &first, nil
}

// Stats is what was done so far.
func (b *Builder) Stats() Stats { return b.stats }

// Abandon throws away what was written. After Publish it does nothing.
func (b *Builder) Abandon() error {
	if b.writer == nil {
		return nil
	}
	w := b.writer
	b.writer = nil
	return w.abandon()
}
