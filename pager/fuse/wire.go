package fuse

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// The protocol, as far as it is spoken here. Everything is in the byte order of
// the machine. https://docs.kernel.org/filesystems/fuse.html
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opOpen        = 14
	opRead        = 15
	opStatfs      = 17
	opRelease     = 18
	opFsync       = 20
	opInit        = 26
	opOpendir     = 27
	opReaddir     = 28
	opReleasedir  = 29
	opInterrupt   = 36
	opDestroy     = 38
	opBatchForget = 42

	rootID = 1

	inHeadBytes  = 40
	outHeadBytes = 16
	initInBytes  = 16 // of those that every version sends
	readInBytes  = 40

	majorVersion = 7
	// minMinor is Linux 4.20, from which on all structures below have their size.
	minMinor = 28

	initAsyncRead = 1 << 0
	initMaxPages  = 1 << 22
	maxPages      = 256 // of one read: 1 MiB

	openKeepCache = 1 << 1
	openNoFlush   = 1 << 5

	// foreverSeconds is how long names and attributes are good.
	foreverSeconds = 1 << 30
)

var native = binary.NativeEndian

// request is one message of the kernel.
type request struct {
	opcode uint32
	unique uint64
	node   uint64
	body   []byte
}

// parseRequest reads a message; data may be longer than it.
func parseRequest(data []byte) (request, error) {
	if len(data) < inHeadBytes {
		return request{}, fmt.Errorf("a request of %d bytes is shorter than its header", len(data))
	}
	n := native.Uint32(data)
	if n < inHeadBytes || int64(n) > int64(len(data)) {
		return request{}, fmt.Errorf("a request says that it has %d bytes of %d", n, len(data))
	}
	return request{
		opcode: native.Uint32(data[4:]), unique: native.Uint64(data[8:]), node: native.Uint64(data[16:]),
		body: data[inHeadBytes:n],
	}, nil
}

// putHead writes the header of an answer that has so many bytes in all.
func putHead(out []byte, unique uint64, n int, errno unix.Errno) {
	native.PutUint32(out, uint32(n))
	native.PutUint32(out[4:], uint32(-int32(errno)))
	native.PutUint64(out[8:], unique)
}

// attrBytes is struct fuse_attr.
const attrBytes = 88

// putAttr describes a node. Whoever knows a file's name may read it, unless the
// folder that the file system is mounted in keeps him out.
func putAttr(out []byte, node uint64, size int64) {
	mode := uint32(unix.S_IFREG | 0o444)
	links := uint32(1)
	if node == rootID {
		mode, links = unix.S_IFDIR|0o555, 2
	}
	native.PutUint64(out, node)
	native.PutUint64(out[8:], uint64(size))
	native.PutUint64(out[16:], uint64(size+511)/512)
	native.PutUint32(out[60:], mode)
	native.PutUint32(out[64:], links)
	native.PutUint32(out[80:], 4096)
}

// entryOut answers a LOOKUP.
func entryOut(node uint64, size int64) []byte {
	out := make([]byte, 40+attrBytes)
	native.PutUint64(out, node)
	native.PutUint64(out[16:], foreverSeconds)
	native.PutUint64(out[24:], foreverSeconds)
	putAttr(out[40:], node, size)
	return out
}

// attrOut answers a GETATTR.
func attrOut(node uint64, size int64) []byte {
	out := make([]byte, 16+attrBytes)
	native.PutUint64(out, foreverSeconds)
	putAttr(out[16:], node, size)
	return out
}

// openOut answers an OPEN: what was read once stays in the page cache.
func openOut(flags uint32) []byte {
	out := make([]byte, 16)
	native.PutUint32(out[8:], flags)
	return out
}

// statfsOut answers a STATFS: a file system in which nothing is free.
func statfsOut() []byte {
	out := make([]byte, 80)
	native.PutUint32(out[40:], 4096) // block size
	native.PutUint32(out[44:], 255)  // longest name
	native.PutUint32(out[48:], 4096)
	return out
}

// initOut answers the INIT of a kernel that offers readahead and flags.
func initOut(minor, readahead, flags uint32) []byte {
	out := make([]byte, 64)
	native.PutUint32(out, majorVersion)
	native.PutUint32(out[4:], min(minor, 31)) // what is spoken here
	native.PutUint32(out[8:], readahead)
	native.PutUint32(out[12:], flags&(initAsyncRead|initMaxPages))
	native.PutUint16(out[16:], 64) // requests in the background, at the most
	native.PutUint16(out[18:], 48) // from here on the kernel holds back
	native.PutUint32(out[20:], 4096)
	native.PutUint32(out[24:], 1)
	native.PutUint16(out[28:], maxPages)
	return out
}

// parseInit reads what a kernel offers.
func parseInit(r request) (minor, readahead, flags uint32, err error) {
	if r.opcode != opInit || len(r.body) < initInBytes {
		return 0, 0, 0, fmt.Errorf("the first request is %d with %d bytes, not INIT", r.opcode, len(r.body))
	}
	major := native.Uint32(r.body)
	minor, readahead, flags = native.Uint32(r.body[4:]), native.Uint32(r.body[8:]), native.Uint32(r.body[12:])
	if major != majorVersion || minor < minMinor {
		return 0, 0, 0, fmt.Errorf("the kernel speaks FUSE %d.%d, needed is %d.%d (Linux 4.20)", major, minor, majorVersion, minMinor)
	}
	return minor, readahead, flags, nil
}

// parseRead reads the body of a READ.
func parseRead(body []byte) (offset int64, size int, err error) {
	if len(body) < readInBytes {
		return 0, 0, fmt.Errorf("a READ of %d bytes is shorter than %d", len(body), readInBytes)
	}
	offset, n := int64(native.Uint64(body[8:])), native.Uint32(body[16:])
	if offset < 0 || n > maxPages*4096 {
		return 0, 0, fmt.Errorf("a READ of %d bytes at %d is not possible", n, offset)
	}
	return offset, int(n), nil
}
