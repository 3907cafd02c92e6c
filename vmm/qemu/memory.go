package qemu

import (
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// A guest's memory is one private mapping in QEMU's process: anonymous if the
// guest was booted, of Restore.Memory if it was restored. Guest-physical
// addresses have a hole below 4 GiB, the mapping has none. What the guest changed
// are the pages that are the process's own; they are read from outside, so QEMU
// need not help, and whoever reads need not have started it.

// Changed lists the pages that are the process's own.
func (m *machine) Changed(ctx context.Context) ([]vmm.PageRun, error) {
	runs, err := m.changed(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the changed memory of qemu: %w", err)
	}
	return runs, nil
}

func (m *machine) changed(ctx context.Context) ([]vmm.PageRun, error) {
	if err := m.mustBeFrozen(ctx); err != nil {
		return nil, err
	}
	ram, err := m.ram(ctx)
	if err != nil {
		return nil, err
	}
	if err := m.checkMapping(ram); err != nil {
		return nil, err
	}
	pages, err := kernel.OwnPages(m.record.PID, ram)
	if err != nil {
		return nil, err
	}
	runs := make([]vmm.PageRun, len(pages))
	for i, p := range pages {
		runs[i] = vmm.PageRun{Start: int64(p.Start-ram.Start) / vmm.PageSize, Pages: int64(p.End-p.Start) / vmm.PageSize}
	}
	return runs, m.stillFrozen(ctx)
}

// ReadMemory reads from the process.
func (m *machine) ReadMemory(p []byte, off int64) error {
	err := m.readFrozen(context.Background(), p, func(ram kernel.Range) ([]kernel.Range, error) {
		r, err := part(ram, off, int64(len(p)))
		return []kernel.Range{r}, err
	})
	if err != nil {
		return fmt.Errorf("read %d bytes of memory at %d: %w", len(p), off, err)
	}
	return nil
}

// ReadPages reads from the process, in as many pieces at a time as the kernel takes.
func (m *machine) ReadPages(ctx context.Context, p []byte, runs []vmm.PageRun) error {
	err := m.readFrozen(ctx, p, func(ram kernel.Range) ([]kernel.Range, error) {
		ranges := make([]kernel.Range, len(runs))
		for i, run := range runs {
			var err error
			if ranges[i], err = part(ram, run.Start*vmm.PageSize, run.Pages*vmm.PageSize); err != nil {
				return nil, err
			}
		}
		return ranges, nil
	})
	if err != nil {
		return fmt.Errorf("read %d runs of pages: %w", len(runs), err)
	}
	return nil
}

// readFrozen fills p with ranges of the process's memory.
func (m *machine) readFrozen(ctx context.Context, p []byte, choose func(ram kernel.Range) ([]kernel.Range, error)) error {
	ram, err := m.ram(ctx)
	if err != nil {
		return err
	}
	ranges, err := choose(ram)
	if err != nil {
		return err
	}
	if err := kernel.ReadProcess(m.record.PID, p, ranges); err != nil {
		return err
	}
	return m.stillFrozen(ctx)
}

// part is where so many bytes of the guest's memory are.
func part(ram kernel.Range, off, n int64) (kernel.Range, error) {
	size := int64(ram.End - ram.Start)
	if off < 0 || n < 0 || off > size || n > size-off {
		return kernel.Range{}, fmt.Errorf("%d bytes at %d of a memory of %d: %w", n, off, size, io.ErrUnexpectedEOF)
	}
	return kernel.Range{Start: ram.Start + uint64(off), End: ram.Start + uint64(off+n)}, nil
}

// mustBeFrozen refuses a VM that runs.
func (m *machine) mustBeFrozen(ctx context.Context) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	state, err := m.state(ctx)
	if err != nil {
		return err
	}
	if state != frozen {
		return sandbox.Errorf(sandbox.KindConflict, "the VM is %s, not frozen", state)
	}
	return nil
}

// bounded gives a question a limit whose caller has none.
func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, stateLimit)
}

// frozen is the run state of a VM that was stopped, or restored and not yet run.
const frozen = "paused"

// stillFrozen asks after the memory was looked at, which is the only time when
// the answer says something: of a process that the kernel is ending for want of
// memory, pages are taken away while others look on, and look untouched then. One
// that answers was not being ended.
func (m *machine) stillFrozen(ctx context.Context) error { return m.mustBeFrozen(ctx) }

// ram is where the guest's memory is in the process. It never moves.
func (m *machine) ram(ctx context.Context) (kernel.Range, error) {
	m.mu.Lock()
	at := m.ramAt
	m.mu.Unlock()
	if at.End != 0 {
		return at, nil
	}
	at, err := m.findRAM(ctx)
	if err != nil {
		return kernel.Range{}, fmt.Errorf("find the memory: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ramAt = at
	return at, nil
}

var hostAddress = regexp.MustCompile(`^Host virtual address for 0x0 \(mem\) is 0x([0-9a-f]+)\s*$`)

// findRAM asks QEMU where it has the guest's first byte, and how many there are.
func (m *machine) findRAM(ctx context.Context) (kernel.Range, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	var said string
	command := map[string]any{"command-line": "gpa2hva 0"}
	if err := m.monitor.run(ctx, "human-monitor-command", command, &said); err != nil {
		return kernel.Range{}, err
	}
	found := hostAddress.FindStringSubmatch(said)
	if found == nil {
		return kernel.Range{}, fmt.Errorf("qemu says %.200q", said)
	}
	start, err := strconv.ParseUint(found[1], 16, 64)
	if err != nil {
		return kernel.Range{}, err
	}
	var memory struct {
		Base uint64 `json:"base-memory"`
	}
	if err := m.monitor.run(ctx, "query-memory-size-summary", nil, &memory); err != nil {
		return kernel.Range{}, err
	}
	page := uint64(os.Getpagesize())
	if memory.Base == 0 || memory.Base%page != 0 || start%page != 0 {
		return kernel.Range{}, fmt.Errorf("qemu says that %d bytes are at %#x", memory.Base, start)
	}
	return kernel.Range{Start: start, End: start + memory.Base}, nil
}

// checkMapping makes sure that the memory is what it should be: private, whole,
// and of one file in its order, or of none. It may be in pieces.
func (m *machine) checkMapping(ram kernel.Range) error {
	pieces, err := kernel.Mappings(m.record.PID, ram)
	if err != nil {
		return err
	}
	at := ram.Start
	for _, p := range pieces {
		if at == ram.Start && p.Start < at { // anonymous memory beside it may have been joined with it
			p.Start, p.Offset = at, p.Offset+at-p.Start
		}
		switch {
		case p.Start != at:
			return fmt.Errorf("nothing is mapped from %#x to %#x", at, p.Start)
		case len(p.Perms) != 4 || p.Perms[3] != 'p':
			return fmt.Errorf("the mapping at %#x is %s, not private", p.Start, p.Perms)
		case p.Inode != pieces[0].Inode || p.Device != pieces[0].Device:
			return fmt.Errorf("two files are mapped, the second at %#x", p.Start)
		case p.Inode != 0 && p.Offset != p.Start-ram.Start:
			return fmt.Errorf("the file is mapped at %#x from its byte %d on", p.Start, p.Offset)
		}
		at = p.End
	}
	if at < ram.End {
		return fmt.Errorf("nothing is mapped from %#x on", at)
	}
	return nil
}
