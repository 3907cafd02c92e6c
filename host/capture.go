package host

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// run is neighbouring blocks of a memory or a disk.
type run struct{ start, blocks int64 }

// changes are the blocks of a memory or a disk that may have changed, and their
// bytes one after another.
type changes struct {
	runs  []run
	bytes io.Reader
}

func (c changes) blocks() (n int64) {
	for _, r := range c.runs {
		n += r.blocks
	}
	return n
}

// moment is all that was asked of a VM while it stood still. It must be closed.
type moment struct {
	devices []byte
	console []byte // the end of what the guest has printed
	memory  changes
	disk    changes
	guest   sandbox.ID // who the guest was
	held    []io.Closer
}

// Close gives back what was held open.
func (m *moment) Close() error {
	var errs []error
	for _, c := range m.held {
		errs = append(errs, c.Close())
	}
	m.held = nil
	return errors.Join(errs...)
}

// chunkBytes is how much is read and compared at once.
const chunkBytes = 1 << 20

// sectionReader reads runs from something that can be read anywhere.
type sectionReader struct {
	readAt func(p []byte, off int64) error
	runs   []run
}

func newSectionReader(readAt func(p []byte, off int64) error, runs []run) *sectionReader {
	return &sectionReader{readAt: readAt, runs: slices.Clone(runs)}
}

// Read gives bytes of one run, and goes on to the next.
func (r *sectionReader) Read(p []byte) (int, error) {
	for len(r.runs) > 0 && r.runs[0].blocks == 0 {
		r.runs = r.runs[1:]
	}
	if len(r.runs) == 0 {
		return 0, io.EOF
	}
	first := &r.runs[0]
	n := min(int64(len(p)), chunkBytes, first.blocks*snapshot.BlockBytes) &^ (snapshot.BlockBytes - 1)
	if n == 0 {
		return 0, io.ErrShortBuffer
	}
	if err := r.readAt(p[:n], first.start*snapshot.BlockBytes); err != nil {
		return 0, err
	}
	first.start += n / snapshot.BlockBytes
	first.blocks -= n / snapshot.BlockBytes
	return int(n), nil
}

// look asks a frozen VM for the state of its devices and for what has changed.
// Its memory can be read as long as it stays frozen; the disk is what diskNow
// gives.
func (m *machine) look(ctx context.Context, watch *stopwatch, diskNow func(context.Context) (disk.Changes, error)) (_ moment, err error) {
	var now moment
	if err := fault.Point(ctx, "host/capture/devices"); err != nil {
		return now, err
	}
	if now.devices, err = m.vm.Save(ctx); err != nil {
		return now, fmt.Errorf("save devices: %w", err)
	}
	now.console = m.printed()
	watch.phase(sandbox.PhaseDeviceState)
	if err := fault.Point(ctx, "host/capture/scan"); err != nil {
		return now, err
	}
	pages, err := m.vm.Changed(ctx)
	if err != nil {
		return now, fmt.Errorf("find changed memory: %w", err)
	}
	for _, p := range pages {
		now.memory.runs = append(now.memory.runs, run{p.Start, p.Pages})
	}
	now.memory.bytes = newSectionReader(m.vm.ReadMemory, now.memory.runs)
	blocks, err := diskNow(ctx)
	if err != nil {
		return now, fmt.Errorf("find changed disk blocks: %w", err)
	}
	now.held = append(now.held, blocks)
	for _, b := range blocks.Runs() {
		now.disk.runs = append(now.disk.runs, run{b.Start, b.Blocks})
	}
	now.disk.bytes = newSectionReader(func(p []byte, off int64) error { return readAll(blocks, p, off) }, now.disk.runs)
	watch.phase(sandbox.PhaseDirtyScan)
	return now, nil
}

// printedKept is how much of a console goes on with a VM, in bytes: a boot prints
// less.
const printedKept = 64 << 10

// printed is the end of what the guest has printed. A log that cannot be read is no
// reason not to save a VM.
func (m *machine) printed() []byte {
	data, _, err := m.vm.Console(-printedKept, printedKept)
	if err != nil {
		m.a.log.Warn("console log not kept with the saved VM", "sandbox", m.id, "err", err)
		return nil
	}
	return bytes.ReplaceAll(data, []byte{0}, nil) // which a log has where nothing was written
}

// readAll reads all of p. What lies behind the end of a disk of odd size is zero.
func readAll(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if errors.Is(err, io.EOF) && n > len(p)-snapshot.BlockBytes {
		clear(p[n:])
		return nil
	}
	return err
}

// room says whether there is space to keep a moment, before anything is written.
func (a *Agent) room(now moment) error {
	need := (now.memory.blocks()+now.disk.blocks())*snapshot.BlockBytes + int64(len(now.devices)) + 1<<20
	free, err := a.cfg.FreeBytes(a.cfg.Dir)
	if err != nil {
		return err
	}
	if have := free - int64(a.cfg.ReserveMiB)<<20; need > have {
		return sandbox.Errorf(sandbox.KindNoSpace,
			"up to %d MiB have changed, and the host has %d MiB of free disk, of which it keeps %d", need>>20, free>>20, a.cfg.ReserveMiB)
	}
	return nil
}

// spool copies changes into a file without a name, so that the VM can run on.
func (a *Agent) spool(ctx context.Context, now *moment, c *changes) error {
	if err := fault.Point(ctx, "host/capture/copy"); err != nil {
		return err
	}
	fd, err := unix.Open(filepath.Join(a.cfg.Dir, "sandboxes"), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("make a file for the copy: %w", err)
	}
	f := os.NewFile(uintptr(fd), "copy of what has changed")
	now.held = append(now.held, f)
	buf := make([]byte, chunkBytes)
	_, err = io.CopyBuffer(onlyWriter{f}, onlyReader{c.bytes}, buf)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return fmt.Errorf("copy what has changed: %w", sandbox.NoSpace(err))
	}
	c.bytes = f
	return nil
}

// onlyReader and onlyWriter hide what io.CopyBuffer would use instead of the
// buffer.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)

// keep makes a moment durable and returns it as a point, pinned. Blocks that are
// what they were are dropped.
func (a *Agent) keep(ctx context.Context, e entry, now moment, watch *stopwatch) (_ *point, release func(), err error) {
	var pins []*snapshot.Pin
	unpin := func() {
		for _, p := range pins {
			p.Release()
		}
	}
	defer func() {
		if err != nil {
			unpin()
		}
	}()
	p := e.pointNow(a.cfg.VMM.Capabilities().Compat, now.guest)
	p.At, p.Above = watch.stoodAt, a.descend(e.Last)
	for _, part := range []struct {
		kind   snapshot.Kind
		parent snapshot.Digest
		blocks int64
		what   changes
		digest *snapshot.Digest
	}{
		{snapshot.Memory, e.parentMemory(), int64(e.Spec.MemMiB) << 20 / snapshot.BlockBytes, now.memory, &p.Memory},
		{snapshot.Disk, e.parentDisk(), 0, now.disk, &p.Disk},
	} {
		if err := fault.Point(ctx, "host/capture/"+part.kind.String()); err != nil {
			return nil, nil, err
		}
		pin, stats, err := a.diff(ctx, part.kind, part.parent, part.blocks, part.what, watch)
		if err != nil {
			return nil, nil, fmt.Errorf("keep %s: %w", part.kind, err)
		}
		pins = append(pins, pin)
		*part.digest = pin.Digest
		p.Written += stats.Bytes
		watch.count(part.kind, stats)
	}
	if err := fault.Point(ctx, "host/capture/objects"); err != nil {
		return nil, nil, err
	}
	for _, object := range []struct {
		what   string
		data   []byte
		digest *snapshot.Digest
	}{{"devices", now.devices, &p.Devices}, {"console", now.console, &p.Console}} {
		if len(object.data) == 0 {
			continue
		}
		pin, err := a.cfg.Snapshots.WriteObject(ctx, object.data)
		if err != nil {
			return nil, nil, fmt.Errorf("keep %s: %w", object.what, err)
		}
		pins = append(pins, pin)
		*object.digest = pin.Digest
		p.Written += int64(len(object.data))
	}
	if err := a.measure(p); err != nil {
		return nil, nil, err
	}
	watch.phase(sandbox.PhasePublish)
	return p, unpin, nil
}

// diff publishes the next generation of an image, or the first one.
func (a *Agent) diff(ctx context.Context, kind snapshot.Kind, parent snapshot.Digest, blocks int64, c changes, watch *stopwatch) (_ *snapshot.Pin, _ snapshot.Stats, err error) {
	var b *snapshot.Builder
	if parent.IsZero() {
		if b, err = a.cfg.Snapshots.First(kind, blocks); err != nil {
			return nil, snapshot.Stats{}, err
		}
	} else {
		image, err := a.cfg.Snapshots.Image(parent)
		if err != nil {
			return nil, snapshot.Stats{}, err
		}
		defer func() { _ = image.Close() }() // it was only read
		b = a.cfg.Snapshots.Next(image)
	}
	defer func() { err = errors.Join(err, b.Abandon()) }()
	if err := c.put(ctx, b); err != nil {
		return nil, snapshot.Stats{}, err
	}
	watch.phase(sandbox.PhaseCompare)
	pin, err := b.Publish(ctx)
	watch.phase(sandbox.PhasePublish)
	return pin, b.Stats(), err
}

// put hands all changes to a builder.
func (c changes) put(ctx context.Context, b *snapshot.Builder) error {
	buf := make([]byte, chunkBytes)
	in := bufio.NewReaderSize(c.bytes, chunkBytes)
	for _, r := range c.runs {
		for done := int64(0); done < r.blocks; {
			n := min(r.blocks-done, chunkBytes/snapshot.BlockBytes)
			part := buf[:n*snapshot.BlockBytes]
			if _, err := io.ReadFull(in, part); err != nil {
				return fmt.Errorf("read what has changed: %w", err)
			}
			if err := b.Put(ctx, r.start+done, part); err != nil {
				return err
			}
			done += n
		}
	}
	return nil
}
