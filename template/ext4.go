package template

import (
	"context"
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
// time give the same bytes (with e2fsprogs before 1.47.1: but for the inode
// change times, which nobody can set).
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
	return tool{
		name: "mke2fs",
		args: []string{
			"-q", "-F", "-t", "ext4", "-b", strconv.Itoa(blockSize), "-I", strconv.Itoa(inodeBytes), "-m", "0",
			"-N", strconv.FormatInt(g.inodes, 10), "-J", "size=" + strconv.Itoa(journalMiB),
			"-U", uuidFrom(key), "-E", strings.Join(options, ","), "-d", root, image, strconv.FormatInt(g.blocks, 10),
		},
		// SOURCE_DATE_EPOCH is read since e2fsprogs 1.47.1, the other before.
		env:  []string{"MKE2FS_CONFIG=" + conf, "SOURCE_DATE_EPOCH=" + epoch, "E2FSPROGS_FAKE_TIME=" + epoch},
		dir:  w.dir,
		hold: w.lock,
		line: line,
		cure: "apt-get install e2fsprogs",
	}.run(ctx)
}

// uuidFrom makes a UUID of version 8 from the first 32 hex digits.
func uuidFrom(hex string) string {
	return fmt.Sprintf("%s-%s-8%s-8%s-%s", hex[:8], hex[8:12], hex[13:16], hex[17:20], hex[20:32])
}
