package dm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// A layer's hash tree is a function of its bytes alone: SHA-256 over blocks of
// 4 KiB, no salt, as `veritysetup format --salt=-` writes it (version 1 of
// docs.kernel.org/admin-guide/device-mapper/verity.html). It lies beside the
// layer, with its root in a record of its own: who trusts the record trusts the
// layer, and a layer that is another one than when the tree was built is read
// as I/O errors.
const (
	treeSuffix   = ".verity"
	recordSuffix = ".verity.json"

	blockBytes     = disk.BlockBytes
	digestBytes    = sha256.Size
	hashesPerBlock = blockBytes / digestBytes
	spanBlocks     = 1024 // what one worker hashes at a time; a multiple of hashesPerBlock
	maxRecord      = 4096
	recordFormat   = 1
	sealLimit      = time.Hour // how long another process may take to seal a layer
)

type digest = [digestBytes]byte

// seal is what a layer's record says.
type seal struct {
	Format    int    `json:"format"`
	Algorithm string `json:"algorithm"`
	Block     int64  `json:"block_bytes"`
	Bytes     int64  `json:"data_bytes"`
	Root      string `json:"root"` // of the hash tree, in hex

	root digest
}

func (s seal) blocks() int64 { return s.Bytes / blockBytes }

var zeroBlock [blockBytes]byte

var zeroDigest = sha256.Sum256(zeroBlock[:])

func hashBlock(block []byte) digest {
	if bytes.Equal(block, zeroBlock[:]) { // much of an image is
		return zeroDigest
	}
	return sha256.Sum256(block)
}

// levels is how many blocks each level of the tree has, the leaves' first; one
// data block needs no tree, its hash is the root.
func levels(dataBlocks int64) []int64 {
	var sizes []int64
	for n := dataBlocks; n > 1; {
		n = (n + hashesPerBlock - 1) / hashesPerBlock
		sizes = append(sizes, n)
	}
	return sizes
}

// treeBytes is the size of the tree's file: a block for the superblock, then the
// levels, the topmost first.
func treeBytes(dataBlocks int64) int64 {
	size := int64(blockBytes)
	for _, n := range levels(dataBlocks) {
		size += n * blockBytes
	}
	return size
}

// sealed reads a layer's record and makes sure that its tree is there; at the
// first time both are made.
func (d *Driver) sealed(ctx context.Context, layer string) (seal, error) {
	unlock, err := d.busy.lock(ctx, "layer "+layer)
	if err != nil {
		return seal{}, err
	}
	defer unlock()
	size, err := layerSize(layer)
	if err != nil {
		return seal{}, err
	}
	s, err := wholeSeal(layer, size)
	if !errors.Is(err, fs.ErrNotExist) {
		return s, err
	}
	return d.sealAlone(ctx, layer, size)
}

// wholeSeal is the seal of a layer that has its record and its tree;
// fs.ErrNotExist if one of them is missing.
func wholeSeal(layer string, size int64) (seal, error) {
	s, err := readSeal(layer)
	if err != nil {
		return seal{}, err
	}
	if s.Bytes != size {
		return seal{}, sandbox.Errorf(sandbox.KindConflict, "%s has %d bytes, and had %d when it was sealed", layer, size, s.Bytes)
	}
	info, err := os.Stat(layer + treeSuffix)
	if err != nil {
		return seal{}, err
	}
	if info.Size() != treeBytes(s.blocks()) {
		return seal{}, fmt.Errorf("%s has %d bytes: %w", layer+treeSuffix, info.Size(), fs.ErrNotExist)
	}
	return s, nil
}

// sealAlone makes what is missing, while no other process does. A lock on the
// layer itself ends with the process that has it.
func (d *Driver) sealAlone(ctx context.Context, layer string, size int64) (_ seal, err error) {
	f, err := os.Open(layer)
	if err != nil {
		return seal{}, err
	}
	defer func() { _ = f.Close() }() // read only
	err = d.again(ctx, sealLimit, unix.EWOULDBLOCK, func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if err != nil {
		return seal{}, fmt.Errorf("seal %s: wait for who does it already: %w", layer, err)
	}
	if err := sweepSealing(layer); err != nil {
		return seal{}, fmt.Errorf("seal %s: %w", layer, err)
	}
	s, err := wholeSeal(layer, size) // somebody may have made it just now
	if !errors.Is(err, fs.ErrNotExist) {
		return s, err
	}
	if s, err = readSeal(layer); errors.Is(err, fs.ErrNotExist) {
		return d.makeSeal(ctx, layer)
	}
	if err != nil {
		return seal{}, err
	}
	return s, d.mendTree(ctx, layer, s)
}

// isSealed refuses a layer that was written after its record and is another one
// now: a new disk over it would be one of I/O errors. The same content gets a
// newer record, so that it is read once only.
func (d *Driver) isSealed(ctx context.Context, l layer) error {
	unlock, err := d.busy.lock(ctx, "layer "+l.path)
	if err != nil {
		return err
	}
	defer unlock()
	file, err := os.Stat(l.path)
	if err != nil {
		return err
	}
	record, err := os.Stat(l.path + recordSuffix)
	if err != nil {
		return err
	}
	if !file.ModTime().After(record.ModTime()) {
		return nil
	}
	if err := hasRoot(ctx, l); err != nil {
		return err
	}
	return d.writeSeal(ctx, l.path, l.seal)
}

// hasRoot reads a layer.
func hasRoot(ctx context.Context, l layer) error {
	f, err := os.Open(l.path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // read only
	leaves, err := hashAll(ctx, f, l.seal.blocks(), nil)
	if err != nil {
		return err
	}
	if _, root := buildTree(leaves); root != l.seal.root {
		return sandbox.Errorf(sandbox.KindConflict, "%s was written after it was sealed, and is another one: its root is %x, not %s", l.path, root, l.seal.Root)
	}
	return nil
}

// sweepSealing removes what a process left that died while it sealed a layer.
func sweepSealing(layer string) error {
	temps, err := filepath.Glob(filepath.Join(globEscape(filepath.Dir(layer)), ".tmp-"+globEscape(filepath.Base(layer)+treeSuffix)+"*"))
	errs := []error{err}
	for _, path := range temps {
		errs = append(errs, removeAny(path))
	}
	return errors.Join(errs...)
}

// layerSize checks that a file can be a layer.
func layerSize(path string) (int64, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, sandbox.Errorf(sandbox.KindNotFound, "open base: %w", err)
	}
	if err != nil {
		return 0, fmt.Errorf("open base: %w", err)
	}
	if !info.Mode().IsRegular() {
		return 0, sandbox.Errorf(sandbox.KindInvalid, "base %s is not a regular file", path)
	}
	if size := info.Size(); size > 0 && size%blockBytes == 0 {
		return size, nil
	}
	return 0, sandbox.Errorf(sandbox.KindInvalid, "base %s has %d bytes, which is no multiple of %d", path, info.Size(), blockBytes)
}

func readSeal(layer string) (seal, error) {
	data, err := osfs.ReadFileLimit(layer+recordSuffix, maxRecord)
	if err != nil {
		return seal{}, err
	}
	s, err := parseSeal(data)
	if err != nil {
		return seal{}, fmt.Errorf("%s: %w", layer+recordSuffix, err)
	}
	return s, nil
}

func parseSeal(data []byte) (seal, error) {
	var s seal
	if err := json.Unmarshal(data, &s); err != nil {
		return seal{}, err
	}
	root, err := hex.DecodeString(s.Root)
	if err != nil || len(root) != digestBytes {
		return seal{}, fmt.Errorf("%q is no root of a hash tree", s.Root)
	}
	if s.Format != recordFormat || s.Algorithm != "sha256" || s.Block != blockBytes || s.Bytes <= 0 || s.Bytes%blockBytes != 0 {
		return seal{}, fmt.Errorf("format %d, %s over %d bytes in blocks of %d, is not known", s.Format, s.Algorithm, s.Bytes, s.Block)
	}
	s.root = digest(root)
	return s, nil
}

// makeSeal publishes the tree, then the record: with the record there is a tree.
func (d *Driver) makeSeal(ctx context.Context, layer string) (seal, error) {
	root, size, err := d.writeTree(ctx, layer, nil)
	if err != nil {
		return seal{}, fmt.Errorf("seal %s: %w", layer, err)
	}
	s := seal{Format: recordFormat, Algorithm: "sha256", Block: blockBytes, Bytes: size, Root: hex.EncodeToString(root[:]), root: root}
	if err := d.writeSeal(ctx, layer, s); err != nil {
		return seal{}, fmt.Errorf("seal %s: %w", layer, err)
	}
	d.log.Info("base sealed", "file", layer, "bytes", size, "root", s.Root)
	return s, nil
}

func (d *Driver) writeSeal(ctx context.Context, layer string, s seal) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return d.step(ctx, "seal/record", func() error {
		return osfs.WriteFile("disk-seal", layer+recordSuffix, append(data, '\n'), 0o444)
	})
}

// mendTree writes a lost tree again, if the layer still is what was sealed.
func (d *Driver) mendTree(ctx context.Context, layer string, s seal) error {
	if _, _, err := d.writeTree(ctx, layer, &s.root); err != nil {
		return fmt.Errorf("mend the hash tree of %s: %w", layer, err)
	}
	d.log.Warn("hash tree was missing and is written again", "file", layer)
	return nil
}

// writeTree publishes the tree of a layer whole; if its root is another one than
// must, nothing is published.
func (d *Driver) writeTree(ctx context.Context, layer string, must *digest) (root digest, size int64, err error) {
	f, err := os.Open(layer)
	if err != nil {
		return root, 0, err
	}
	defer func() { _ = f.Close() }() // read only
	info, err := f.Stat()
	if err != nil {
		return root, 0, err
	}
	size = info.Size()
	leaves, err := hashAll(ctx, f, size/blockBytes, nil)
	if err != nil {
		return root, 0, err
	}
	tree, root := buildTree(leaves)
	if must != nil && root != *must {
		return root, 0, sandbox.Errorf(sandbox.KindConflict, "it is not what was sealed: its root is %x, not %x", root, *must)
	}
	err = d.step(ctx, "seal/tree", func() error {
		return osfs.Replace("disk-tree", layer+treeSuffix, 0o444, func(f *os.File) error {
			if _, err := f.Write(superblock(size/blockBytes, root)); err != nil {
				return err
			}
			for i := len(tree) - 1; i >= 0; i-- {
				if _, err := f.Write(tree[i]); err != nil {
					return err
				}
			}
			return nil
		})
	})
	return root, size, err
}

// hashAll hashes every block, on all processors. A block that cannot be read is
// an error, or is given to unreadable.
func hashAll(ctx context.Context, f io.ReaderAt, blocks int64, unreadable func(block int64, err error)) ([]digest, error) {
	leaves := make([]digest, blocks)
	group, until := errgroup.WithContext(ctx) // until the first error, or the end of Wait
	group.SetLimit(runtime.GOMAXPROCS(0))
	for first := int64(0); first < blocks && until.Err() == nil; first += spanBlocks {
		group.Go(func() error {
			if err := until.Err(); err != nil {
				return err
			}
			return hashSpan(f, leaves[first:min(first+spanBlocks, blocks)], first, unreadable)
		})
	}
	return leaves, errors.Join(group.Wait(), context.Cause(ctx))
}

func hashSpan(f io.ReaderAt, leaves []digest, first int64, unreadable func(int64, error)) error {
	buf := make([]byte, len(leaves)*blockBytes)
	if _, err := f.ReadAt(buf, first*blockBytes); err == nil {
		for i := range leaves {
			leaves[i] = hashBlock(buf[i*blockBytes:][:blockBytes])
		}
		return nil
	} else if unreadable == nil {
		return err
	}
	for i := range leaves {
		if _, err := f.ReadAt(buf[:blockBytes], (first+int64(i))*blockBytes); err != nil {
			unreadable(first+int64(i), err)
			continue
		}
		leaves[i] = hashBlock(buf[:blockBytes])
	}
	return nil
}

// buildTree puts digests into blocks, and digests of those into blocks, up to
// the root. The leaves' level is first.
func buildTree(leaves []digest) (tree [][]byte, root digest) {
	for len(leaves) > 1 {
		level := make([]byte, (len(leaves)+hashesPerBlock-1)/hashesPerBlock*blockBytes)
		for i, sum := range leaves {
			copy(level[i*digestBytes:], sum[:])
		}
		tree = append(tree, level)
		leaves = make([]digest, len(level)/blockBytes)
		for i := range leaves {
			leaves[i] = sha256.Sum256(level[i*blockBytes:][:blockBytes])
		}
	}
	return tree, leaves[0]
}

// superblock is what lets veritysetup read the tree; the kernel is told all of
// it in the table. Its layout is struct verity_sb of cryptsetup.
func superblock(dataBlocks int64, root digest) []byte {
	sb := make([]byte, blockBytes)
	copy(sb, "verity\x00\x00")
	binary.LittleEndian.PutUint32(sb[8:], 1)  // of the superblock
	binary.LittleEndian.PutUint32(sb[12:], 1) // of the tree
	copy(sb[16:32], root[:])                  // a UUID: the same layer has the same
	copy(sb[32:64], "sha256")
	binary.LittleEndian.PutUint32(sb[64:], blockBytes)
	binary.LittleEndian.PutUint32(sb[68:], blockBytes)
	binary.LittleEndian.PutUint64(sb[72:], uint64(dataBlocks))
	return sb
}

// verityTable maps a layer. A block that must be zero is not even read.
func verityTable(s seal, data, hash uint64) []target {
	return []target{{
		length: uint64(s.Bytes / sector), kind: "verity",
		params: fmt.Sprintf("1 %s %s %d %d %d 1 sha256 %s - 1 ignore_zero_blocks",
			number(data), number(hash), blockBytes, blockBytes, s.blocks(), s.Root),
	}}
}
