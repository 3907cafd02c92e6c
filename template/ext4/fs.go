package ext4

import (
	"encoding/binary"
	"errors"
	"io"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const (
	blockBytes = 4096
	superAt    = 1024
	magic      = 0xEF53
	rootInode  = 2
)

// Of s_feature_incompat.
const (
	incompatFiletype = 0x2
	incompatRecover  = 0x4
	incompatExtents  = 0x40
	incompat64Bit    = 0x80
	incompatFlexBG   = 0x200
	incompatCsumSeed = 0x2000
	incompatLargeDir = 0x4000

	incompatKnown = incompatFiletype | incompatRecover | incompatExtents | incompat64Bit | incompatFlexBG | incompatCsumSeed | incompatLargeDir
)

var le = binary.LittleEndian

// FS is a file system in a file.
type FS struct {
	r      io.ReaderAt
	blocks uint64
	inodes uint32

	inodesPerGroup uint32
	inodeBytes     int64
	groupBytes     int64
	dirty          bool
}

// Open reads the superblock.
func Open(r io.ReaderAt) (*FS, error) {
	var super [1024]byte
	if err := readAt(r, super[:], superAt); err != nil {
		return nil, err
	}
	if m := le.Uint16(super[0x38:]); m != magic {
		return nil, invalid("it is not an ext4 file system: magic %#x", m)
	}
	if shift := le.Uint32(super[0x18:]); shift != 2 {
		return nil, invalid("its blocks are not of 4 KiB")
	}
	incompat := le.Uint32(super[0x60:])
	if unknown := incompat &^ incompatKnown; unknown != 0 {
		return nil, invalid("it has features that are not read here: %#x", unknown)
	}
	f := &FS{
		r: r, inodes: le.Uint32(super[0:]), blocks: uint64(le.Uint32(super[0x4:])),
		inodesPerGroup: le.Uint32(super[0x28:]), inodeBytes: int64(le.Uint16(super[0x58:])), groupBytes: 32,
		dirty: incompat&incompatRecover != 0,
	}
	if incompat&incompat64Bit != 0 {
		f.blocks |= uint64(le.Uint32(super[0x150:])) << 32
		f.groupBytes = int64(le.Uint16(super[0xFE:]))
	}
	switch {
	case f.blocks == 0 || f.blocks > 1<<36 || f.inodes == 0 || f.inodesPerGroup == 0:
		return nil, invalid("its superblock has no sizes that can be")
	case f.inodeBytes < 128 || f.inodeBytes > blockBytes || f.inodeBytes&(f.inodeBytes-1) != 0:
		return nil, invalid("its inodes have %d bytes", f.inodeBytes)
	case f.groupBytes < 32 || f.groupBytes > blockBytes:
		return nil, invalid("its group descriptors have %d bytes", f.groupBytes)
	}
	return f, nil
}

// Dirty says that the journal holds what is not yet in its place.
func (f *FS) Dirty() bool { return f.dirty }

func invalid(format string, args ...any) error {
	return sandbox.Errorf(sandbox.KindInvalid, format, args...)
}

// readAt reads all of b, or says that the file system is larger than its disk.
func readAt(r io.ReaderAt, b []byte, at int64) error {
	n, err := r.ReadAt(b, at)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return invalid("it ends before byte %d", at+int64(len(b)))
	}
	return err
}

func (f *FS) block(n uint64) ([]byte, error) {
	if n == 0 || n >= f.blocks {
		return nil, invalid("block %d is not one of its %d", n, f.blocks)
	}
	b := make([]byte, blockBytes)
	return b, readAt(f.r, b, int64(n)*blockBytes)
}

// inode is one file's record.
type inode struct {
	number uint32
	raw    []byte
}

func (f *FS) inode(number uint32) (inode, error) {
	if number == 0 || number > f.inodes {
		return inode{}, invalid("inode %d is not one of its %d", number, f.inodes)
	}
	group, index := (number-1)/f.inodesPerGroup, (number-1)%f.inodesPerGroup
	desc := make([]byte, f.groupBytes)
	if err := readAt(f.r, desc, blockBytes+int64(group)*f.groupBytes); err != nil {
		return inode{}, err
	}
	table := uint64(le.Uint32(desc[0x8:]))
	if f.groupBytes >= 64 {
		table |= uint64(le.Uint32(desc[0x28:])) << 32
	}
	if table == 0 || table >= f.blocks {
		return inode{}, invalid("the inodes of group %d are at block %d", group, table)
	}
	raw := make([]byte, f.inodeBytes)
	if err := readAt(f.r, raw, int64(table)*blockBytes+int64(index)*f.inodeBytes); err != nil {
		return inode{}, err
	}
	return inode{number, raw}, nil
}

// File types of i_mode.
const (
	typeMask = 0xF000
	typeFIFO = 0x1000
	typeChar = 0x2000
	typeDir  = 0x4000
	typeBlk  = 0x6000
	typeReg  = 0x8000
	typeLink = 0xA000
	typeSock = 0xC000
)

const (
	flagExtents = 0x80000
	flagRefused = 0x10000000 | 0x800 | 0x200000 // inline data, encryption, attributes in inodes
)

func (i inode) mode() uint16  { return le.Uint16(i.raw) }
func (i inode) flags() uint32 { return le.Uint32(i.raw[0x20:]) }
func (i inode) uid() uint32 {
	return uint32(le.Uint16(i.raw[0x2:])) | uint32(le.Uint16(i.raw[0x78:]))<<16
}

func (i inode) gid() uint32 {
	return uint32(le.Uint16(i.raw[0x18:])) | uint32(le.Uint16(i.raw[0x7A:]))<<16
}
func (i inode) links() uint16 { return le.Uint16(i.raw[0x1A:]) }
func (i inode) mtime() int64  { return int64(int32(le.Uint32(i.raw[0x10:]))) + i.mtimeEpoch() }
func (i inode) aclAt() uint64 {
	return uint64(le.Uint32(i.raw[0x68:])) | uint64(le.Uint16(i.raw[0x76:]))<<32
}
func (i inode) extra() int      { return i.field16(0x80) }
func (i inode) content() []byte { return i.raw[0x28:0x64] }

func (i inode) size() (int64, error) {
	size := uint64(le.Uint32(i.raw[0x4:])) | uint64(le.Uint32(i.raw[0x6C:]))<<32
	if size > 1<<50 {
		return 0, invalid("inode %d says that it has %d bytes", i.number, size)
	}
	return int64(size), nil
}

// mtimeEpoch is the part of a time that lies beyond 32 bits.
func (i inode) mtimeEpoch() int64 {
	if i.extra() < 12 || len(i.raw) < 0x8C {
		return 0
	}
	return int64(le.Uint32(i.raw[0x88:])&3) << 32
}

func (i inode) field16(at int) int {
	if len(i.raw) < at+2 {
		return 0
	}
	return int(le.Uint16(i.raw[at:]))
}
