package kernel

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// maxPieces is UIO_MAXIOV: how many pieces one call takes.
const maxPieces = 1024

// ReadProcess fills p with ranges of a process's memory, one after the other,
// which are as large as p together.
func ReadProcess(pid int, p []byte, ranges []Range) error {
	total := uint64(0)
	for _, r := range ranges {
		total += r.End - r.Start
	}
	if total != uint64(len(p)) {
		return fmt.Errorf("%d bytes were chosen, to be read into %d", total, len(p))
	}
	ranges = skip(append([]Range(nil), ranges...), 0) // it is used up
	for len(p) > 0 {
		n, err := readPieces(pid, p, ranges[:min(len(ranges), maxPieces)])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("process %d, address %#x: %w", pid, ranges[0].Start, err)
		}
		p, ranges = p[n:], skip(ranges, uint64(n))
	}
	return nil
}

// readPieces reads as much as the kernel gives at a time.
func readPieces(pid int, p []byte, ranges []Range) (int, error) {
	remote, size := make([]unix.RemoteIovec, len(ranges)), 0
	for i, r := range ranges {
		remote[i] = unix.RemoteIovec{Base: uintptr(r.Start), Len: int(r.End - r.Start)}
		size += remote[i].Len
	}
	local := []unix.Iovec{{Base: &p[0], Len: uint64(size)}}
	return unix.ProcessVMReadv(pid, local, remote, 0)
}

// skip leaves out the first n bytes of ranges, and what is empty after them.
func skip(ranges []Range, n uint64) []Range {
	for len(ranges) > 0 {
		size := ranges[0].End - ranges[0].Start
		if n < size {
			ranges[0].Start += n
			break
		}
		n -= size
		ranges = ranges[1:]
	}
	return ranges
}
