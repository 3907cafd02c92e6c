package template

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const (
	blockSize  = 4096
	inodeBytes = 256
	mib        = 1 << 20
	// journalMiB is small: the journal is part of every sandbox's writes, and
	// nobody recovers much in a sandbox.
	journalMiB = 16
	// roomMiB is free in an image of automatic size, so that a sandbox works
	// before its file system has grown.
	roomMiB  = 256
	roundMiB = 64
	// inodeRatio is ext4's usual bytes per inode; it stays when the guest grows.
	inodeRatio = 16384
	// growBlocks is 1 TiB: group descriptors up to there are reserved, so that
	// growing online needs no new layout.
	growBlocks = 1 << 28
)

// mke2fsConf replaces the host's mke2fs.conf: the same image everywhere, and
// nothing that guest kernels before 5.15 cannot mount (orphan_file).
const mke2fsConf = `[defaults]
	base_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr
	default_mntopts = acl,user_xattr
	enable_periodic_fsck = 0
	blocksize = 4096
	inode_size = 256
	inode_ratio = 16384

[fs_types]
	ext4 = {
		features = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
	}
`

// geometry is the shape of a file system.
type geometry struct{ blocks, inodes int64 }

// layout sizes a file system for c; imageMiB 0 leaves the size to it.
func layout(c content, imageMiB int) (geometry, error) {
	inodes := c.inodes + c.inodes/4 + 1024
	// A twentieth is for block maps, extents, bitmaps and descriptors.
	needMiB := (c.blocks*blockSize+c.blocks*blockSize/20+inodes*inodeBytes)/mib + journalMiB + 8
	sizeMiB := int64(imageMiB)
	if sizeMiB == 0 {
		sizeMiB = (needMiB + roomMiB + roundMiB - 1) / roundMiB * roundMiB
	}
	if sizeMiB < needMiB {
		return geometry{}, sandbox.Errorf(sandbox.KindInvalid,
			"image size %d MiB is too small: the content needs %d MiB", sizeMiB, needMiB)
	}
	return geometry{blocks: sizeMiB * mib / blockSize, inodes: max(inodes, sizeMiB*mib/inodeRatio)}, nil
}

// makeExt4 writes the tree root as a sparse ext4 file. The same tree, key and
// time give the same bytes.
func makeExt4(ctx context.Context, w *work, root, image string, g geometry, key string, when time.Time, line func(string)) error {
	conf := w.path("mke2fs.conf")
	if err := os.WriteFile(conf, []byte(mke2fsConf), 0o644); err != nil {
		return err
	}
	options := []string{
		"hash_seed=" + uuidFrom(key[32:]),
		"resize=" + strconv.Itoa(growBlocks),
		"root_owner=0:0",
		// Zeroed tables cost nothing in a sparse file; left to the guest's kernel
		// they would be written into every sandbox's overlay.
		"lazy_itable_init=0", "lazy_journal_init=0",
	}
	epoch := strconv.FormatInt(when.Unix(), 10)
	// SOURCE_DATE_EPOCH is read since e2fsprogs 1.47.1, the other before.
	env := []string{"MKE2FS_CONFIG=" + conf, "SOURCE_DATE_EPOCH=" + epoch, "E2FSPROGS_FAKE_TIME=" + epoch}
	err := tool{
		name: "mke2fs",
		args: []string{
			"-q", "-F", "-t", "ext4", "-b", strconv.Itoa(blockSize), "-I", strconv.Itoa(inodeBytes), "-m", "0",
			"-N", strconv.FormatInt(g.inodes, 10), "-J", "size=" + strconv.Itoa(journalMiB),
			"-U", uuidFrom(key), "-E", strings.Join(options, ","), "-d", root, image, strconv.FormatInt(g.blocks, 10),
		},
		env: env, dir: w.dir, hold: w.lock, line: line, cure: e2fsCure,
	}.run(ctx)
	if err != nil {
		return err
	}
	return settleTimes(ctx, w, image, epoch, env)
}

const e2fsCure = "apt-get install e2fsprogs"

// settleTimes sets every inode's change time, which no system call can set in
// the tree; mke2fs before 1.47.1 copies it from there.
func settleTimes(ctx context.Context, w *work, image, epoch string, env []string) error {
	used, err := usedInodes(image)
	if err != nil {
		return fmt.Errorf("read back: %w", err)
	}
	var script strings.Builder
	for _, field := range []string{"atime", "ctime", "mtime", "crtime"} {
		fmt.Fprintf(&script, "set_inode_field <2> %s @%s\n", field, epoch) // the root: read while it was copied
	}
	for inode := uint32(firstInode); inode <= used; inode++ { // mke2fs hands them out in order
		fmt.Fprintf(&script, "set_inode_field <%d> ctime @%s\n", inode, epoch)
	}
	path := w.path("settle")
	if err := os.WriteFile(path, []byte(script.String()), 0o644); err != nil {
		return err
	}
	return tool{
		name: "debugfs", args: []string{"-w", "-f", path, image},
		env: env, dir: w.dir, hold: w.lock, cure: e2fsCure, // it repeats each command: nothing for the log
	}.run(ctx)
}

// firstInode is the first that is not reserved.
const firstInode = 11

// usedInodes reads from the superblock how many inodes a new image uses.
func usedInodes(image string) (uint32, error) {
	f, err := os.Open(image)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }() // read only
	var super [20]byte
	if _, err := f.ReadAt(super[:], 1024); err != nil {
		return 0, err
	}
	inodes, free := binary.LittleEndian.Uint32(super[:]), binary.LittleEndian.Uint32(super[16:])
	if free > inodes {
		return 0, errors.New("it has more free inodes than inodes")
	}
	return inodes - free, nil
}

// uuidFrom makes a UUID of version 8 from the first 32 hex digits.
func uuidFrom(hex string) string {
	return fmt.Sprintf("%s-%s-8%s-8%s-%s", hex[:8], hex[8:12], hex[13:16], hex[17:20], hex[20:32])
}
