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
