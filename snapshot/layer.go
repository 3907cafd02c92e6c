package snapshot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
)

// A layer's file is its blocks, then a tail: the digest of every chunk of blocks,
// zeros up to a whole number of blocks, and at the very end a footer. So blocks
// lie at the same place in the file as in the layer, and device-mapper can use
// the file as it is. docs/formats/layer.md has it with an example.
//
//	-64   8  magic "DRMSELAY"
//	-56   4  format version, 1
//	-52   4  block size in bytes, 4096
//	-48   4  chunk size in bytes, 65536
//	-44   4  zeros
//	-40   8  number of blocks
//	-32   8  where the tail begins
//	-24  24  zeros
//
// The layer's name is the BLAKE3 of its tail, which has the digest of every byte
// before it.
const (
	layerMagic   = "DRMSELAY"
	layerVersion = 1
	footerBytes  = 64
	chunkBytes   = 64 << 10
	chunkBlocks  = chunkBytes / BlockBytes
	digestBytes  = len(Digest{})
)

// CorruptError is data that is not what was written.
type CorruptError struct {
	File   string
	Offset int64 // of the first byte of what was checked, in the file
	Bytes  int64 // how much was checked
	Cause  string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("%s: %d bytes from byte %d on %s", e.File, e.Bytes, e.Offset, e.Cause)
}

// chunksOf is how many chunks so many blocks have.
func chunksOf(blocks int64) int64 { return (blocks + chunkBlocks - 1) / chunkBlocks }

// tailBytes is the size of a layer's tail.
func tailBytes(blocks int64) int64 {
	n := chunksOf(blocks)*int64(digestBytes) + footerBytes
	return (n + BlockBytes - 1) / BlockBytes * BlockBytes
}

// encodeTail makes the tail of a layer with these chunks.
func encodeTail(blocks int64, chunks []Digest) []byte {
	tail := make([]byte, tailBytes(blocks))
	for i, d := range chunks {
		copy(tail[i*digestBytes:], d[:])
	}
	foot := tail[len(tail)-footerBytes:]
	le := binary.LittleEndian
	copy(foot, layerMagic)
	le.PutUint32(foot[8:], layerVersion)
	le.PutUint32(foot[12:], BlockBytes)
	le.PutUint32(foot[16:], chunkBytes)
	le.PutUint64(foot[24:], uint64(blocks))
	le.PutUint64(foot[32:], uint64(blocks*BlockBytes))
	return tail
}

// parseFooter reads the footer of a file of so many bytes.
func parseFooter(foot []byte, fileBytes int64) (blocks int64, err error) {
	if len(foot) != footerBytes {
		return 0, errCut
	}
	le := binary.LittleEndian
	if string(foot[:8]) != layerMagic {
		return 0, fmt.Errorf("its footer begins with %q, not %q", foot[:8], layerMagic)
	}
	if v := le.Uint32(foot[8:]); v != layerVersion {
		return 0, fmt.Errorf("format version %d, this build reads %d", v, layerVersion)
	}
	if b, c := le.Uint32(foot[12:]), le.Uint32(foot[16:]); b != BlockBytes || c != chunkBytes {
		return 0, fmt.Errorf("blocks of %d and chunks of %d bytes, not %d and %d", b, c, BlockBytes, chunkBytes)
	}
	n := le.Uint64(foot[24:])
	if n < 1 || n > MaxBlocks || le.Uint64(foot[32:]) != n*BlockBytes || int64(n)*BlockBytes+tailBytes(int64(n)) != fileBytes {
		return 0, fmt.Errorf("%d blocks with a tail at byte %d do not fit its %d bytes", n, le.Uint64(foot[32:]), fileBytes)
	}
	return int64(n), nil
}

// Layer is an open layer. It may be read from any goroutine.
type Layer struct {
	file   *os.File
	ref    LayerRef
	chunks []Digest
	known  []atomic.Uint64 // a bit for each chunk that was checked
}

// openLayer opens a layer's file and checks its tail against the digest that it
// should have.
func openLayer(path string, want Digest) (_ *Layer, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close() // read only
		}
	}()
	tail, blocks, err := readTail(f)
	if err != nil {
		return nil, err
	}
	if got := DigestOf(tail); got != want {
		return nil, &CorruptError{path, blocks * BlockBytes, int64(len(tail)), "are not what was written: their digest is " + got.String()}
	}
	l := &Layer{file: f, ref: LayerRef{want, blocks}, chunks: make([]Digest, chunksOf(blocks))}
	for i := range l.chunks {
		l.chunks[i] = Digest(tail[i*digestBytes:])
	}
	l.known = make([]atomic.Uint64, (len(l.chunks)+63)/64)
	return l, nil
}

// readTail reads the tail of a layer's file; its size is checked, its digest is
// not.
func readTail(f *os.File) (tail []byte, blocks int64, err error) {
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	corrupt := func(at, n int64, cause string) error { return &CorruptError{f.Name(), at, n, cause} }
	size := info.Size()
	if size < footerBytes {
		return nil, 0, corrupt(0, size, "are too few for a layer")
	}
	foot := make([]byte, footerBytes)
	if _, err := f.ReadAt(foot, size-footerBytes); err != nil {
		return nil, 0, err
	}
	if blocks, err = parseFooter(foot, size); err != nil {
		return nil, 0, corrupt(size-footerBytes, footerBytes, "are not what was written: "+err.Error())
	}
	tail = make([]byte, tailBytes(blocks))
	_, err = f.ReadAt(tail, blocks*BlockBytes)
	return tail, blocks, err
}

// Ref names it.
func (l *Layer) Ref() LayerRef { return l.ref }

// Path is its file.
func (l *Layer) Path() string { return l.file.Name() }

// Close closes the file.
func (l *Layer) Close() error { return l.file.Close() }

// ReadAt reads bytes of the layer. Every chunk is checked before the first byte
// of it is given out.
func (l *Layer) ReadAt(p []byte, off int64) (n int, err error) {
	size := l.ref.Blocks * BlockBytes
	if off < 0 || off > size {
		return 0, fmt.Errorf("read at byte %d of layer %s, which has %d", off, filepath.Base(l.Path()), size)
	}
	if rest := size - off; int64(len(p)) > rest {
		p, err = p[:rest], io.EOF
	}
	for n < len(p) {
		part := min(len(p)-n, int(chunkBytes-(off+int64(n))%chunkBytes))
		if err := l.readChunk(p[n:n+part], off+int64(n)); err != nil {
			return n, err
		}
		n += part
	}
	return n, err
}

var chunkBuffers = sync.Pool{New: func() any { return new([chunkBytes]byte) }}

// readChunk reads bytes that lie in one chunk.
func (l *Layer) readChunk(p []byte, off int64) error {
	chunk := off / chunkBytes
	if l.isKnown(chunk) {
		return l.read(p, off)
	}
	buf := chunkBuffers.Get().(*[chunkBytes]byte)
	defer chunkBuffers.Put(buf)
	whole, err := l.verify(chunk, buf)
	if err != nil {
		return err
	}
	copy(p, whole[off-chunk*chunkBytes:])
	return nil
}

// verify reads a chunk and checks it.
func (l *Layer) verify(chunk int64, buf *[chunkBytes]byte) ([]byte, error) {
	at := chunk * chunkBytes
	whole := buf[:min(chunkBytes, l.ref.Blocks*BlockBytes-at)]
	if err := l.read(whole, at); err != nil {
		return nil, err
	}
	if DigestOf(whole) != l.chunks[chunk] {
		return nil, &CorruptError{l.Path(), at, int64(len(whole)), "are not what was written"}
	}
	l.known[chunk/64].Or(1 << (chunk % 64))
	return whole, nil
}

func (l *Layer) isKnown(chunk int64) bool { return l.known[chunk/64].Load()&(1<<(chunk%64)) != 0 }

// read fills p from the file, which has as many bytes.
func (l *Layer) read(p []byte, off int64) error {
	n, err := l.file.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return &CorruptError{l.Path(), off, int64(len(p)), "are missing"}
	}
	return err
}
