package snapshot

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const (
	importBytes = 1 << 20 // read at a time
	// gapBlocks zeros or more between blocks of data are an extent of their own.
	// Fewer are copied with what is around them: every extent is a target of
	// device-mapper, and a seek.
	gapBlocks = chunkBlocks
	// cloneBytes of data or more are left to the kernel to copy, which shares them
	// where the file system can.
	cloneBytes = 64 << 10
)

// Import makes the first manifest of a line from a file. Holes are not even read,
// and zeros not written. The manifest is pinned; the same bytes give the same one.
// The file must not change meanwhile.
//
// On file systems that share blocks between files (XFS, Btrfs) the layer shares
// them with the file, and takes next to nothing; on others it is a copy.
func (s *Store) Import(ctx context.Context, kind Kind, f *os.File) (_ *Pin, _ Stats, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("import %s: %w", f.Name(), sandbox.NoSpace(err))
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return nil, Stats{}, err
	}
	b, err := s.First(kind, (info.Size()+BlockBytes-1)/BlockBytes)
	if err != nil {
		return nil, Stats{}, err
	}
	if err := b.importAll(ctx, f, info.Size()); err != nil {
		return nil, Stats{}, errors.Join(err, b.Abandon())
	}
	pin, err := b.Publish(ctx)
	return pin, b.Stats(), err
}

func (b *Builder) importAll(ctx context.Context, f *os.File, size int64) error {
	buf := make([]byte, importBytes)
	for part, err := range stretches(f) {
		if err != nil {
			return err
		}
		end := min(part.Offset+part.Bytes, size)
		for at := part.Offset; at < end; at += importBytes {
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			n := min(importBytes, end-at)
			if _, err := f.ReadAt(buf[:n], at); err != nil {
				return err
			}
			whole := (n + BlockBytes - 1) / BlockBytes * BlockBytes
			clear(buf[n:whole])
			if err := b.importPart(f, at, buf[:whole]); err != nil {
				return err
			}
		}
	}
	return nil
}

// stretches yields the data of a file in whole blocks, with small holes in them.
func stretches(f *os.File) iter.Seq2[sparse.Range, error] {
	return func(yield func(sparse.Range, error) bool) {
		var last sparse.Range
		for part, err := range sparse.Data(f) {
			if err != nil {
				yield(part, err)
				return
			}
			start := part.Offset / BlockBytes * BlockBytes
			end := (part.Offset + part.Bytes + BlockBytes - 1) / BlockBytes * BlockBytes
			if last.Bytes > 0 && start-last.Offset-last.Bytes < gapBlocks*BlockBytes {
				last.Bytes = end - last.Offset
				continue
			}
			if last.Bytes > 0 && !yield(last, nil) {
				return
			}
			last = sparse.Range{Offset: start, Bytes: end - start}
		}
		if last.Bytes > 0 {
			yield(last, nil)
		}
	}
}

// importPart writes the runs of blocks in data, which a file has at off.
func (b *Builder) importPart(f *os.File, off int64, data []byte) error {
	for start, end := nextRun(data, 0); start < end; start, end = nextRun(data, end) {
		run := data[start*BlockBytes : end*BlockBytes]
		at := off/BlockBytes + int64(start)
		if err := b.begin(); err != nil {
			return err
		}
		offset, err := b.writer.addFrom(f, at*BlockBytes, run)
		if err != nil {
			return fmt.Errorf("write layer: %w", err)
		}
		n := int64(end - start)
		b.stats.Put += n
		b.stats.Written += n
		b.change(Extent{Start: at, Blocks: n, Layer: 0, Offset: offset})
	}
	return nil
}

// nextRun is the next run of blocks from a block on: up to the first gap that is
// long enough, and without the zeros at its ends. It is empty if there is none.
func nextRun(data []byte, from int) (start, end int) {
	blocks := len(data) / BlockBytes
	isZero := func(i int) bool { return sparse.IsZero(data[i*BlockBytes:][:BlockBytes]) }
	for start = from; start < blocks && isZero(start); start++ {
	}
	end = start
	for at := start; at < blocks && at-end < gapBlocks; at++ {
		if !isZero(at) {
			end = at + 1
		}
	}
	return start, end
}

// addFrom is add for bytes that a file has at off. The kernel copies them, or
// shares them; where it cannot they are written.
func (w *layerWriter) addFrom(f *os.File, off int64, data []byte) (offset int64, err error) {
	if len(data) < cloneBytes {
		return w.add(data)
	}
	if err := w.out.Flush(); err != nil {
		return 0, err
	}
	copied := 0
	for copied < len(data) {
		from := off + int64(copied)
		n, err := unix.CopyFileRange(int(f.Fd()), &from, int(w.file.Fd()), nil, len(data)-copied, 0)
		if err != nil || n == 0 { // another file system, or one that cannot do this, or a file that ends within its last block
			break
		}
		copied += n
	}
	if _, err := w.out.Write(data[copied:]); err != nil {
		return 0, err
	}
	return w.note(data), nil
}
