package dm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// loopsOver counts the loop devices over a file.
func (r *rig) loopsOver(path string) int {
	r.t.Helper()
	all, err := r.look.Loops(r.driver.prefix())
	if err != nil {
		r.t.Fatal(err)
	}
	n := 0
	for _, l := range all {
		if l.sameFile(path) {
			n++
		}
	}
	return n
}

func (r *rig) expectLayer(path string, disks int) {
	r.t.Helper()
	layers, err := r.driver.Layers()
	if err != nil || len(layers) != 1 || layers[0].File != path || layers[0].Disks != disks {
		r.t.Errorf("layers %+v, %v; want %s under %d disks", layers, err, path, disks)
	}
	if data, tree := r.loopsOver(path), r.loopsOver(path+treeSuffix); data != 1 || tree != 1 {
		r.t.Errorf("%d loop devices over the layer and %d over its tree, want 1 each", data, tree)
	}
}

// TestTenDisksShareOneLayer: ten disks, one loop device for their layer and one
// for its tree; so it is for the next process, when the one that made them was
// killed; and there is none when the last disk is gone.
func TestTenDisksShareOneLayer(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		const n = 10
		content := pattern(300, 1)
		base := r.file("base.img", content)
		var configs []disk.Config
		for i := range n {
			configs = append(configs, r.config(fmt.Sprint("disk", i), base, 300))
		}
		if r.fake == nil {
			whole := configs[0]
			whole.Dir = strings.TrimSuffix(whole.Dir, "0")
			r.send(errand{Config: whole, Do: "create-ten"}, "")
		} else {
			for _, c := range configs {
				r.create(c)
			}
			r.process.kill()
		}
		r.start()
		r.expectLayer(base, n)
		var disks []disk.Disk
		for i, c := range configs {
			d := r.restore(c)
			disks = append(disks, d)
			r.expect(d, int64(i)*blockBytes, content[i*blockBytes:][:blockBytes])
		}
		r.expectLayer(base, n)
		for i, d := range disks {
			r.remove(d)
			if i < n-1 {
				r.expectLayer(base, n-1-i)
			}
		}
		if layers, err := r.driver.Layers(); err != nil || len(layers) != 0 {
			t.Errorf("layers %+v, %v", layers, err)
		}
		r.nothingRemains("by ten disks")
	})
}

// TestAfterAReboot: the kernel knows nothing any more; what was written is there.
func TestAfterAReboot(t *testing.T) {
	r := fakeRig(t)
	content := pattern(300, 1)
	config := r.config("disk", r.file("base.img", content), 400)
	d := r.create(config)
	written := pattern(290, 2)
	r.write(d, 100*blockBytes, written)
	if err := r.fake.reboot(); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.look = r.fake.process()
	d = r.restore(config)
	r.expect(d, 100*blockBytes, written)
	r.expect(d, 0, content[:100*blockBytes])
	r.remove(d)
	r.nothingRemains("after a reboot")
}

// TestBusyDiskStays: removing a disk that somebody has open fails after the
// limit, says who has it, and changes nothing.
func TestBusyDiskStays(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		r.cfg.BusyLimit = 300 * time.Millisecond
		r.start()
		content := pattern(64, 1)
		config := r.config("disk", r.file("base.img", content), 64)
		config.UID, config.GID = owner()
		d := r.create(config)
		r.write(d, 0, []byte("precious"))
		open := r.mustOpen(d)
		before := strings.Join(append(r.remains(), r.files()...), "\n")
		node, err := os.Lstat(d.Path())
		if err != nil {
			t.Fatal(err)
		}
		for name, remove := range map[string]func(context.Context) error{
			"Remove":  d.Remove,
			"Discard": func(ctx context.Context) error { return r.driver.Discard(ctx, config.Dir) },
			"Sweep":   func(ctx context.Context) error { return r.driver.Sweep(ctx, nil) },
		} {
			began := time.Now()
			err := remove(t.Context())
			if took := time.Since(began); took < r.cfg.BusyLimit {
				t.Errorf("%s: gave up after %v, before its limit of %v", name, took, r.cfg.BusyLimit)
			}
			if !sandbox.Is(err, sandbox.KindBusy) || !strings.Contains(err.Error(), fmt.Sprintf("open in process %d (", os.Getpid())) {
				t.Errorf("%s: %v, want kind %s and the process that has it", name, err, sandbox.KindBusy)
			}
			if after := strings.Join(append(r.remains(), r.files()...), "\n"); after != before {
				t.Errorf("%s changed\n%s\nto\n%s", name, before, after)
			}
			if again, err := os.Lstat(d.Path()); err != nil || !os.SameFile(node, again) {
				t.Errorf("%s: another node: %v", name, err)
			}
		}
		if _, err := r.driver.Create(t.Context(), config); !sandbox.Is(err, sandbox.KindExists) {
			t.Errorf("Create: %v", err)
		}
		if err := d.Close(t.Context()); err != nil { // what a VMM has open stays attached
			t.Errorf("Close: %v", err)
		}
		r.expect(d, 0, []byte("precious"))
		r.expect(d, blockBytes, content[blockBytes:])
		if err := open.Close(); err != nil {
			t.Fatal(err)
		}
		d = r.restore(config)
		r.expect(d, 0, []byte("precious"))
		r.remove(d)
		r.nothingRemains("by a busy disk")
	})
}

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

// TestFreshOverlayIsSmall: a disk of 10 GiB reports what it takes, not what it
// could.
func TestFreshOverlayIsSmall(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		config := r.config("disk", r.file("base.img", pattern(64, 1)), 10<<30/blockBytes)
		d := r.create(config)
		size, err := d.Allocated()
		if err != nil || size < blockBytes || size > 64<<10 {
			t.Errorf("%d bytes, %v; want some kilobytes", size, err)
		}
		info, err := os.Stat(filepath.Join(config.Dir, cowFile))
		if err != nil || info.Size() <= config.SizeBytes {
			t.Errorf("a copy-on-write file of %d bytes for a disk of %d: %v", info.Size(), config.SizeBytes, err)
		}
		r.write(d, 9<<30, pattern(256, 4))
		if grew, err := d.Allocated(); err != nil || grew < size+900<<10 || grew > size+1200<<10 {
			t.Errorf("1 MiB written: from %d to %d bytes, %v", size, grew, err)
		}
		r.remove(d)
		r.nothingRemains("by a large disk")
	})
}

// TestTwoHundredCycles asks what 200 disks have left behind, half of which were
// the only ones over their base.
func TestTwoHundredCycles(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		base := r.file("base.img", pattern(64, 1))
		kept := r.create(r.config("kept", base, 64))
		r.cycle(base, 1)
		half := 100
		if r.fake == nil && !testkit.IsLong() {
			half = 20 // those over the fake are all made
		}
		before, fds, mounts := strings.Join(r.remains(), "\n"), testkit.OpenFDs(t), len(testkit.Mounts(t, r.dir))
		r.cycle(base, half)
		if after := strings.Join(r.remains(), "\n"); after != before {
			t.Errorf("from\n%s\nto\n%s", before, after)
		}
		r.remove(kept)
		r.cycle(base, half)
		r.nothingRemains(fmt.Sprintf("by %d disks", 2*half))
		if after := testkit.OpenFDs(t); after > fds {
			t.Errorf("from %d open files to %d", fds, after)
		}
		if after := testkit.Mounts(t, r.dir); len(after) > mounts {
			t.Errorf("from %d mounts to %q", mounts, after)
		}
	})
}

// cycle makes and removes n disks, four at a time.
func (r *rig) cycle(base string, n int) {
	r.t.Helper()
	const workers = 4
	var wg sync.WaitGroup
	for w := range workers {
		config := r.config(fmt.Sprint("cycle", w), base, 64)
		wg.Go(func() {
			for i := w; i < n; i += workers {
				d, err := r.driver.Create(r.t.Context(), config)
				if err == nil {
					err = d.Remove(r.t.Context())
				}
				if err != nil {
					r.t.Errorf("disk %d: %v", i, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

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

// TestManyAtOnce creates, closes, restores and removes disks on two bases at
// once, while others look.
func TestManyAtOnce(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		const workers = 8
		rounds := 6
		if testkit.InLab() && !testkit.IsLong() {
			rounds = 2
		}
		contents := [][]byte{pattern(64, 1), pattern(64, 2)}
		bases := []string{r.file("base0.img", contents[0]), r.file("base1.img", contents[1])}
		var configs [workers]disk.Config
		for i := range configs {
			configs[i] = r.config(fmt.Sprint("disk", i), bases[i%2], 64)
		}
		ctx, stop := context.WithCancel(t.Context())
		var watch, wg sync.WaitGroup
		watch.Go(func() {
			for ctx.Err() == nil {
				report, err := r.driver.Check(ctx)
				if err != nil || len(report.Broken)+len(report.Damage) > 0 {
					t.Errorf("Check: %+v, %v", report, err)
				}
				if _, err := r.driver.Layers(); err != nil {
					t.Errorf("Layers: %v", err)
				}
			}
		})
		for i := range workers {
			wg.Go(func() {
				for round := range rounds {
					if err := r.life(configs[i], contents[i%2], byte(i*rounds+round+1)); err != nil {
						t.Errorf("disk %d, round %d: %v", i, round, err)
						return
					}
				}
			})
		}
		wg.Wait()
		stop()
		watch.Wait()
		r.nothingRemains("by many at once")
	})
}

// life is all of a disk's.
func (r *rig) life(config disk.Config, content []byte, mark byte) error {
	ctx := r.t.Context()
	d, err := r.driver.Create(ctx, config)
	if err != nil {
		return err
	}
	mine := bytes.Repeat([]byte{mark}, blockBytes)
	if err := r.tryWrite(d, 0, mine); err != nil {
		return err
	}
	if err := d.Close(ctx); err != nil {
		return err
	}
	if d, err = r.driver.Restore(ctx, config); err != nil {
		return err
	}
	got, err := r.tryRead(d, 0, 2*blockBytes)
	if err != nil {
		return err
	}
	if !bytes.Equal(got[:blockBytes], mine) || !bytes.Equal(got[blockBytes:], content[blockBytes:2*blockBytes]) {
		return errors.New("wrong bytes")
	}
	return d.Remove(ctx)
}

// TestStaleNode: a node of another device, which a crash left, is put right, and
// one of nobody is swept.
func TestStaleNode(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		config := r.config("disk", r.file("base.img", pattern(64, 1)), 64)
		d := r.create(config)
		name := filepath.Base(d.Path())
		stray := r.driver.prefix() + overlayKind + "stray"
		for _, n := range []string{name, stray} {
			if err := errors.Join(r.look.RemoveNode(n), r.look.MakeNode(n, unix.Mkdev(loopMajor, 99), 1, 1)); err != nil && os.Geteuid() == 0 {
				t.Fatal(err)
			}
		}
		d = r.restore(config)
		r.expect(d, 0, pattern(64, 1))
		if err := r.driver.Sweep(t.Context(), []string{config.Dir}); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(filepath.Join(r.cfg.NodeDir, stray)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the stray node is still there: %v", err)
		}
		r.expect(d, 0, pattern(64, 1))
		r.remove(d)
		r.nothingRemains("after stale nodes")
	})
}

// TestInstancesAreApart: a sweep takes away nothing of another instance, over the
// same base and in the same folder of nodes.
func TestInstancesAreApart(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		base := r.file("base.img", pattern(64, 1))
		d := r.create(r.config("disk", base, 64))
		r.write(d, 0, []byte("mine"))
		before := strings.Join(r.remains(), "\n")
		other := *r
		other.cfg.Instance = randomInstance()
		other.driver = nil
		other.start()
		o := other.create(r.config("other", base, 64))
		other.write(o, 0, []byte("theirs"))
		r.expect(d, 0, []byte("mine"))
		if err := other.driver.Sweep(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if left := other.remains(); len(left) > 0 {
			t.Errorf("the other instance has %v", left)
		}
		if after := strings.Join(r.remains(), "\n"); after != before {
			t.Errorf("from\n%s\nto\n%s", before, after)
		}
		r.expect(d, 0, []byte("mine"))
		if err := other.driver.Discard(t.Context(), filepath.Join(r.dir, "other")); err != nil {
			t.Fatal(err)
		}
		if err := other.driver.Close(); err != nil {
			t.Fatal(err)
		}
		r.remove(d)
		r.nothingRemains("by two instances")
	})
}

// TestLongNames: a directory's name may be of any length, and in any alphabet.
func TestLongNames(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		base := r.file("base.img", pattern(4, 1))
		seen := map[string]bool{}
		for _, name := range []string{strings.Repeat("x", 250), strings.Repeat("x", 249) + "y", strings.Repeat("ü", 100), "a b;$(c)\n%d*?[", "-", "..."} {
			config := r.config(name, base, 4)
			d := r.create(config)
			if got := filepath.Base(d.Path()); seen[got] || len(got) > maxTag {
				t.Errorf("%q is the device %q", name, got)
			} else {
				seen[got] = true
			}
			r.expect(d, 0, pattern(4, 1))
			if err := osfs.SweepTemp(config.Dir); err != nil {
				t.Fatal(err)
			}
			r.remove(r.restore(config))
		}
		r.nothingRemains("by long names")
	})
}

// TestHalfABlockIsRefused, by us and with a reason; the kernel only says that its
// argument is invalid, as a table made by hand shows.
func TestHalfABlockIsRefused(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		config := r.config("disk", r.file("base.img", pattern(4, 1)), 8)
		config.SizeBytes += sector
		if _, err := r.driver.Create(t.Context(), config); !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), "a multiple of 4096") {
			t.Errorf("%v, want kind %s", err, sandbox.KindInvalid)
		}
		r.nothingRemains("by half a block")

		d := r.create(r.config("whole", config.Base, 8))
		bases, err := r.driver.devices(baseKind)
		must(t, err)
		f, err := os.OpenFile(r.file("cow", make([]byte, cowBytes(8*blockBytes))), os.O_RDWR, 0)
		must(t, err)
		h, err := r.look.Attach(f, r.driver.prefix()+"cow", false)
		must(t, err, f.Close())
		name := r.driver.prefix() + "test"
		must(t, r.look.Make(name))
		if err := r.look.Load(name, false, snapshotTable(4*blockBytes/sector+1, bases[0].dev, h.dev)); !errors.Is(err, unix.EINVAL) {
			t.Errorf("the kernel takes half a block over dm-verity: %v", err)
		}
		must(t, r.look.Drop(name), h.close(), os.Remove(f.Name()))
		r.remove(d)
		r.nothingRemains("by half a block")
	})
}
