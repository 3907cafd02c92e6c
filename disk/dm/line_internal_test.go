package dm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// moved is a disk with content of its own before each of several moves.
func (r *rig) moved(name string, moves int) (disk.Config, disk.Disk, []byte) {
	r.t.Helper()
	const blocks = 700
	content := pattern(blocks, 1)
	config := r.config(name, r.file("base.img", content), blocks)
	d := r.create(config)
	want := bytes.Clone(content)
	for i := range moves + 1 {
		at, data := int64(i*40)*blockBytes, pattern(300, uint64(10+i))
		copy(want[at:], data)
		r.write(d, at, data)
		if i < moves {
			r.next(d)
		}
	}
	return config, d, want
}

func (r *rig) next(d disk.Disk) {
	r.t.Helper()
	before, err := d.Next(r.t.Context(), nil)
	must(r.t, err)
	must(r.t, before.Close())
}

// expectChanged compares a disk with what it must be, through Changed.
func (r *rig) expectChanged(d disk.Disk, want []byte, runs []disk.BlockRun) {
	r.t.Helper()
	c, err := d.Changed(r.t.Context())
	must(r.t, err)
	got := make([]byte, len(want))
	_, err = c.ReadAt(got, 0)
	must(r.t, err, c.Close())
	if !bytes.Equal(got, want) {
		r.t.Error("the disk is not what was written")
	}
	if !slices.Equal(c.Runs(), runs) {
		r.t.Errorf("%v have changed, want %v", c.Runs(), runs)
	}
}

// TestALineIsOneDisk: what was written before and between moves, more than one
// area of exceptions each time, is there again after Close and Restore, and what
// the kernel holds is one line.
func TestALineIsOneDisk(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		config, d, want := r.moved("disk", 3)
		runs := []disk.BlockRun{{Start: 0, Blocks: 420}}
		r.expectChanged(d, want, runs)
		r.expectLayer(config.Base, 1)
		must(t, d.Close(t.Context()))
		if left := r.remains(); len(left) > 0 {
			t.Errorf("left by Close: %v", left)
		}
		d = r.restore(config)
		r.expectChanged(d, want, runs)
		r.expectLayer(config.Base, 1)
		if again := r.restore(config); again.Path() != d.Path() {
			t.Errorf("%s and %s", again.Path(), d.Path())
		}
		r.remove(d)
		r.nothingRemains("by a disk that has moved on")
	})
}

// TestMovesUnderLoad: requests that are on their way while a disk moves on wait, and
// none is lost or done twice.
func TestMovesUnderLoad(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		const blocks, moves = 64, 6
		config := r.config("disk", r.file("base.img", pattern(blocks, 1)), blocks)
		d := r.create(config)
		var stop atomic.Bool
		var writes atomic.Int64
		var wg sync.WaitGroup
		for i := range 4 {
			f := r.mustOpen(d)
			wg.Go(func() {
				defer func() { _ = f.Close() }() // every write was looked at
				buf := aligned(blockBytes)
				for round := 1; !stop.Load(); round++ {
					at := int64(i + 4*(round%(blocks/4)))
					copy(buf, fmt.Sprintf("block %d, round %d;", at, round))
					_, err := f.WriteAt(buf, at*blockBytes)
					if errors.Is(err, unix.EAGAIN) { // a fake kernel lets nobody wait
						continue
					}
					if err == nil {
						_, err = f.ReadAt(buf, at*blockBytes)
					}
					if want := fmt.Sprintf("block %d, round %d;", at, round); err == nil && !bytes.HasPrefix(buf, []byte(want)) {
						err = fmt.Errorf("block %d has %.40q, not %q", at, buf, want)
					}
					if err != nil && !errors.Is(err, unix.EAGAIN) {
						t.Error(err)
						return
					}
					writes.Add(1)
				}
			})
		}
		for range moves {
			before := writes.Load()
			testkit.Eventually(t, 20*time.Second, "something is written", func() bool { return writes.Load() > before+20 || t.Failed() })
			r.next(d)
		}
		stop.Store(true)
		wg.Wait()
		if n, err := r.driver.overlay(config).last(); err != nil || n != moves {
			t.Errorf("it has moved on %d times (%v)", n, err)
		}
		sum := r.hash(d, config.SizeBytes)
		must(t, d.Close(t.Context()))
		d = r.restore(config)
		if r.hash(d, config.SizeBytes) != sum {
			t.Error("after Restore it is another disk")
		}
		r.remove(d)
		r.nothingRemains("by moves under load")
	})
}

// TestALineAfterAReboot, with a file that was prepared and never used.
func TestALineAfterAReboot(t *testing.T) {
	r := fakeRig(t)
	config, d, want := r.moved("disk", 2)
	must(t, d.Prepare(t.Context()), r.fake.reboot())
	r.start()
	r.look = r.fake.process()
	d = r.restore(config)
	r.expectChanged(d, want, []disk.BlockRun{{Start: 0, Blocks: 380}})
	r.write(d, 0, []byte("behind the boot"))
	copy(want, "behind the boot")
	r.next(d)
	r.expectChanged(d, want, []disk.BlockRun{{Start: 0, Blocks: 380}})
	r.remove(d)
	r.nothingRemains("after a reboot")
}

// TestALineWithAGap is a disk that has lost what was written to it.
func TestALineWithAGap(t *testing.T) {
	r := fakeRig(t)
	config, d, _ := r.moved("disk", 2)
	must(t, d.Close(t.Context()), os.Remove(filepath.Join(config.Dir, cowName(1))))
	if _, err := r.driver.Restore(t.Context(), config); !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), cowName(1)+" is missing") {
		t.Errorf("%v", err)
	}
	must(t, r.driver.Discard(t.Context(), config.Dir))
	r.nothingRemains("by a disk with a gap")
}

// TestNothingOfTheOneBefore: files without a record are no part of the next disk.
func TestNothingOfTheOneBefore(t *testing.T) {
	r := fakeRig(t)
	config, d, _ := r.moved("disk", 2)
	must(t, d.Close(t.Context()), os.Remove(filepath.Join(config.Dir, recordFile)))
	d = r.create(config)
	r.expectChanged(d, pattern(700, 1), nil)
	r.remove(d)
	r.nothingRemains("by two disks in one place")
}

// TestWhatIsReadKeepsADisk: a disk is not taken from somebody who still reads what
// it was.
func TestWhatIsReadKeepsADisk(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		r.cfg.BusyLimit = 200 * time.Millisecond
		r.start()
		config, d, want := r.moved("disk", 1)
		before, err := d.Next(t.Context(), nil)
		must(t, err)
		stood := strings.Join(r.remains(), "\n")
		for name, remove := range map[string]func() error{
			"Remove":  func() error { return d.Remove(t.Context()) },
			"Discard": func() error { return r.driver.Discard(t.Context(), config.Dir) },
			"Sweep":   func() error { return r.driver.Sweep(t.Context(), nil) },
		} {
			if err := remove(); !sandbox.Is(err, sandbox.KindBusy) {
				t.Errorf("%s: %v, want kind %s", name, err, sandbox.KindBusy)
			}
			if now := strings.Join(r.remains(), "\n"); now != stood {
				t.Errorf("%s changed\n%s\nto\n%s", name, stood, now)
			}
		}
		got := make([]byte, len(want))
		if _, err := before.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("it is not what the disk was (%v)", err)
		}
		for range 2 {
			must(t, before.Close())
		}
		r.remove(d)
		r.nothingRemains("by a disk that was read")
	})
}

// TestMovesOfWhatIsNotThere says what is wrong.
func TestMovesOfWhatIsNotThere(t *testing.T) {
	r := fakeRig(t)
	config := r.config("disk", r.file("base.img", pattern(4, 1)), 4)
	d := r.create(config)
	r.write(d, 0, pattern(1, 2))
	calls := map[string]func() error{
		"Changed": func() error { _, err := d.Changed(t.Context()); return err },
		"Prepare": func() error { return d.Prepare(t.Context()) },
		"Next":    func() error { _, err := d.Next(t.Context(), nil); return err },
	}
	live := r.fake.devs[filepath.Base(d.Path())].live
	live.store.valid = false
	if err := calls["Next"](); !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), "broken") {
		t.Errorf("Next of a broken one: %v", err)
	}
	live.store.valid = true
	must(t, d.Close(t.Context()))
	for name, call := range calls {
		if err := call(); !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), "not attached") {
			t.Errorf("%s of a closed one: %v", name, err)
		}
	}
	r.remove(d)
	r.nothingRemains("by all that")
}

// TestABrokenLineIsFound: Check names the directory of a disk that has moved on.
func TestABrokenLineIsFound(t *testing.T) {
	r := fakeRig(t)
	config, d, _ := r.moved("disk", 1)
	r.fake.devs[filepath.Base(d.Path())].live.store.valid = false
	if report := r.check(); len(report.Broken) != 1 || report.Broken[0].Dir != config.Dir {
		t.Errorf("%+v", report)
	}
	r.remove(d)
}

// TestSweepFindsParts of which the overlay is gone, and the nodes of views.
func TestSweepFindsParts(t *testing.T) {
	r := fakeRig(t)
	_, d, _ := r.moved("disk", 2)
	name := filepath.Base(d.Path())
	o := &overlay{d: r.driver, name: name}
	part, err := r.look.Status(o.part(0))
	must(t, err, r.look.Drop(name), r.look.MakeNode(o.part(0), part.dev, 0, 0))
	must(t, r.driver.Sweep(t.Context(), nil))
	if left := r.remains(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// cowWith is a copy-on-write file with these exceptions.
func cowWith(exceptions ...[2]uint64) []byte {
	raw := make([]byte, cowBytes(300*blockBytes))
	copy(raw, cowMagic)
	for i, word := range []uint32{1, 1, chunkSectors} {
		binary.LittleEndian.PutUint32(raw[4+4*i:], word)
	}
	for i, e := range exceptions {
		at := chunkBytes*(headerChunks+i/perArea*(perArea+1)) + i%perArea*exceptionBytes
		binary.LittleEndian.PutUint64(raw[at:], e[0])
		binary.LittleEndian.PutUint64(raw[at+8:], e[1])
	}
	return raw
}

func exceptions(t testing.TB, raw []byte) ([]disk.BlockRun, int64, error) {
	t.Helper()
	set := disk.NewBlocks(300 * blockBytes)
	n, err := readExceptions(t.Context(), bytes.NewReader(raw), int64(len(raw)), 300*blockBytes, set)
	return set.Runs(), n, err
}

func TestExceptions(t *testing.T) {
	var all [][2]uint64
	for i := range uint64(300) {
		to := 2 + i
		if i >= perArea {
			to++ // past the second area's metadata
		}
		all = append(all, [2]uint64{299 - i, to})
	}
	for _, tt := range []struct {
		name string
		raw  []byte
		n    int64
		runs string
		err  string
	}{
		{"a file that was never attached", make([]byte, 4*chunkBytes), 0, "[]", ""},
		{"none", cowWith(), 0, "[]", ""},
		{"two", cowWith([2]uint64{7, 2}, [2]uint64{8, 3}), 2, "[{7 2}]", ""},
		{"more than an area", cowWith(all...), 300, "[{0 300}]", ""},
		{"an area that the file has no room for", cowWith(all[:perArea]...)[:(headerChunks+perArea+1)*chunkBytes], perArea, "[{44 256}]", ""},
		{"one of a block behind the disk", cowWith([2]uint64{300, 2}), 0, "", "chunk 300 of the disk"},
		{"one behind the file", cowWith([2]uint64{7, 1 << 40}), 0, "", "not possible"},
		{"one in a chunk of exceptions", cowWith([2]uint64{7, 1}), 0, "", "not possible"},
		{"another magic number", append([]byte("SnAq"), cowWith()[4:]...), 0, "", `begins with "SnAq"`},
		{"one that was given up", append([]byte(cowMagic+"\x00"), cowWith()[5:]...), 0, "", "broken"},
		{"another version", append(cowWith()[:8:8], append([]byte{2}, cowWith()[9:]...)...), 0, "", "version 2"},
		{"chunks of another size", append(cowWith()[:12:12], append([]byte{16}, cowWith()[13:]...)...), 0, "", "chunks of 16"},
		{"nothing", nil, 0, "", "unexpected EOF"},
		{"half a header", cowWith()[:100], 0, "", "unexpected EOF"},
	} {
		runs, n, err := exceptions(t, tt.raw)
		switch {
		case tt.err != "":
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: error %v, want %q", tt.name, err, tt.err)
			}
		case err != nil || n != tt.n || fmt.Sprint(runs) != tt.runs:
			t.Errorf("%s: %d in %v, %v; want %d in %s", tt.name, n, runs, err, tt.n, tt.runs)
		}
	}
	var broken *brokenError
	if _, _, err := exceptions(t, append([]byte(cowMagic+"\x00"), cowWith()[5:]...)); !errors.As(err, &broken) {
		t.Errorf("one that was given up: %v", err)
	}
}

// FuzzExceptions: any bytes are exceptions of blocks that the disk has, or an error.
func FuzzExceptions(f *testing.F) {
	f.Add([]byte{}, []byte{})
	f.Add(cowWith()[:16], cowWith([2]uint64{7, 2})[chunkBytes:][:16])
	f.Add([]byte{}, bytes.Repeat([]byte{1, 0, 0, 0, 0, 0, 0, 0}, 600))
	f.Fuzz(func(t *testing.T, head, area []byte) {
		raw := cowWith()
		copy(raw[:chunkBytes], head)
		copy(raw[chunkBytes:], area)
		runs, n, err := exceptions(t, raw)
		if err != nil {
			return
		}
		blocks := int64(0)
		for _, r := range runs {
			if blocks += r.Blocks; r.Start < 0 || r.End() > 300 {
				t.Errorf("%v", runs)
			}
		}
		if blocks > n {
			t.Errorf("%d blocks in %d exceptions", blocks, n)
		}
	})
}
