package vmmfake

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sync"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

type page [vmm.PageSize]byte

// Memory is the RAM of a fake machine: what it was restored from, or zeros, and
// over it the pages that were written since. It may be used from any goroutine.
// A write waits while the machine is frozen. A read of what cannot be served
// ends the machine, with cause pager_fault.
type Memory struct {
	size int64
	base *os.File // nil is zeros
	gate *gate
	done chan struct{} // of the machine
	fail func(error)   // ends the machine

	mu      sync.Mutex
	written map[int64]*page // by number
}

// plugMemory gives a machine its memory, and freezes it if it is a restored one.
func (v *vm) plugMemory(from *vmm.Restore) error {
	v.memory = &Memory{
		size: int64(v.spec.MemMiB) << 20, gate: &v.gate, done: v.done, written: map[int64]*page{},
		fail: func(err error) {
			v.end(vmm.Exit{Cause: sandbox.CausePagerFault, Detail: "fake: its memory could not be read: " + err.Error()})
		},
	}
	if from == nil {
		return nil
	}
	v.gate.shut()
	var err error
	if v.memory.base, err = kernel.Duplicate(from.Memory); err != nil {
		return fmt.Errorf("open memory: %w", err)
	}
	return nil
}

func (m *Memory) close() error {
	if m.base == nil {
		return nil
	}
	return m.base.Close()
}

// Size is how much there is, in bytes.
func (m *Memory) Size() int64 { return m.size }

// ReadAt reads what the guest sees.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	n, err := m.read(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		m.fail(err)
	}
	return n, err
}

// WriteAt changes it, when the machine runs.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > m.size || int64(len(p)) > m.size-off {
		return 0, fmt.Errorf("fake: %d bytes at %d are outside a memory of %d bytes", len(p), off, m.size)
	}
	under, err := m.edges(off, off+int64(len(p)))
	if err != nil {
		m.fail(err)
		return 0, err
	}
	m.gate.through(m.done, func() { m.write(p, off, under) })
	return len(p), nil
}

// edges reads what lies under the pages that a write covers in part.
func (m *Memory) edges(from, to int64) (map[int64]*page, error) {
	under := map[int64]*page{}
	for _, at := range []int64{from, to} {
		if at%vmm.PageSize == 0 || from == to {
			continue
		}
		under[at/vmm.PageSize] = new(page)
	}
	for n, p := range under {
		if err := m.readBase(p[:], n*vmm.PageSize); err != nil {
			return nil, err
		}
	}
	return under, nil
}

func (m *Memory) write(p []byte, off int64, under map[int64]*page) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(p) > 0 {
		n, at := off/vmm.PageSize, off%vmm.PageSize
		to := m.written[n]
		if to == nil {
			if to = under[n]; to == nil {
				to = new(page)
			}
			m.written[n] = to
		}
		done := copy(to[at:], p)
		p, off = p[done:], off+int64(done)
	}
}

// read is io.ReaderAt's, whatever the machine does.
func (m *Memory) read(p []byte, off int64) (int, error) {
	if off < 0 || off > m.size {
		return 0, fmt.Errorf("fake: offset %d is outside a memory of %d bytes", off, m.size)
	}
	want := len(p)
	p = p[:min(int64(want), m.size-off)]
	if err := m.readBase(p, off); err != nil {
		return 0, err
	}
	m.lay(p, off)
	if len(p) < want {
		return len(p), io.EOF
	}
	return len(p), nil
}

func (m *Memory) readBase(p []byte, off int64) error {
	if m.base == nil {
		clear(p)
		return nil
	}
	if n, err := m.base.ReadAt(p, off); n < len(p) {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF // the end of the file, not of the memory
		}
		return fmt.Errorf("read memory at %d: %w", off+int64(n), err)
	}
	return nil
}

// lay puts the written pages over what was read.
func (m *Memory) lay(p []byte, off int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for done := 0; done < len(p); {
		n, at := (off+int64(done))/vmm.PageSize, (off+int64(done))%vmm.PageSize
		part := p[done:min(len(p), done+int(vmm.PageSize-at))]
		if from := m.written[n]; from != nil {
			copy(part, from[at:])
		}
		done += len(part)
	}
}

// changed lists the pages that were ever written.
func (m *Memory) changed() []vmm.PageRun {
	m.mu.Lock()
	defer m.mu.Unlock()
	var runs []vmm.PageRun
	for _, n := range slices.Sorted(maps.Keys(m.written)) {
		if last := len(runs) - 1; last >= 0 && runs[last].Start+runs[last].Pages == n {
			runs[last].Pages++
			continue
		}
		runs = append(runs, vmm.PageRun{Start: n, Pages: 1})
	}
	return runs
}
