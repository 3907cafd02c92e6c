package dm

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// readAny reads a block of a loop device or of a mapped device.
func (f *fake) readAny(dev uint64, block []byte, at int64) error {
	if unix.Major(dev) == loopMajor {
		l, ok := f.loops[unix.Minor(dev)]
		if !ok {
			return unix.EIO
		}
		n, err := l.file.ReadAt(block, at)
		if n < len(block) && (err != io.EOF || at >= l.size) {
			return unix.EIO
		}
		return nil
	}
	d := f.byNumber(dev)
	if d == nil || d.live == nil {
		return unix.EIO
	}
	return f.readBlock(d, block, at)
}

func (f *fake) readBlock(d *fakeDevice, block []byte, at int64) error {
	for _, row := range d.live.rows {
		start, end := int64(row.start)*sector, int64(row.start+row.length)*sector
		if at < start || at >= end {
			continue
		}
		args := strings.Fields(row.params)
		switch row.kind {
		case "zero":
			clear(block)
			return nil
		case "linear":
			dev, _, err := f.device(args[0])
			if err != nil {
				return err
			}
			offset, err := strconv.ParseInt(args[1], 10, 64)
			if err != nil {
				return err
			}
			return f.readAny(dev, block, at-start+offset*sector)
		case "verity":
			return f.readVerity(d, args, block, at)
		case "snapshot":
			return f.readSnapshot(d, args, block, at)
		}
	}
	return unix.EIO
}

// readVerity checks a block as dm-verity does.
func (f *fake) readVerity(d *fakeDevice, args []string, block []byte, at int64) error {
	data, _, err := f.device(args[1])
	if err != nil {
		return err
	}
	hash, _, err := f.device(args[2])
	if err != nil {
		return err
	}
	if err := f.readAny(data, block, at); err != nil {
		return err
	}
	blocks, err := strconv.ParseInt(args[5], 10, 64)
	if err != nil {
		return err
	}
	root, err := hex.DecodeString(args[8])
	if err != nil {
		return err
	}
	want, index := digest(root), at/blockBytes
	first := int64(1) // the block of the level, counted in the tree's file
	sizes := levels(blocks)
	for level := len(sizes) - 1; level >= 0; level-- {
		below := index
		for range level {
			below /= hashesPerBlock
		}
		node := make([]byte, blockBytes)
		if err := f.readAny(hash, node, (first+below/hashesPerBlock)*blockBytes); err != nil {
			return err
		}
		if sha256.Sum256(node) != want {
			d.corrupt = true
			return unix.EIO
		}
		want = digest(node[below%hashesPerBlock*digestBytes:][:digestBytes])
		first += sizes[level]
	}
	if want == zeroDigest { // ignore_zero_blocks
		clear(block)
		return nil
	}
	if sha256.Sum256(block) != want {
		d.corrupt = true
		return unix.EIO
	}
	return nil
}

func (f *fake) readSnapshot(d *fakeDevice, args []string, block []byte, at int64) error {
	s := d.live.store
	if s == nil || !s.valid {
		return unix.EIO
	}
	if chunk, ok := s.moved[at/chunkBytes]; ok {
		_, err := s.file.ReadAt(block, chunk*chunkBytes)
		return err
	}
	origin, _, err := f.device(args[0])
	if err != nil {
		return err
	}
	return f.readAny(origin, block, at)
}

func (f *fake) writeBlock(d *fakeDevice, block []byte, at int64) error {
	if d.live.readOnly || d.live.store == nil {
		return unix.EPERM
	}
	if at >= int64(d.live.sectors())*sector {
		return unix.ENOSPC
	}
	return d.live.store.write(at/chunkBytes, block)
}

// fakeStore is a persistent exception store (dm-snap-persistent.c in Linux): in a
// file of the same format, so that it outlives a reboot.
type fakeStore struct {
	file    *os.File
	chunks  int64
	valid   bool
	moved   map[int64]int64
	next    int64 // free chunk
	entries int64
}

const snapMagic = 0x70416e53 // "SnAp"

func openStore(file *os.File, size int64) (*fakeStore, error) {
	s := &fakeStore{file: file, chunks: size / chunkBytes, valid: true, moved: map[int64]int64{}, next: 2}
	head := make([]byte, chunkBytes)
	if _, err := file.ReadAt(head, 0); err != nil {
		return nil, fmt.Errorf("read header: %w", unix.EINVAL)
	}
	switch magic := binary.LittleEndian.Uint32(head); magic {
	case 0:
		return s, s.begin()
	case snapMagic:
	default:
		return nil, fmt.Errorf("invalid or corrupt snapshot: %w", unix.EINVAL)
	}
	if s.valid = binary.LittleEndian.Uint32(head[4:]) != 0; !s.valid {
		return s, nil
	}
	return s, s.load()
}

func (s *fakeStore) header() error {
	head := make([]byte, chunkBytes)
	binary.LittleEndian.PutUint32(head, snapMagic)
	if s.valid {
		binary.LittleEndian.PutUint32(head[4:], 1)
	}
	binary.LittleEndian.PutUint32(head[8:], 1)
	binary.LittleEndian.PutUint32(head[12:], chunkSectors)
	_, err := s.file.WriteAt(head, 0)
	return err
}

func (s *fakeStore) begin() error {
	if err := s.header(); err != nil {
		return err
	}
	return s.clearArea(0)
}

func (s *fakeStore) clearArea(area int64) error {
	if headerChunks+area*(perArea+1) >= s.chunks {
		return unix.EIO
	}
	_, err := s.file.WriteAt(make([]byte, chunkBytes), (headerChunks+area*(perArea+1))*chunkBytes)
	return err
}

func (s *fakeStore) load() error {
	for area := int64(0); ; area++ {
		at := headerChunks + area*(perArea+1)
		meta := make([]byte, chunkBytes)
		if at >= s.chunks {
			return nil
		}
		if _, err := s.file.ReadAt(meta, at*chunkBytes); err != nil {
			return err
		}
		for i := range perArea {
			from := int64(binary.LittleEndian.Uint64(meta[16*i:]))
			to := int64(binary.LittleEndian.Uint64(meta[16*i+8:]))
			if to == 0 {
				return nil
			}
			s.moved[from], s.entries = to, s.entries+1
			s.next = max(s.next, to+1)
			s.skip()
		}
	}
}

// skip steps over a chunk of metadata.
func (s *fakeStore) skip() {
	if s.next%(perArea+1) == headerChunks {
		s.next++
	}
}

func (s *fakeStore) write(chunk int64, block []byte) error {
	if !s.valid {
		return unix.EIO
	}
	to, ok := s.moved[chunk]
	if ok {
		_, err := s.file.WriteAt(block, to*chunkBytes)
		return err
	}
	to = s.next
	if s.chunks < to+1 {
		return s.invalidate()
	}
	s.next++
	s.skip()
	if _, err := s.file.WriteAt(block, to*chunkBytes); err != nil {
		return s.invalidate()
	}
	entry := make([]byte, 16)
	binary.LittleEndian.PutUint64(entry, uint64(chunk))
	binary.LittleEndian.PutUint64(entry[8:], uint64(to))
	area, index := s.entries/perArea, s.entries%perArea
	if _, err := s.file.WriteAt(entry, (headerChunks+area*(perArea+1))*chunkBytes+16*index); err != nil {
		return s.invalidate()
	}
	if index == perArea-1 {
		if err := s.clearArea(area + 1); err != nil {
			return s.invalidate()
		}
	}
	s.moved[chunk], s.entries = to, s.entries+1
	return nil
}

// invalidate is what every error of a copy-on-write file leads to, for ever.
func (s *fakeStore) invalidate() error {
	s.valid = false
	_ = s.header() // as in the kernel, nobody hears of it
	return unix.EIO
}

func (s *fakeStore) status() string {
	if !s.valid {
		return "Invalid"
	}
	areas := s.entries/perArea + 1
	return fmt.Sprintf("%d/%d %d", s.next*chunkSectors, s.chunks*chunkSectors, (headerChunks+areas)*chunkSectors)
}
