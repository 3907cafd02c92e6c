package dm

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// owner is a user that a node can be given to.
func owner() (uid, gid int) {
	if os.Geteuid() == 0 {
		return 65533, 65532
	}
	return os.Geteuid(), os.Getegid()
}

// TestFlattenIsWhatADiskReads: over several layers, with writes on top.
func TestFlattenIsWhatADiskReads(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		config, want := r.layered(3000, 40)
		d := r.create(config)
		r.expectAll(d, want)
		for _, at := range []int64{0, 77 * blockBytes, 2999 * blockBytes, 3010 * blockBytes} {
			data := pattern(3, uint64(at)+5)
			data = data[:min(len(data), len(want)-int(at))]
			r.write(d, at, data)
			copy(want[at:], data)
		}
		r.write(d, 500*blockBytes, make([]byte, 4*blockBytes)) // zeros over data
		copy(want[500*blockBytes:], make([]byte, 4*blockBytes))
		r.expectAll(d, want)

		flat := filepath.Join(r.dir, "flat")
		if err := r.driver.Flatten(t.Context(), config, flat); err != nil {
			t.Fatal(err)
		}
		if got, read := r.hashFile(flat), r.hash(d, config.SizeBytes); got != read {
			t.Errorf("the flat file has hash %x, the device %x", got, read)
		}
		if got, err := os.ReadFile(flat); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the flat file is not what was written: %v", err)
		}
		if size, err := sparse.AllocatedAt(flat); err != nil || size > int64(len(want))*9/10 {
			t.Errorf("the flat file takes %d bytes of %d though much of it is zeros: %v", size, len(want), err)
		}
		if err := r.driver.Flatten(t.Context(), config, flat); !sandbox.Is(err, sandbox.KindExists) {
			t.Errorf("over a file that exists: %v", err)
		}
		if err := os.Remove(flat); err != nil {
			t.Fatal(err)
		}
		r.remove(d)
		r.nothingRemains("by flattening")
	})
}

// layered makes a base of blocks blocks in extents of at most longest blocks from
// three layers, and tells what a disk over it reads.
func (r *rig) layered(blocks, longest int) (disk.Config, []byte) {
	r.t.Helper()
	const inLayer = 1500
	var contents [3][]byte
	l := Layout{}
	for i := range contents {
		contents[i] = pattern(inLayer, uint64(i)+100)
		l.Layers = append(l.Layers, r.file(fmt.Sprint("layer", i), contents[i]))
	}
	want := make([]byte, (blocks+20)*blockBytes)
	for at, i := 0, 0; at < blocks; i++ {
		n := min(1+i*7%longest, blocks-at)
		e := Extent{Bytes: int64(n) * blockBytes, Layer: i%4 - 1}
		if e.Layer != Zero {
			from := (at * 13) % (inLayer - n + 1)
			e.Offset = int64(from) * blockBytes
			copy(want[at*blockBytes:(at+n)*blockBytes], contents[e.Layer][from*blockBytes:])
		}
		l.Extents = append(l.Extents, e)
		at += n
	}
	path := filepath.Join(r.dir, "base.layout")
	if err := WriteLayout(path, l); err != nil {
		r.t.Fatal(err)
	}
	config := r.config("disk", "", blocks+20)
	config.Layout = path
	return config, want
}

func (r *rig) expectAll(d disk.Disk, want []byte) {
	r.t.Helper()
	f := r.mustOpen(d)
	defer func() { _ = f.Close() }() // read only
	buf := aligned(copyBytes)
	for at := 0; at < len(want); at += copyBytes {
		part := buf[:min(copyBytes, len(want)-at)]
		if _, err := f.ReadAt(part, int64(at)); err != nil {
			r.t.Fatalf("read at %d: %v", at, err)
		}
		if i := bytes.Compare(part, want[at:at+len(part)]); i != 0 {
			r.t.Fatalf("wrong bytes between %d and %d", at, at+len(part))
		}
	}
}

// TestTenThousandExtents: one table of linear and zero rows.
func TestTenThousandExtents(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		const blocks = 15000 // in extents of one or two blocks
		config, want := r.layered(blocks, 2)
		l, err := readLayout(config.Layout)
		if err != nil || len(l.Extents) < 10000 {
			t.Fatalf("%d extents, %v", len(l.Extents), err)
		}
		for _, path := range l.Layers { // sealing is another cost
			if _, err := r.driver.sealed(t.Context(), path); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		d := r.create(config)
		created := time.Since(began)
		began = time.Now()
		r.expectAll(d, want)
		t.Logf("%d extents: created in %v, %d MiB read in %v", len(l.Extents), created, len(want)>>20, time.Since(began))
		began = time.Now()
		other := config
		other.Dir = r.config("other", "", 1).Dir
		o := r.create(other)
		t.Logf("a second disk over the same base: created in %v", time.Since(began))
		r.remove(d, o)
		r.nothingRemains("by a base of many extents")
	})
}
