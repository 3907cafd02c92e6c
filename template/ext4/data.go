package ext4

import (
	"cmp"
	"io"
	"slices"
)

// extent is a run of blocks of a file. Hole is one that was never written.
type extent struct {
	logical, physical uint64
	count             uint64
	hole              bool
}

const (
	extentMagic = 0xF30A
	maxDepth    = 5
	maxExtents  = 1 << 20 // of one file
	maxNodes    = 1 << 12 // of its tree
	unwritten   = 32768   // longer ones are shorter by it, and zeros
)

// extents lists where a file's data is, in order.
func (f *FS) extents(i inode) ([]extent, error) {
	if i.flags()&flagRefused != 0 {
		return nil, invalid("inode %d is of a kind that is not read here: flags %#x", i.number, i.flags())
	}
	if i.flags()&flagExtents == 0 {
		return nil, invalid("inode %d has a map of blocks, not extents", i.number)
	}
	t := extentTree{f: f, i: i}
	if err := t.node(i.content(), maxDepth); err != nil {
		return nil, err
	}
	out := t.found
	slices.SortFunc(out, func(a, b extent) int { return cmp.Compare(a.logical, b.logical) })
	for n := 1; n < len(out); n++ {
		if out[n].logical < out[n-1].logical+out[n-1].count {
			return nil, invalid("inode %d has overlapping extents", i.number)
		}
	}
	return out, nil
}

// extentTree is one that is being read. Its nodes are counted: one that many
// lead to would be read as often.
type extentTree struct {
	f     *FS
	i     inode
	nodes int
	found []extent
}

func (t *extentTree) node(b []byte, depth int) error {
	entries, level := int(le.Uint16(b[2:])), int(le.Uint16(b[6:]))
	if t.nodes++; le.Uint16(b) != extentMagic || 12+entries*12 > len(b) || level > depth || t.nodes > maxNodes {
		return invalid("inode %d has a broken tree of extents", t.i.number)
	}
	for n := range entries {
		e := b[12+n*12:]
		if level > 0 {
			child, err := t.f.block(uint64(le.Uint32(e[4:])) | uint64(le.Uint16(e[8:]))<<32)
			if err == nil {
				err = t.node(child, level-1)
			}
			if err != nil {
				return err
			}
		} else if err := t.leaf(e); err != nil {
			return err
		}
	}
	return nil
}

func (t *extentTree) leaf(e []byte) error {
	x := extent{
		logical: uint64(le.Uint32(e)), count: uint64(le.Uint16(e[4:])),
		physical: uint64(le.Uint32(e[8:])) | uint64(le.Uint16(e[6:]))<<32,
	}
	if x.count > unwritten {
		x.count, x.hole = x.count-unwritten, true
	}
	if x.physical == 0 || x.physical+x.count > t.f.blocks {
		return invalid("inode %d has blocks that are not there", t.i.number)
	}
	if t.found = append(t.found, x); len(t.found) > maxExtents {
		return invalid("inode %d has more than %d extents", t.i.number, maxExtents)
	}
	return nil
}

// open reads a file's bytes, holes as zeros.
func (f *FS) open(i inode) (io.Reader, int64, error) {
	size, err := i.size()
	if err != nil {
		return nil, 0, err
	}
	extents, err := f.extents(i)
	if err != nil {
		return nil, 0, err
	}
	return &reader{f: f, extents: extents, size: size}, size, nil
}

type reader struct {
	f        *FS
	extents  []extent // what is left of them
	at, size int64
}

func (r *reader) Read(p []byte) (int, error) {
	if r.at >= r.size {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), r.size-r.at)]
	for len(r.extents) > 0 && r.at >= int64(r.extents[0].logical+r.extents[0].count)*blockBytes {
		r.extents = r.extents[1:]
	}
	if len(r.extents) == 0 || r.at < int64(r.extents[0].logical)*blockBytes {
		if len(r.extents) > 0 {
			p = p[:min(int64(len(p)), int64(r.extents[0].logical)*blockBytes-r.at)]
		}
		clear(p)
		r.at += int64(len(p))
		return len(p), nil
	}
	x := r.extents[0]
	begin := r.at - int64(x.logical)*blockBytes
	p = p[:min(int64(len(p)), int64(x.count)*blockBytes-begin)]
	if x.hole {
		clear(p)
	} else if err := readAt(r.f.r, p, int64(x.physical)*blockBytes+begin); err != nil {
		return 0, err
	}
	r.at += int64(len(p))
	return len(p), nil
}

// maxDirBytes bounds one directory.
const maxDirBytes = 256 << 20

type dirent struct {
	name  string
	inode uint32
}

// list reads a directory, whose index blocks look like empty entries.
func (f *FS) list(i inode) ([]dirent, error) {
	r, size, err := f.open(i)
	if err != nil {
		return nil, err
	}
	if size > maxDirBytes {
		return nil, invalid("directory %d has %d bytes", i.number, size)
	}
	var out []dirent
	block := make([]byte, blockBytes)
	for range size / blockBytes {
		if _, err := io.ReadFull(r, block); err != nil {
			return nil, err
		}
		if out, err = entries(i, block, out); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func entries(i inode, block []byte, out []dirent) ([]dirent, error) {
	for at := 0; at < len(block); {
		if len(block)-at < 8 {
			return nil, invalid("directory %d has a broken entry", i.number)
		}
		e := block[at:]
		length, name := int(le.Uint16(e[4:])), int(e[6])
		if length < 8 || length > len(e) || length%4 != 0 || 8+name > length {
			return nil, invalid("directory %d has a broken entry", i.number)
		}
		if number := le.Uint32(e); number != 0 {
			if s := string(e[8 : 8+name]); s != "." && s != ".." {
				out = append(out, dirent{s, number})
			}
		}
		at += length
	}
	return out, nil
}
