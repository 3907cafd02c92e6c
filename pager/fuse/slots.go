package fuse

import (
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// slotBytes is the least that the kernel wants to have room for in a read
	// (FUSE_MIN_READ_BUFFER).
	slotBytes = 8192
	// Workers is how many requests are worked on at the same time.
	Workers = 16
)

// Slots is memory that requests are read into, one slot a worker. It outlives the
// process: whoever keeps its file hands it to the next server.
type Slots struct{ mem []byte }

// NewSlots makes the file.
func NewSlots() (*os.File, error) {
	fd, err := unix.MemfdCreate("dormouse-fuse-slots", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make memory for requests: %w", err)
	}
	f := os.NewFile(uintptr(fd), "slots")
	if err := f.Truncate(Workers * slotBytes); err != nil {
		_ = f.Close() // nothing is in it
		return nil, fmt.Errorf("make memory for requests: %w", err)
	}
	return f, nil
}

// mapSlots maps the file; the caller unmaps it.
func mapSlots(f *os.File) (*Slots, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != Workers*slotBytes {
		return nil, fmt.Errorf("memory for requests has %d bytes, not %d", info.Size(), Workers*slotBytes)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, Workers*slotBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map memory for requests: %w", err)
	}
	// Every page is there from now on: the kernel could not put a request into one
	// that it had to make while this process is being killed.
	for i := 0; i < len(mem); i += os.Getpagesize() {
		p := (*atomic.Uint32)(unsafe.Pointer(&mem[i]))
		p.CompareAndSwap(0, 0)
	}
	_ = unix.Mlock(mem) // where that is not allowed, swap is not likely to take what is used all the time
	return &Slots{mem}, nil
}

func (s *Slots) unmap() error { return unix.Munmap(s.mem) }

// slot is the memory of one worker.
func (s *Slots) slot(i int) []byte { return s.mem[i*slotBytes:][:slotBytes:slotBytes] }

// empty marks a slot as having no request that waits for an answer. The unique
// number of a request is never 0.
func empty(slot []byte) { native.PutUint64(slot[8:], 0) }

// taken is the request that a dead server left in a slot, if there is one.
func taken(slot []byte) (request, bool) {
	if native.Uint64(slot[8:]) == 0 {
		return request{}, false
	}
	r, err := parseRequest(slot)
	return r, err == nil
}
