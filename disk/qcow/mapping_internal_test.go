package qcow

import (
	"bytes"
	"context"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/dormouse-sandbox/dormouse/disk"
)

// made is an overlay with subclusters over a disk of 64 MiB, with the first
// clusters as the bits say.
func made(clusters ...cluster) []byte {
	const bytesOf = 1 << largeClusters
	raw := make([]byte, 3*bytesOf)
	copy(raw, "QFI\xfb\x00\x00\x00\x03")
	binary.BigEndian.PutUint32(raw[20:], largeClusters)
	binary.BigEndian.PutUint64(raw[24:], 64<<20)
	binary.BigEndian.PutUint32(raw[36:], 1)
	binary.BigEndian.PutUint64(raw[40:], bytesOf)
	binary.BigEndian.PutUint64(raw[72:], bitSubcluster)
	binary.BigEndian.PutUint32(raw[100:], headerV3)
	binary.BigEndian.PutUint64(raw[bytesOf:], 2*bytesOf)
	for i, c := range clusters {
		at := 2*bytesOf + 16*i
		binary.BigEndian.PutUint64(raw[at:], uint64(c.at))
		binary.BigEndian.PutUint64(raw[at+8:], uint64(c.zero)<<32|uint64(c.data))
	}
	return raw
}

// mapped reads the tables of any bytes, as far as they are an overlay.
func mapped(raw []byte) (*mapping, []disk.BlockRun, error) {
	const size = 64 << 20
	head := raw[:min(len(raw), maxHeader)]
	if _, err := parseHeader(head); err != nil {
		return nil, nil, err
	}
	g, err := parseGeometry(head)
	if err != nil {
		return nil, nil, err
	}
	m, err := openMapping(bytes.NewReader(raw), g, size)
	if err != nil {
		return nil, nil, err
	}
	set := disk.NewBlocks(size)
	if err := m.mark(context.Background(), set); err != nil {
		return nil, nil, err
	}
	return m, set.Runs(), nil
}

func TestSubclusters(t *testing.T) {
	m, runs, err := mapped(made(cluster{at: 3 << largeClusters, data: 0b101, zero: 0b1000}, cluster{}, cluster{zero: 1 << 31}))
	if err != nil || len(runs) != 3 || runs[0] != (disk.BlockRun{Start: 0, Blocks: 1}) || runs[1] != (disk.BlockRun{Start: 2, Blocks: 2}) || runs[2] != (disk.BlockRun{Start: 95, Blocks: 1}) {
		t.Fatalf("%v, %v", runs, err)
	}
	if m.isEmpty() {
		t.Error("it is empty")
	}
	c, err := m.find(2)
	if err != nil || c != (cluster{3 << largeClusters, 0b101, 0b1000}) {
		t.Errorf("%+v, %v", c, err)
	}
}

// TestCutShort: less than all of the tables is an error, never another disk.
func TestCutShort(t *testing.T) {
	whole := made(cluster{at: 3 << largeClusters, data: 1})
	for n := 0; n < len(whole); n += 1 + n/7 {
		if _, runs, err := mapped(whole[:n]); err == nil {
			t.Errorf("cut at %d: %v", n, runs)
		}
	}
}

// madeSmall is one without subclusters.
func madeSmall() []byte {
	raw := made()[:4<<smallClusters]
	clear(raw[headerV3:])
	binary.BigEndian.PutUint32(raw[20:], smallClusters)
	binary.BigEndian.PutUint32(raw[36:], 32)
	binary.BigEndian.PutUint64(raw[40:], 1<<smallClusters)
	binary.BigEndian.PutUint64(raw[72:], 0)
	binary.BigEndian.PutUint64(raw[1<<smallClusters:], 2<<smallClusters)
	return raw
}

// FuzzMapping writes any bytes over the header and the tables of an overlay: what
// comes of them are tables or an error, and the runs have what can be found.
func FuzzMapping(f *testing.F) {
	f.Add(false, uint16(20), []byte{0, 0, 0, 9}, []byte{}, []byte{})
	f.Add(false, uint16(0), []byte{}, []byte{}, []byte("\x00\x00\x00\x00\x00\x00\x30\x00\x00\x00\x00\x00\x00\x00\x00\x01"))
	f.Add(true, uint16(0), []byte{}, []byte{}, []byte("\x80\x00\x00\x00\x00\x06\x00\x00\x00\x00\x00\x02\x00\x00\x00\x01"))
	f.Add(true, uint16(72), []byte{1}, []byte("\x80\x00\x00\x00\x00\x06\x00\x00"), []byte{})
	f.Fuzz(func(t *testing.T, subclusters bool, at uint16, head, l1, l2 []byte) {
		raw, bits := madeSmall(), smallClusters
		if subclusters {
			raw, bits = made(), largeClusters
		}
		copy(raw[at%headerV3:headerV3], head)
		copy(raw[1<<bits:2<<bits], l1)
		copy(raw[2<<bits:3<<bits], l2)
		m, runs, err := mapped(raw)
		if err != nil {
			return
		}
		in := func(at int64) bool {
			return slices.ContainsFunc(runs, func(r disk.BlockRun) bool { return r.Start <= at && at < r.End() })
		}
		for block := range int64(64) {
			c, err := m.find(block)
			if err != nil {
				t.Fatalf("block %d of good tables: %v", block, err)
			}
			if bit := uint32(1) << (block % m.clusterBlocks()); (c.data|c.zero)&bit != 0 != in(block) {
				t.Fatalf("block %d is in a run: %v; it is %+v", block, in(block), c)
			}
		}
	})
}
