// Package sparse is about files with holes, which is what images of memories and
// disks are: it writes them without the zeros, finds what is in them, and says
// what they take.
//
// It knows nothing of what is in a file, and makes nothing durable: osfs does.
package sparse

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// BlockBytes is the smallest hole that is left: the block of most file systems.
const BlockBytes = 4096

var zeroBlock [BlockBytes]byte

// IsZero reports whether all bytes are zero.
func IsZero(p []byte) bool {
	for len(p) > BlockBytes {
		if !bytes.Equal(p[:BlockBytes], zeroBlock[:]) {
			return false
		}
		p = p[BlockBytes:]
	}
	return bytes.Equal(p, zeroBlock[:len(p)])
}

// Allocated is what a file takes, in bytes of allocated blocks; its size is what
// it would take without holes.
func Allocated(info fs.FileInfo) int64 {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return info.Size()
	}
	return st.Blocks * 512 // st_blocks is in units of 512 bytes whatever the file system
}

// AllocatedAt is Allocated of what is at a path, a link itself.
func AllocatedAt(path string) (int64, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return 0, err
	}
	return Allocated(info), nil
}

// WriteAt writes p without its blocks of zeros, which are counted from the start
// of p; neighbours are written together. Where it writes nothing there must be a
// hole already.
func WriteAt(to io.WriterAt, p []byte, at int64) error {
	for start := 0; start < len(p); {
		end := start
		for end < len(p) && !IsZero(p[end:min(end+BlockBytes, len(p))]) {
			end = min(end+BlockBytes, len(p))
		}
		if end > start {
			if _, err := to.WriteAt(p[start:end], at+int64(start)); err != nil {
				return err
			}
		}
		start = end + BlockBytes // past the zeros that ended the run
	}
	return nil
}

// copyBytes is how much Copy has in its hands at a time.
const copyBytes = 32 * BlockBytes

// Copy writes all that a reader has into an empty file, without the zeros, and
// returns how long that is.
func Copy(to *os.File, from io.Reader) (int64, error) {
	return CopyBuffer(to, from, make([]byte, copyBytes))
}

// CopyBuffer is Copy with a buffer of the caller's, whose length is a multiple of
// BlockBytes.
func CopyBuffer(to *os.File, from io.Reader, buf []byte) (int64, error) {
	var size int64
	for {
		n, err := io.ReadFull(from, buf)
		if err := WriteAt(to, buf[:n], size); err != nil {
			return size, err
		}
		size += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF && n > 0 { // ReadFull's own: what wraps one is somebody else's
			return size, to.Truncate(size)
		}
		if err != nil {
			return size, err
		}
	}
}

// CopyFile makes an empty file what another one is, hole for hole.
func CopyFile(to, from *os.File) error {
	info, err := from.Stat()
	if err != nil {
		return err
	}
	if err := to.Truncate(info.Size()); err != nil {
		return err
	}
	for part, err := range Data(from) {
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(to, part.Offset), io.NewSectionReader(from, part.Offset, part.Bytes)); err != nil {
			return err
		}
	}
	return nil
}

// Range is a part of a file.
type Range struct{ Offset, Bytes int64 }

// Data yields what of a file is not a hole, in order. A file system that knows no
// holes calls the whole file data. It moves the file's offset.
func Data(f *os.File) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		for at := int64(0); ; {
			data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) { // only a hole is left, or nothing
				return
			}
			if err != nil {
				yield(Range{}, fmt.Errorf("find data: %w", err))
				return
			}
			hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
			if err != nil {
				yield(Range{}, fmt.Errorf("find hole: %w", err))
				return
			}
			if !yield(Range{data, hole - data}, nil) {
				return
			}
			at = hole
		}
	}
}
