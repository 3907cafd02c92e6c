package dm

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// TestFlippedBits flips one bit at each of 2,000 offsets of a layer and of its
// hash tree. What a guest reads then is an error or the right bytes, and Verify
// names the file and the block.
//
// Most flips are made many at once before a device is made over the files: each
// read of a block is then about the bits on its own way up the tree only, for
// they are chosen so that no two share one.
func TestFlippedBits(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		const blocks = 2200 // two levels: 18 blocks of leaves below the top
		content := pattern(blocks, 11)
		random := rand.New(rand.NewPCG(1, 2))
		bits := random.Perm(blocks)[:1980]
		slices.Sort(bits)

		// One bit in each of 1,980 blocks of data.
		base := r.file("base.img", content)
		config := r.config("disk", base, blocks)
		r.remove(r.create(config)) // sealed
		damaged := map[int64]bool{}
		for _, block := range bits {
			flip(t, base, int64(block)*blockBytes*8+int64(random.IntN(blockBytes*8)))
			damaged[int64(block)] = true
		}
		r.expectErrorsOrRight(config, content, 1, func(block int64) bool { return damaged[block] })
		r.expectDamage(base, base, damaged)
		if err := os.WriteFile(base, content, 0o600); err != nil {
			t.Fatal(err)
		}
		r.remove(r.create(config)) // it was written, and is right again

		// One bit in each of 20 blocks of the tree: of the leaves' blocks all but one
		// at once, of the topmost alone.
		tree := base + treeSuffix
		whole, err := os.ReadFile(tree)
		if err != nil {
			t.Fatal(err)
		}
		leaves := int64(len(whole)/blockBytes - 2) // behind the superblock and the top
		lost := map[int64]bool{}
		for i := range leaves {
			if i == 3 {
				continue
			}
			flip(t, tree, (2+i)*blockBytes*8+int64(random.IntN(blockBytes*8)))
			lost[2+i] = true
		}
		r.expectErrorsOrRight(config, content, 5, func(block int64) bool { return lost[2+block/hashesPerBlock] })
		r.expectDamage(base, tree, lost)
		restoreFile(t, tree, whole)
		for range 2 {
			flip(t, tree, blockBytes*8+int64(random.IntN(int(leaves)*digestBytes*8)))
			r.expectErrorsOrRight(config, content, 37, func(int64) bool { return true })
			r.expectDamage(base, tree, map[int64]bool{1: true})
			restoreFile(t, tree, whole)
		}
		// The kernel reads nothing of the superblock; veritysetup does.
		flip(t, tree, int64(random.IntN(blockBytes*8)))
		r.expectErrorsOrRight(config, content, 37, func(int64) bool { return false })
		r.expectDamage(base, tree, map[int64]bool{0: true})
		restoreFile(t, tree, whole)
	})
}

func restoreFile(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := errors.Join(os.Remove(path), os.WriteFile(path, data, 0o444)); err != nil {
		t.Fatal(err)
	}
}

// dropCaches makes sure that what is read is what is in the file.
func (r *rig) dropCaches() {
	r.t.Helper()
	if r.fake == nil {
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0o600); err != nil {
			r.t.Fatal(err)
		}
	}
}

// expectErrorsOrRight reads one block in step of a new disk over a base.
func (r *rig) expectErrorsOrRight(config disk.Config, content []byte, step int64, mayFail func(block int64) bool) {
	r.t.Helper()
	unix.Sync()
	r.dropCaches()
	d, err := r.driver.Create(r.t.Context(), config)
	if err != nil {
		r.t.Errorf("create: %v", err)
		return
	}
	defer r.remove(d)
	f := r.mustOpen(d)
	defer func() { _ = f.Close() }() // read only
	buf := aligned(blockBytes)
	failed := 0
	for block := int64(0); block < int64(len(content)/blockBytes); block += step {
		want := content[block*blockBytes:][:blockBytes]
		_, err := f.ReadAt(buf, block*blockBytes)
		switch {
		case err == nil && !bytes.Equal(buf, want):
			r.t.Errorf("block %d reads as wrong bytes", block)
		case err != nil && !errors.Is(err, unix.EIO):
			r.t.Errorf("block %d: %v", block, err)
		case err != nil && !mayFail(block):
			r.t.Errorf("block %d, which is right: %v", block, err)
		case err == nil && mayFail(block) && !sparse.IsZero(want): // zeros are not even read
			r.t.Errorf("block %d, which is damaged, reads as right: was it read?", block)
		case err != nil:
			failed++
		}
	}
	report := r.check()
	if (failed > 0) != (len(report.Damage) > 0) {
		r.t.Errorf("%d blocks could not be read, and Check says %v", failed, report.Damage)
	}
}

// expectDamage asks Verify, which must name just these blocks of a file.
func (r *rig) expectDamage(layer, file string, blocks map[int64]bool) {
	r.t.Helper()
	found, err := r.driver.Verify(r.t.Context(), layer)
	if err != nil {
		r.t.Fatal(err)
	}
	named := map[int64]bool{}
	for _, d := range found {
		switch {
		case d.Cause == causeUnjudged: // it lies below a damaged block of the tree
		case d.File == file:
			named[d.Block] = true
		default:
			r.t.Errorf("%v", d)
		}
	}
	for block := range blocks {
		if !named[block] {
			r.t.Errorf("block %d of %s is not named", block, file)
		}
	}
	for block := range named {
		if !blocks[block] {
			r.t.Errorf("block %d of %s is named and right", block, file)
		}
	}
}

// TestFlippedRecord flips every bit of a layer's record, and of a disk's: what
// cannot be an error is the right bytes.
func TestFlippedRecord(t *testing.T) {
	r := fakeRig(t)
	content := pattern(8, 1)
	base := r.file("base.img", content)
	config := r.config("disk", base, 8)
	d := r.create(config)
	mine := pattern(1, 77)
	r.write(d, 0, mine)
	want := slices.Concat(mine, content[blockBytes:])
	if err := d.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{base + recordSuffix, filepath.Join(config.Dir, recordFile)} {
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		refused := 0
		step := 1
		if testkit.InLab() {
			step = 11
		}
		flips := len(whole) * 8 / step
		for i := range flips {
			bit := i * step
			flip(t, path, int64(bit))
			d, err := r.driver.Restore(t.Context(), config)
			if err != nil {
				refused++
			} else {
				got, err := r.tryRead(d, 0, len(want))
				if err == nil && !bytes.Equal(got, want) {
					t.Errorf("%s, bit %d: wrong bytes", path, bit)
				}
				if err := d.Close(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := r.driver.Verify(t.Context(), base); path != base+recordSuffix && err != nil {
				t.Errorf("%v", err)
			}
			restoreFile(t, path, whole)
		}
		if refused < flips/2 {
			t.Errorf("%s: only %d of %d flips were refused", path, refused, flips)
		}
	}
	r.remove(r.restore(config))
	r.nothingRemains("by flipped records")
}

// TestTheKernelSeesAFlip: one that happens under a running disk comes to light
// when the guest reads it, and Check says where.
func TestTheKernelSeesAFlip(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		const blocks, bad = 600, 333
		content := pattern(blocks, 5)
		copy(content[bad*blockBytes:], "not zero")
		base := r.file("base.img", content)
		d := r.create(r.config("disk", base, blocks))
		r.expect(d, 0, content[:4*blockBytes])
		if report := r.check(); len(report.Damage) > 0 {
			t.Errorf("before: %v", report.Damage)
		}
		flip(t, base, bad*blockBytes*8+12345)
		unix.Sync()
		r.dropCaches()
		if report := r.check(); len(report.Damage) > 0 {
			t.Errorf("nobody has read it yet: %v", report.Damage)
		}
		if data, err := r.tryRead(d, bad*blockBytes, blockBytes); !errors.Is(err, unix.EIO) {
			t.Errorf("the damaged block: %v (%.20q)", err, data)
		}
		r.expect(d, (bad+1)*blockBytes, content[(bad+1)*blockBytes:])
		r.expect(d, (bad-1)*blockBytes, content[(bad-1)*blockBytes:bad*blockBytes])
		report := r.check()
		want := disk.Damage{File: base, Block: bad, Cause: causeChanged}
		if len(report.Damage) != 1 || report.Damage[0] != want || len(report.Broken) > 0 {
			t.Errorf("Check: %+v, want %v", report, want)
		}
		if text := want.String(); !strings.Contains(text, base) || !strings.Contains(text, fmt.Sprint("block ", bad)) {
			t.Errorf("%q", text)
		}
		// What the guest has written itself is not the base's.
		r.write(d, bad*blockBytes, content[:blockBytes])
		r.expect(d, bad*blockBytes, content[:blockBytes])
		r.remove(d)
		r.nothingRemains("by a flip")
	})
}
