package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// sparseFile writes a file without its zeros.
func sparseFile(t testing.TB, dir string, data []byte) *os.File {
	t.Helper()
	f, err := os.CreateTemp(dir, "image-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // the test has read it by then
	if _, err := sparse.Copy(f, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	return f
}

// with is zeros but for blocks that say where they are, in runs of (first, count).
func with(size int64, runs ...[2]int64) model {
	m := make(model, size)
	for _, r := range runs {
		for at := r[0]; at < r[0]+r[1]; at++ {
			copy(m[at*block:], keyed(at, 7))
		}
	}
	return m
}

func imported(t *testing.T, s *snapshot.Store, f *os.File) (*snapshot.Pin, snapshot.Stats) {
	t.Helper()
	pin, stats, err := s.Import(t.Context(), snapshot.Disk, f)
	if err != nil {
		t.Fatal(err)
	}
	return pin, stats
}

// reads compares an image with what it must be.
func reads(t *testing.T, s *snapshot.Store, d snapshot.Digest, want []byte) {
	t.Helper()
	image, err := s.Image(d)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = image.Close() }() // read only
	got := make([]byte, image.Manifest().Bytes())
	if _, err := image.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:len(want)], want) || !bytes.Equal(got[len(want):], make([]byte, len(got)-len(want))) {
		t.Errorf("%d bytes that are not the %d wanted", len(got), len(want))
	}
}

func TestImport(t *testing.T) {
	for _, tt := range []struct {
		name    string
		data    model
		written int64 // blocks
		extents int
	}{
		{"zeros only", with(1000 * block), 0, 1},
		{"one block", with(1000*block, [2]int64{500, 1}), 1, 3},
		{"all of it", with(700*block, [2]int64{0, 700}), 700, 1},
		{"a small gap is filled", with(1000*block, [2]int64{10, 20}, [2]int64{40, 20}), 50, 3},
		{"a larger gap is not", with(1000*block, [2]int64{10, 20}, [2]int64{46, 20}), 40, 5},
		{"across what is read at a time", with(1000*block, [2]int64{250, 300}), 300, 3},
		{"to the very end", with(1000*block, [2]int64{999, 1}), 1, 2},
		{"an end within a block", with(100*block+5, [2]int64{100, 0})[:100*block+5], 0, 1},
		{"data at an end within a block", append(with(100*block), "end"...), 1, 2},
		{"much data to an end within a block", append(with(100*block, [2]int64{50, 50}), "end"...), 51, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, filepath.Join(dir, "store"))
			f := sparseFile(t, dir, tt.data)
			pin, stats := imported(t, s, f)
			reads(t, s, pin.Digest, tt.data)
			m, err := s.Manifest(pin.Digest)
			if err != nil || m.Kind != snapshot.Disk || m.Generation != 0 || m.Extents() != tt.extents || stats.Written != tt.written {
				t.Errorf("%d extents, %d blocks written (%v)", m.Extents(), stats.Written, err)
			}
			again, _ := imported(t, s, f)
			if again.Digest != pin.Digest {
				t.Errorf("the second time it is %s, not %s", again.Digest, pin.Digest)
			}
			elsewhere := sparseFile(t, "/dev/shm", tt.data) // another file system, so that nothing can be shared
			defer func() { _ = os.Remove(elsewhere.Name()) }()
			if again, _ := imported(t, s, elsewhere); again.Digest != pin.Digest {
				t.Errorf("from another file system it is %s, not %s", again.Digest, pin.Digest)
			}
			if err := s.SetRef(snapshot.Ref{Name: "it", Manifests: map[string]snapshot.Digest{"disk": pin.Digest}}); err != nil {
				t.Fatal(err)
			}
			if report, err := s.Verify(t.Context(), "it"); err != nil || len(report.Damage) > 0 {
				t.Errorf("%+v, %v", report, err)
			}
		})
	}
}

// TestImportSharesBlocks where the file system can. All other tests here do without
// root, and are to go on doing so: who wants this one runs it as root.
func TestImportSharesBlocks(t *testing.T) {
	testkit.Require(t, "root", os.Geteuid() == 0, "to mount a file system")
	testkit.Tool(t, "mkfs.xfs")
	image, dir := filepath.Join(t.TempDir(), "fs"), t.TempDir()
	for _, line := range [][]string{{"truncate", "-s", "400M", image}, {"mkfs.xfs", "-q", image}, {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.CommandContext(t.Context(), line[0], line[1:]...).CombinedOutput(); err != nil {
			testkit.Require(t, "xfs", false, fmt.Sprintf("%v: %v: %s", line, err, out))
		}
	}
	t.Cleanup(func() {
		if err := testkit.Unmount(dir); err != nil {
			t.Error(err)
		}
	})
	data := with(64<<20, [2]int64{0, 10_000})
	f := sparseFile(t, dir, data)
	s, err := snapshot.Open(snapshot.Config{Dir: filepath.Join(dir, "store")})
	if err != nil {
		t.Fatal(err)
	}
	before := free(t, dir)
	pin, _ := imported(t, s, f)
	if took := before - free(t, dir); took > 4<<20 {
		t.Errorf("a layer of %d bytes took %d", 10_000*block, took)
	}
	reads(t, s, pin.Digest, data)
	if err := errors.Join(s.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func free(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	d, err := os.Open(dir)
	if err == nil {
		err = errors.Join(unix.Syncfs(int(d.Fd())), unix.Statfs(dir, &st), d.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return int64(st.Bfree) * st.Bsize
}

// TestImportFailsAt fails every step of an import once.
func TestImportFailsAt(t *testing.T) {
	data := with(300*block, [2]int64{3, 200})
	for _, point := range []string{
		"snapshot/layer/create", "snapshot/layer/write", "snapshot/layer/fsync", "osfs/snapshot-layer/rename", "osfs/snapshot-layer/fsync-dir",
		"osfs/snapshot-manifest/create", "osfs/snapshot-manifest/write", "osfs/snapshot-manifest/fsync", "osfs/snapshot-manifest/rename", "osfs/snapshot-manifest/fsync-dir",
	} {
		dir := t.TempDir()
		s := open(t, dir)
		f := sparseFile(t, t.TempDir(), data)
		disarm := fault.Set(point, fault.Nth(1, fault.Fail))
		pin, _, err := s.Import(t.Context(), snapshot.Disk, f)
		disarm()
		if !errors.Is(err, fault.ErrInjected) || pin != nil {
			t.Errorf("%s: %v, %v", point, pin, err)
		}
		if _, err := s.Collect(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if left := files(t, dir); len(left) > 0 {
			t.Errorf("%s left %v", point, left)
		}
		pin, _ = imported(t, s, f)
		reads(t, s, pin.Digest, data)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := open(t, t.TempDir())
	if _, _, err := s.Import(ctx, snapshot.Disk, sparseFile(t, t.TempDir(), data)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, _, err := s.Import(t.Context(), snapshot.Disk, sparseFile(t, t.TempDir(), nil)); err == nil {
		t.Error("an empty file: no error")
	}
}

// TestGrow: the next generation of a disk may be larger than the first.
func TestGrow(t *testing.T) {
	s := open(t, t.TempDir())
	l := newLine(t, s, 40, 9)
	parent := l.pin.Digest
	for _, grown := range []int64{40, 41, 300, 300} {
		image := l.image()
		b := s.Next(image)
		if err := b.Grow(grown); err != nil {
			t.Fatal(err)
		}
		before := int64(len(l.flat)) / block
		l.flat = append(l.flat, make(model, grown*block-int64(len(l.flat)))...)
		if grown == 300 {
			copy(l.flat.block(299), keyed(299, 3))
			if err := errors.Join(b.Put(t.Context(), 20, l.flat.block(20)), b.PutZero(250, 10), b.Put(t.Context(), 299, l.flat.block(299))); err != nil {
				t.Fatal(err)
			}
		}
		l.publish(b)
		l.check()
		m, err := s.Manifest(l.pin.Digest)
		if err != nil || m.Blocks != grown {
			t.Fatalf("%+v, %v", m, err)
		}
		if same := l.pin.Digest == parent; same != (before == grown) || !same && m.Parent != parent {
			t.Errorf("from %d to %d blocks: %s with the parent %s, after %s", before, grown, l.pin.Digest, m.Parent, parent)
		}
		parent = l.pin.Digest
		if err := image.Close(); err != nil {
			t.Error(err)
		}
	}
	l.next(8)
	l.check()
	l.flatten()
	l.check()

	image := l.image()
	defer func() { _ = image.Close() }() // read only
	for name, grow := range map[string]func(b *snapshot.Builder) error{
		"smaller":          func(b *snapshot.Builder) error { return b.Grow(299) },
		"too large":        func(b *snapshot.Builder) error { return b.Grow(snapshot.MaxBlocks + 1) },
		"after a put":      func(b *snapshot.Builder) error { return errors.Join(b.PutZero(0, 1), b.Grow(400)) },
		"and a put behind": func(b *snapshot.Builder) error { return errors.Join(b.Grow(400), b.PutZero(400, 1)) },
	} {
		b := s.Next(image)
		if err := grow(b); err == nil {
			t.Errorf("%s: no error", name)
		}
		if err := b.Abandon(); err != nil {
			t.Error(err)
		}
	}
}

// TestWhatLiesBesideALayer belongs to it: it is counted, and goes with it.
func TestWhatLiesBesideALayer(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	l := newLine(t, s, 40, 9)
	l.ref("it")
	m, err := s.Manifest(l.pin.Digest)
	if err != nil {
		t.Fatal(err)
	}
	before, err := s.Size("it")
	if err != nil {
		t.Fatal(err)
	}
	layer := s.LayerPath(m.Layers[0].Digest)
	for name, data := range map[string][]byte{
		layer + ".verity": make([]byte, 5*block), layer + ".verity.json": []byte("{}"), layer + "2": []byte("somebody's"),
		filepath.Join(dir, "layers", "README"): []byte("somebody's"),
	} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	after, err := s.Size("it")
	if err != nil || after.All < before.All+6*block || after.All > before.All+8*block || after.Own-before.Own != after.All-before.All {
		t.Errorf("%+v became %+v, %v", before, after, err)
	}
	if c, err := s.Collect(t.Context(), nil); err != nil || c.Files != 0 {
		t.Errorf("%+v, %v", c, err)
	}
	l.pin.Release()
	if err := s.RemoveRef("it"); err != nil {
		t.Fatal(err)
	}
	c, err := s.Collect(t.Context(), nil)
	if err != nil || c.Files != 4 {
		t.Errorf("%+v, %v", c, err)
	}
	if left := files(t, dir); len(left) != 2 {
		t.Errorf("left: %v", left)
	}
	// After a crash between the two.
	if err := os.WriteFile(layer+".verity", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := s.Collect(t.Context(), nil); err != nil || c.Files != 1 {
		t.Errorf("%+v, %v", c, err)
	}
}
