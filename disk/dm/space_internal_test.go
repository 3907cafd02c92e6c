package dm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestAFullyWrittenDiskFits: the copy-on-write file has room for every block and
// for what is written about it, also where another 256 blocks begin.
func TestAFullyWrittenDiskFits(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		base := r.file("base.img", pattern(1, 1))
		sizes := []int{1, 2, 254, 255, 256, 257, 258, 511, 512, 513, 514, 767, 768, 769, 1023, 1024, 1025}
		if r.fake == nil && !testkit.IsLong() {
			sizes = []int{1, 255, 256, 257, 512, 513}
		}
		for _, blocks := range sizes {
			config := r.config(fmt.Sprint("disk", blocks), base, blocks)
			d := r.create(config)
			for round := range uint64(2) {
				data := pattern(blocks, round+50)
				r.writeBackwards(d, data)
				r.expectAll(d, data)
			}
			fill, err := r.driver.fill(r.driver.overlay(config).name)
			if err != nil || fill.Used > fill.Total || fill.Total-fill.Used > chunkBytes {
				t.Errorf("%d blocks: %+v, %v; want it full to the last chunk but one, and no fuller", blocks, fill, err)
			}
			if size, err := d.Allocated(); err != nil || size < config.SizeBytes || size > cowBytes(config.SizeBytes)+blockBytes {
				t.Errorf("%d blocks take %d bytes, %v", blocks, size, err)
			}
			if err := d.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			d = r.restore(config)
			r.expectAll(d, pattern(blocks, 51))
			r.remove(d)
		}
		r.nothingRemains("by full disks")
	})
}

// writeBackwards writes a few blocks at a time, from the end, so that a disk does
// not fill in its own order.
func (r *rig) writeBackwards(d disk.Disk, data []byte) {
	r.t.Helper()
	const most = 13 * blockBytes
	f := r.mustOpen(d)
	buf := aligned(most)
	for end := len(data); end > 0; {
		at := max(0, end-most)
		if _, err := f.WriteAt(buf[:copy(buf, data[at:end])], int64(at)); err != nil {
			r.t.Fatalf("write block %d of %d: %v", at/blockBytes, len(data)/blockBytes, err)
		}
		end = at
	}
	if err := f.Close(); err != nil {
		r.t.Fatal(err)
	}
}

// TestCowBytes compares the size with a count of the chunks one by one.
func TestCowBytes(t *testing.T) {
	for chunks := int64(1); chunks < 5*perArea; chunks++ {
		next := int64(headerChunks + 1) // the first data chunk, behind the first metadata
		for range chunks {
			if next%(perArea+1) == headerChunks {
				next++
			}
			next++
		}
		needs := next
		if chunks%perArea == 0 { // the area is full: the next one is cleared
			needs = max(needs, headerChunks+chunks/perArea*(perArea+1)+1)
		}
		if got := cowBytes(chunks * chunkBytes); got < needs*chunkBytes || got > (needs+1)*chunkBytes {
			t.Fatalf("%d chunks: %d bytes for %d chunks", chunks, got, needs)
		}
		if got := cowBytes(chunks*chunkBytes - 1); got != cowBytes(chunks*chunkBytes) {
			t.Fatalf("a last chunk that is not whole: %d bytes", got)
		}
	}
}

// TestFullHost says what a guest sees when the host has no space for its
// overlay: errors, for ever. disk.Guard is there so that it does not come to it.
func TestFullHost(t *testing.T) {
	requireKernel(t)
	r := kernelRig(t)
	config := r.config("disk", r.file("base.img", pattern(64, 1)), 4096)
	if err := unix.Mount("tmpfs", config.Dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := testkit.Unmount(config.Dir); err != nil {
			t.Error(err)
		}
	}()
	d := r.create(config)
	written := pattern(128, 2)
	r.write(d, 0, written)
	err := r.tryWrite(d, 128*blockBytes, pattern(1024, 3))
	if !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOSPC) {
		t.Errorf("4 MiB more into 2 MiB: %v", err)
	}
	if data, err := r.tryRead(d, 0, blockBytes); err == nil && !bytes.Equal(data, written[:blockBytes]) {
		t.Error("what had been written reads as something else")
	} else {
		t.Logf("what had been written reads with: %v", err)
	}
	report, err := r.driver.Check(t.Context())
	if err != nil || len(report.Broken) != 1 || report.Broken[0].Dir != config.Dir || !strings.Contains(report.Broken[0].Cause, "Invalid") {
		t.Errorf("Check: %+v, %v", report, err)
	}
	for _, when := range []string{"while it is attached", "after it was detached"} {
		if again, err := r.driver.Restore(t.Context(), config); !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), "broken") {
			t.Errorf("Restore %s: %v, %v", when, again, err)
		}
		if err := d.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.driver.Discard(t.Context(), config.Dir); err != nil {
		t.Errorf("Discard: %v", err)
	}
	r.nothingRemains("on a full host")
}

// TestCreateOnAFullHost: a file system without space is seen at the create.
func TestCreateOnAFullHost(t *testing.T) {
	testkit.Root(t)
	everywhere(t, func(t *testing.T, r *rig) {
		config := r.config("disk", r.file("base.img", pattern(64, 1)), 4096)
		if err := unix.Mount("tmpfs", config.Dir, "tmpfs", 0, "size=64k"); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := testkit.Unmount(config.Dir); err != nil {
				t.Error(err)
			}
		}()
		filler := filepath.Join(config.Dir, "filler")
		if err := os.WriteFile(filler, make([]byte, 60<<10), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := r.driver.Create(t.Context(), config); !sandbox.Is(err, sandbox.KindNoSpace) {
			t.Errorf("error %v, want kind %s", err, sandbox.KindNoSpace)
		}
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		r.nothingRemains("on a full host")
	})
}
