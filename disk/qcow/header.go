package qcow

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// header is what matters in the header of an overlay (docs/interop/qcow2.txt in
// QEMU's source).
type header struct {
	backing string
	format  string // of the backing file
	size    int64  // seen by the guest, in bytes
}

func (h header) String() string {
	return fmt.Sprintf("%d bytes over %q (%s)", h.size, h.backing, h.format)
}

const (
	magic          = 0x514649fb // "QFI\xfb"
	headerV3       = 104        // bytes, the shortest header of version 3
	maxHeader      = 64 << 10   // more than the header's cluster ever needs here
	extBackingType = 0xe2792aca
	bitCorrupt     = 1 << 1
	bitDataFile    = 1 << 2 // the data are in another file, named in the header
)

// readHeader reads the header of a regular file.
func readHeader(path string) (header, error) {
	f, err := openRegular(path)
	if err != nil {
		return header{}, err
	}
	defer func() { _ = f.Close() }() // read only
	data, err := io.ReadAll(io.LimitReader(f, maxHeader))
	if err != nil {
		return header{}, err
	}
	return parseHeader(data)
}

// parseHeader reads a version 3 header. Its numbers come from a file that the
// VMM can write, so each is checked before it is used.
func parseHeader(data []byte) (header, error) {
	if len(data) < headerV3 || binary.BigEndian.Uint32(data) != magic {
		return header{}, errors.New("not a qcow2 file")
	}
	u32 := func(at int) uint32 { return binary.BigEndian.Uint32(data[at:]) }
	u64 := func(at int) uint64 { return binary.BigEndian.Uint64(data[at:]) }
	if version := u32(4); version != 3 {
		return header{}, fmt.Errorf("qcow2 version %d, not 3", version)
	}
	if features := u64(72); features&(bitCorrupt|bitDataFile) != 0 {
		return header{}, fmt.Errorf("qcow2 features %#x: corrupt, or with data elsewhere", features)
	}
	backing, err := slice(data, u64(8), u32(16))
	if err != nil {
		return header{}, fmt.Errorf("backing file name: %w", err)
	}
	format, err := backingFormat(data, u32(100))
	if err != nil {
		return header{}, err
	}
	return header{backing: string(backing), format: format, size: int64(u64(24))}, nil
}

// backingFormat walks the header extensions, which begin at from: each has a
// type, a length and data padded to 8 bytes; type 0 ends the list.
func backingFormat(data []byte, from uint32) (string, error) {
	for at := uint64(from); ; {
		head, err := slice(data, at, 8)
		if err != nil {
			return "", fmt.Errorf("header extension: %w", err)
		}
		kind, length := binary.BigEndian.Uint32(head), binary.BigEndian.Uint32(head[4:])
		if kind == 0 {
			return "", nil
		}
		body, err := slice(data, at+8, length)
		if err != nil {
			return "", fmt.Errorf("header extension %#x: %w", kind, err)
		}
		if kind == extBackingType {
			return string(body), nil
		}
		at += 8 + (uint64(length)+7)/8*8
	}
}

func slice(data []byte, at uint64, length uint32) ([]byte, error) {
	if at > uint64(len(data)) || uint64(length) > uint64(len(data))-at {
		return nil, fmt.Errorf("%d bytes at %d are beyond the header", length, at)
	}
	return data[at : at+uint64(length)], nil
}
