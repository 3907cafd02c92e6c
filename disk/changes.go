package disk

import (
	"io"
	"math"
	"math/bits"
)

// Changes is what a disk held at one point, and where that may differ from its
// base.
type Changes interface {
	// Runs lists blocks in ascending order, no two runs touching. Every block that
	// differs from the base is in one; blocks that do not may be, too.
	Runs() []BlockRun
	// ReadAt reads what the guest would have read, in and outside of the runs.
	io.ReaderAt
	// Close gives back what is held open. A disk cannot be removed before.
	io.Closer
}

// BlockRun is a run of blocks of BlockBytes.
type BlockRun struct{ Start, Blocks int64 }

// End is the first block behind it.
func (r BlockRun) End() int64 { return r.Start + r.Blocks }

// MaxOverlays is how many overlays a disk may be made of, the one that is written
// to included. Each live snapshot adds one, and reading becomes a little slower.
const MaxOverlays = 32

// MaxRuns bounds the runs of Changes, whoever wrote the tables that they come
// from: the smallest gaps are filled until so many are left.
const MaxRuns = 1 << 20

// Blocks is a set of blocks of one disk: what drivers put the changes of several
// overlays together in. It takes a bit for each block.
type Blocks struct {
	words []uint64
	count int64 // of blocks of the disk
}

// NewBlocks is an empty set of the blocks of a disk.
func NewBlocks(diskBytes int64) *Blocks {
	n := (diskBytes + BlockBytes - 1) / BlockBytes
	return &Blocks{words: make([]uint64, (n+63)/64), count: n}
}

// Add adds n blocks from start on, as far as the disk has them.
func (b *Blocks) Add(start, n int64) {
	end := min(start+n, b.count)
	for at := max(start, 0); at < end; {
		if at%64 == 0 && end-at >= 64 {
			b.words[at/64] = math.MaxUint64
			at += 64
			continue
		}
		b.words[at/64] |= 1 << (at % 64)
		at++
	}
}

// Runs lists the set, with no more than MaxRuns runs.
func (b *Blocks) Runs() []BlockRun { return b.runs(MaxRuns) }

func (b *Blocks) runs(most int) []BlockRun {
	gap := int64(0)
	for ; b.countRuns(gap) > most; gap = 2*gap + 1 {
	}
	var runs []BlockRun
	b.each(gap, func(r BlockRun) { runs = append(runs, r) })
	return runs
}

func (b *Blocks) countRuns(gap int64) (n int) {
	b.each(gap, func(BlockRun) { n++ })
	return n
}

// each yields the runs, and joins those that no more than gap blocks lie between.
func (b *Blocks) each(gap int64, yield func(BlockRun)) {
	last := BlockRun{Start: -1}
	for start := b.next(0, 0); start < b.count; {
		end := b.next(start, math.MaxUint64)
		if last.Start >= 0 && start-last.End() <= gap {
			last.Blocks = end - last.Start
		} else {
			if last.Start >= 0 {
				yield(last)
			}
			last = BlockRun{start, end - start}
		}
		start = b.next(end, 0)
	}
	if last.Start >= 0 {
		yield(last)
	}
}

// next is the first block from at on that is in the set, or, with flip all ones,
// the first that is not.
func (b *Blocks) next(at int64, flip uint64) int64 {
	for at < b.count {
		if word := (b.words[at/64] ^ flip) >> (at % 64); word != 0 {
			return min(at+int64(bits.TrailingZeros64(word)), b.count)
		}
		at = (at/64 + 1) * 64
	}
	return b.count
}
