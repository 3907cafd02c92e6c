package qcow

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/dormouse-sandbox/dormouse/disk"
)

// An overlay says of every block of the guest's where it is (docs/interop/qcow2.txt
// in QEMU's source): the L1 table has the places of L2 tables, an L2 table has an
// entry for each cluster. With subclusters an entry has two bits for each block:
// it is here, or it is zero. A VMM wrote all of it and may have written anything,
// so nothing is read that is not checked, and only the shapes are known in which
// Create makes overlays.
const (
	offsetMask    = 0x00fffffffffffe00 // of an entry: where in the file
	flagZero      = 1 << 0             // of an L2 entry without subclusters
	flagCompress  = 1 << 62
	l1EntryBytes  = 8
	maxL1         = 1 << 20 // of a disk of 2 TiB with small clusters
	smallClusters = 12      // bits
	largeClusters = 17      // with subclusters
	bitDirty      = 1 << 0  // reference counts may be wrong; the tables are not
	bitSubcluster = 1 << 4
)

// geometry is how the tables of an overlay are laid out.
type geometry struct {
	clusterBits uint
	subclusters bool
	l1At        int64
	l1Size      int64
}

// parseGeometry reads the part of a header that parseHeader does not.
func parseGeometry(data []byte) (geometry, error) {
	if len(data) < headerV3 {
		return geometry{}, errors.New("not a qcow2 file")
	}
	u32 := func(at int) uint32 { return binary.BigEndian.Uint32(data[at:]) }
	u64 := func(at int) uint64 { return binary.BigEndian.Uint64(data[at:]) }
	features := u64(72)
	g := geometry{subclusters: features&bitSubcluster != 0, l1Size: int64(u32(36))}
	if other := features &^ (bitDirty | bitSubcluster); other != 0 || u32(32) != 0 {
		return geometry{}, fmt.Errorf("qcow2 features %#x and encryption %d are not known", features, u32(32))
	}
	want := uint32(smallClusters)
	if g.subclusters {
		want = largeClusters
	}
	if bits := u32(20); bits != want {
		return geometry{}, fmt.Errorf("clusters of 2^%d bytes, not 2^%d", bits, want)
	}
	g.clusterBits = uint(want)
	at := u64(40)
	if at == 0 || at&offsetMask != at || int64(at)%g.clusterBytes() != 0 || g.l1Size > maxL1 {
		return geometry{}, fmt.Errorf("an L1 table of %d entries at %#x is not possible", g.l1Size, at)
	}
	g.l1At = int64(at)
	return g, nil
}

func (g geometry) clusterBytes() int64 { return 1 << g.clusterBits }

// clusterBlocks is how many blocks a cluster has.
func (g geometry) clusterBlocks() int64 { return g.clusterBytes() / disk.BlockBytes }

func (g geometry) entryBytes() int64 {
	if g.subclusters {
		return 16
	}
	return 8
}

// tableBlocks is how many blocks an L2 table tells of.
func (g geometry) tableBlocks() int64 {
	return g.clusterBytes() / g.entryBytes() * g.clusterBlocks()
}

// cluster is an entry of an L2 table: where in the file the cluster is, and, with
// a bit for each block, which of it is there and which is zero. The others are
// those of the backing file.
type cluster struct {
	at         int64
	data, zero uint32
}

// entry reads an entry of an L2 table.
func (g geometry) entry(raw []byte) (c cluster, err error) {
	e := binary.BigEndian.Uint64(raw)
	c.at = int64(e & offsetMask)
	switch {
	case e&flagCompress != 0:
		return cluster{}, errors.New("a compressed cluster, which no guest writes")
	case c.at%g.clusterBytes() != 0:
		return cluster{}, fmt.Errorf("a cluster at %#x, which is no multiple of its size", c.at)
	case !g.subclusters && e&flagZero != 0:
		c.zero = 1
	case !g.subclusters && c.at != 0:
		c.data = 1
	case g.subclusters:
		bits := binary.BigEndian.Uint64(raw[8:])
		c.data, c.zero = uint32(bits), uint32(bits>>32)
	}
	if c.data&c.zero != 0 || c.data != 0 && c.at == 0 {
		return cluster{}, fmt.Errorf("a cluster at %#x with the blocks %#x, and zeros in %#x, is not possible", c.at, c.data, c.zero)
	}
	return c, nil
}

// mapping is the tables of one overlay, as long as nobody writes to it. It may be
// used from any goroutine.
type mapping struct {
	file io.ReaderAt
	geometry
	l1 []int64 // where the L2 tables are; 0 for none

	mu     sync.Mutex // guards the table that was looked at last
	number int64
	last   []byte
}

// openMapping reads the L1 table of an overlay of so many bytes.
func openMapping(file io.ReaderAt, g geometry, diskBytes int64) (*mapping, error) {
	span := g.tableBlocks() * disk.BlockBytes
	need := (diskBytes + span - 1) / span
	if g.l1Size < need {
		return nil, fmt.Errorf("an L1 table of %d entries, the disk needs %d", g.l1Size, need)
	}
	raw := make([]byte, need*l1EntryBytes)
	if _, err := file.ReadAt(raw, g.l1At); err != nil {
		return nil, fmt.Errorf("read L1 table: %w", noEnd(err))
	}
	m := &mapping{file: file, geometry: g, l1: make([]int64, need), number: -1}
	for i := range m.l1 {
		at := int64(binary.BigEndian.Uint64(raw[i*l1EntryBytes:]) & offsetMask)
		if at%g.clusterBytes() != 0 {
			return nil, fmt.Errorf("an L2 table at %#x, which is no multiple of a cluster's size", at)
		}
		m.l1[i] = at
	}
	return m, nil
}

// noEnd says of a file that ends too early what that means.
func noEnd(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// isEmpty reports whether nothing was ever written to it.
func (m *mapping) isEmpty() bool {
	for _, at := range m.l1 {
		if at != 0 {
			return false
		}
	}
	return true
}

// table reads the L2 table of that number, which there is; the caller holds mu.
func (m *mapping) table(number int64) ([]byte, error) {
	if m.number == number {
		return m.last, nil
	}
	if m.last == nil {
		m.last = make([]byte, m.clusterBytes())
	}
	m.number = -1
	if _, err := m.file.ReadAt(m.last, m.l1[number]); err != nil {
		return nil, fmt.Errorf("read L2 table %d: %w", number, noEnd(err))
	}
	m.number = number
	return m.last, nil
}

// find is the cluster that a block lies in; one of nothing where it is the backing
// file's.
func (m *mapping) find(block int64) (cluster, error) {
	number := block / m.tableBlocks()
	if m.l1[number] == 0 {
		return cluster{}, nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	table, err := m.table(number)
	if err != nil {
		return cluster{}, err
	}
	index := block % m.tableBlocks() / m.clusterBlocks()
	return m.entry(table[index*m.entryBytes():])
}

// mark adds every block that the overlay has to a set.
func (m *mapping) mark(ctx context.Context, set *disk.Blocks) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for number, at := range m.l1 {
		if at == 0 {
			continue
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		table, err := m.table(int64(number))
		if err != nil {
			return err
		}
		if err := m.markTable(table, int64(number)*m.tableBlocks(), set); err != nil {
			return fmt.Errorf("L2 table %d: %w", number, err)
		}
	}
	return nil
}

func (m *mapping) markTable(table []byte, start int64, set *disk.Blocks) error {
	for ; len(table) > 0; start, table = start+m.clusterBlocks(), table[m.entryBytes():] {
		c, err := m.entry(table)
		if err != nil {
			return err
		}
		have := c.data | c.zero
		for i := int64(0); i < m.clusterBlocks() && have>>i != 0; i++ {
			if have>>i&1 != 0 {
				set.Add(start+i, 1)
			}
		}
	}
	return nil
}
