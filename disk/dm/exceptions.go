package dm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk"
)

// An exception is two numbers of 8 bytes: a chunk of the disk, and where it is in
// the file. The header's words, of 4 bytes, are magic, valid, version, and the
// size of chunks in sectors. All is little-endian.
const (
	exceptionBytes = chunkBytes / perArea
	cowVersion     = 1
)

// readCow adds every block that a copy-on-write file holds to a set, and says how
// many exceptions there are. Nothing may write to it meanwhile.
func readCow(ctx context.Context, path string, diskBytes int64, set *disk.Blocks) (int64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }() // read only
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	n, err := readExceptions(ctx, f, info.Size(), diskBytes, set)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return n, nil
}

func readExceptions(ctx context.Context, f io.ReaderAt, fileBytes, diskBytes int64, set *disk.Blocks) (count int64, err error) {
	chunk := make([]byte, chunkBytes)
	if _, err := f.ReadAt(chunk, 0); err != nil {
		return 0, fmt.Errorf("read header: %w", noEnd(err))
	}
	if isNew, err := checkHeader(chunk); isNew || err != nil {
		return 0, err
	}
	for area := int64(0); ; area++ {
		if err := ctx.Err(); err != nil {
			return 0, context.Cause(ctx)
		}
		at := headerChunks + area*(perArea+1)
		if (at+1)*chunkBytes > fileBytes {
			return count, nil
		}
		if _, err := f.ReadAt(chunk, at*chunkBytes); err != nil {
			return 0, fmt.Errorf("read area %d: %w", area, noEnd(err))
		}
		for e := chunk; len(e) > 0; e = e[exceptionBytes:] {
			from, to := binary.LittleEndian.Uint64(e), binary.LittleEndian.Uint64(e[8:])
			if to == 0 { // as in the kernel: the first one that is not used
				return count, nil
			}
			if from >= uint64(diskBytes/chunkBytes) || to >= uint64(fileBytes/chunkBytes) || to%(perArea+1) == headerChunks {
				return 0, fmt.Errorf("exception %d has chunk %d of the disk in chunk %d, which is not possible", count, from, to)
			}
			set.Add(int64(from), 1)
			count++
		}
	}
}

// checkHeader looks at a header chunk; one of zeros is that of a file that was
// never attached.
func checkHeader(chunk []byte) (isNew bool, err error) {
	word := func(i int) uint32 { return binary.LittleEndian.Uint32(chunk[4*i:]) }
	switch {
	case word(0) == 0:
		return true, nil
	case string(chunk[:4]) != cowMagic:
		return false, fmt.Errorf("it begins with %q", chunk[:4])
	case word(1) == 0:
		return false, &brokenError{"Invalid"}
	case word(2) != cowVersion || word(3) != chunkSectors:
		return false, fmt.Errorf("version %d with chunks of %d sectors is not known", word(2), word(3))
	}
	return false, nil
}

// noEnd says of a file that ends too early what that means.
func noEnd(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
