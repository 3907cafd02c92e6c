package snapshot

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/zeebo/blake3"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
)

// layerWriter writes a layer block after block, under a temporary name until
// publish.
type layerWriter struct {
	file   *os.File
	out    *bufio.Writer
	blocks int64
	chunk  *blake3.Hasher // of the chunk that is being written
	chunks []Digest
}

const writeBuffer = 1 << 20

func newLayerWriter(dir string) (*layerWriter, error) {
	if err := fault.Point(context.Background(), "snapshot/layer/create"); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, tempPrefix+"layer-*")
	if err != nil {
		return nil, err
	}
	return &layerWriter{file: f, out: bufio.NewWriterSize(f, writeBuffer), chunk: blake3.New()}, nil
}

// add appends whole blocks and returns where the first of them is.
func (w *layerWriter) add(data []byte) (offset int64, err error) {
	if _, err := w.out.Write(data); err != nil {
		return 0, err
	}
	return w.note(data), nil
}

// note hashes whole blocks that were written, and returns where the first is.
func (w *layerWriter) note(data []byte) (offset int64) {
	offset = w.blocks
	for len(data) > 0 {
		_, _ = w.chunk.Write(data[:BlockBytes]) // a hash takes everything
		if w.blocks++; w.blocks%chunkBlocks == 0 {
			w.endChunk()
		}
		data = data[BlockBytes:]
	}
	return offset
}

func (w *layerWriter) endChunk() {
	w.chunks = append(w.chunks, Digest(w.chunk.Sum(nil)))
	w.chunk.Reset()
}

// publish makes the layer durable under its name in dir. The writer is spent.
func (w *layerWriter) publish(dir string) (_ LayerRef, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, w.abandon())
		}
	}()
	if w.blocks%chunkBlocks != 0 {
		w.endChunk()
	}
	tail := encodeTail(w.blocks, w.chunks)
	if _, err := w.out.Write(tail); err != nil {
		return LayerRef{}, err
	}
	if err := errors.Join(fault.Point(context.Background(), "snapshot/layer/write"), w.out.Flush()); err != nil {
		return LayerRef{}, err
	}
	if err := w.file.Chmod(0o444); err != nil {
		return LayerRef{}, err
	}
	if err := errors.Join(fault.Point(context.Background(), "snapshot/layer/fsync"), w.file.Sync()); err != nil {
		return LayerRef{}, err
	}
	ref := LayerRef{DigestOf(tail), w.blocks}
	if err := osfs.Rename("snapshot-layer", w.file.Name(), filepath.Join(dir, layerName(ref.Digest))); err != nil {
		return LayerRef{}, err
	}
	return ref, w.file.Close()
}

// abandon throws the layer away.
func (w *layerWriter) abandon() error {
	err := os.Remove(w.file.Name())
	if errors.Is(err, os.ErrNotExist) { // it has its name already
		err = nil
	}
	return errors.Join(closeFile(w.file), err)
}

func closeFile(f *os.File) error {
	if err := f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("close %s: %w", f.Name(), err)
	}
	return nil
}
