package qcow_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/disk/qcow"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func create(t *testing.T, d *qcow.Driver, c disk.Config) disk.Disk {
	t.Helper()
	o, err := d.Create(t.Context(), c)
	must(t, err)
	return o
}

func ignore(context.Context, string) error { return nil }

func next(t *testing.T, o disk.Disk) {
	t.Helper()
	before, err := o.Next(t.Context(), ignore)
	must(t, err)
	must(t, before.Close())
}

// whole reads a disk through Changed.
func whole(t *testing.T, o disk.Disk, c disk.Config) []byte {
	t.Helper()
	changes, err := o.Changed(t.Context())
	must(t, err)
	got := make([]byte, c.SizeBytes)
	_, err = changes.ReadAt(got, 0)
	must(t, err, changes.Close())
	return got
}

// at writes to an overlay, whichever of the line it is.
type at struct {
	disk.Disk
	path string
}

func (a at) Path() string { return a.path }

// TestTheSameAsQEMU compares what an overlay holds with what qemu-img says of it,
// after everything that a guest's requests can lead to, with both sorts of tables.
func TestTheSameAsQEMU(t *testing.T) {
	d := driver(t)
	for _, shape := range []string{"cluster_size=128k,extended_l2=on", "cluster_size=4k"} {
		t.Run(shape, func(t *testing.T) {
			c := config(t)
			o := create(t, d, c)
			must(t, os.Remove(o.Path()))
			run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", shape, "-F", "raw", "-b", c.Base, o.Path(), fmt.Sprint(c.SizeBytes))
			o, err := d.Restore(t.Context(), c)
			must(t, err)
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 0))
			for range 8 {
				var script []string
				for range 12 {
					n := 512 * (1 + rng.Int64N(600))
					from := rng.Int64N(c.SizeBytes-n) / 512 * 512
					verb := []string{"write -P 7", "write -P 0", "write -z", "write -z -u", "discard"}[rng.IntN(5)]
					script = append(script, "-c", fmt.Sprintf("%s %d %d", verb, from, n))
				}
				run(t, "qemu-io", append(append([]string{"-d", "unmap", "-f", "qcow2"}, script...), o.Path())...)
				sameAsMap(t, o, c)
			}
			run(t, "qemu-img", "check", "-q", o.Path())
		})
	}
}

func sameAsMap(t *testing.T, o disk.Disk, c disk.Config) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "qemu-img", "map", "--output=json", "-f", "qcow2", o.Path()).Output()
	must(t, err)
	var extents []struct {
		Start, Length int64
		Depth         int
		Present       bool
	}
	must(t, json.Unmarshal(out, &extents))
	want := disk.NewBlocks(c.SizeBytes)
	for _, e := range extents {
		if e.Depth == 0 && e.Present {
			want.Add(e.Start/disk.BlockBytes, (e.Length+disk.BlockBytes-1)/disk.BlockBytes)
		}
	}
	changes, err := o.Changed(t.Context())
	must(t, err)
	if got := changes.Runs(); !slices.Equal(got, want.Runs()) {
		t.Errorf("the overlay holds %v, QEMU says %v", got, want.Runs())
	}
	must(t, changes.Close())
	raw := filepath.Join(t.TempDir(), "raw")
	run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", o.Path(), raw)
	flat, err := os.ReadFile(raw)
	must(t, err)
	if !bytes.Equal(whole(t, o, c), flat) {
		t.Error("the bytes are others than QEMU's")
	}
}

// TestTheVMMStaysBehind: the server died, or the VMM failed, after an overlay was
// made and before the VMM went over. What it writes where it is counts all the
// same, also after the next move, which skips the one in between.
func TestTheVMMStaysBehind(t *testing.T) {
	d, c := driver(t), config(t)
	o := create(t, d, c)
	stays := at{o, o.Path()}
	write(t, o, 0, []byte("one"))
	if _, err := o.Next(t.Context(), func(context.Context, string) error { return errors.New("no answer") }); err == nil {
		t.Fatal("no error")
	}
	if o.Path() == stays.path {
		t.Fatal("the next VMM would be given an overlay that has another one on it")
	}
	write(t, stays, 8192, []byte("two"))
	for range 2 {
		got := whole(t, o, c)
		if string(got[:3]) != "one" || string(got[8192:8195]) != "two" {
			t.Errorf("%q, %q", got[:3], got[8192:8195])
		}
		again, err := d.Restore(t.Context(), c)
		must(t, err)
		o = again
	}
	told := ""
	before, err := o.Next(t.Context(), func(_ context.Context, path string) error { told = path; return nil })
	must(t, err)
	if told != o.Path() || filepath.Base(told) != "overlay-2.qcow2" {
		t.Errorf("the VMM was told %s, the disk is %s", told, o.Path())
	}
	write(t, o, 8192, []byte("three"))
	got := make([]byte, 3)
	_, err = before.ReadAt(got, 8192)
	must(t, err, before.Close())
	if string(got) != "two" {
		t.Errorf("before the move there was %q", got)
	}
}

// TestNextFailsAt breaks each step of a move in turn: the disk is whole, and the
// same move then works.
func TestNextFailsAt(t *testing.T) {
	d := driver(t)
	points := []string{"osfs/disk-overlay/rename", "osfs/disk-overlay/fsync-dir", "qcow/switch"}
	for _, point := range points {
		c := config(t)
		o := create(t, d, c)
		write(t, o, 0, []byte("mine"))
		disarm := fault.Set(point, fault.Nth(1, fault.Fail))
		_, err := o.Next(t.Context(), ignore)
		disarm()
		if !errors.Is(err, fault.ErrInjected) {
			t.Errorf("%s: %v", point, err)
		}
		if entries, _ := filepath.Glob(filepath.Join(c.Dir, ".tmp-*")); len(entries) > 0 {
			t.Errorf("%s left %v", point, entries)
		}
		next(t, o)
		write(t, o, 4096, []byte("more"))
		again, err := d.Restore(t.Context(), c)
		must(t, err)
		if got := whole(t, again, c); string(got[:4]) != "mine" || string(got[4096:4100]) != "more" {
			t.Errorf("after %s: %q, %q", point, got[:4], got[4096:4100])
		}
		must(t, again.Remove(t.Context()))
		if entries, _ := os.ReadDir(c.Dir); len(entries) > 0 {
			t.Errorf("after %s there is %v", point, entries)
		}
	}
}

// TestHalfRemoved: a disk of which the first overlay is gone is no disk, and the
// next one in its place has nothing of it.
func TestHalfRemoved(t *testing.T) {
	d, c := driver(t), config(t)
	o := create(t, d, c)
	write(t, o, 0, []byte("secret"))
	next(t, o)
	write(t, o, 4096, []byte("secret"))
	disarm := fault.Set("osfs/disk-overlay/remove", fault.Nth(3, fault.Fail))
	err := o.Remove(t.Context())
	disarm()
	if !errors.Is(err, fault.ErrInjected) {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(c.Dir, "overlay-1.qcow2")); err != nil {
		t.Fatalf("nothing is left, so that this shows nothing: %v", err)
	}
	if _, err := d.Restore(t.Context(), c); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("Restore: %v", err)
	}
	o = create(t, d, c)
	if got := whole(t, o, c); bytes.Contains(got, []byte("secret")) {
		t.Error("the new disk has what the old one had")
	}
}

// TestRestoreDistrustsTheLine: each overlay must lie on the one before it.
func TestRestoreDistrustsTheLine(t *testing.T) {
	d := driver(t)
	for name, spoil := range map[string]func(t *testing.T, c disk.Config){
		"one is missing": func(t *testing.T, c disk.Config) {
			must(t, os.Remove(filepath.Join(c.Dir, "overlay-1.qcow2")))
		},
		"the last lies on another file": func(t *testing.T, c disk.Config) {
			run(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "/etc/shadow", filepath.Join(c.Dir, "overlay-2.qcow2"))
		},
		"the last calls the one before it raw": func(t *testing.T, c disk.Config) {
			run(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", filepath.Join(c.Dir, "overlay-1.qcow2"), filepath.Join(c.Dir, "overlay-2.qcow2"))
		},
		"one in the middle has another size": func(t *testing.T, c disk.Config) {
			patch(t, filepath.Join(c.Dir, "overlay-1.qcow2"), 24, 1<<30)
		},
		"one in the middle is a link": func(t *testing.T, c disk.Config) {
			path := filepath.Join(c.Dir, "overlay-1.qcow2")
			must(t, os.Rename(path, path+".real"), os.Symlink(path+".real", path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := config(t)
			o := create(t, d, c)
			for range 2 {
				write(t, o, 0, []byte("mark"))
				next(t, o)
			}
			spoil(t, c)
			if _, err := d.Restore(t.Context(), c); err == nil || sandbox.Is(err, sandbox.KindNotFound) {
				t.Errorf("Restore: %v", err)
			}
		})
	}
}

// patch writes a number into a file.
func patch(t *testing.T, path string, offset int64, value uint64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt(binary.BigEndian.AppendUint64(nil, value), offset)
	must(t, err, f.Close())
}

func number(t *testing.T, path string, offset int64) uint64 {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	raw := make([]byte, 8)
	_, err = f.ReadAt(raw, offset)
	must(t, err, f.Close())
	return binary.BigEndian.Uint64(raw)
}

// TestTablesAreDistrusted: what QEMU never writes is an error, and not something
// else of the host's read as a disk.
func TestTablesAreDistrusted(t *testing.T) {
	d := driver(t)
	const l1Place = 40 // in the header
	l1 := func(t *testing.T, path string) int64 { return int64(number(t, path, l1Place)) }
	l2 := func(t *testing.T, path string) int64 {
		return int64(number(t, path, l1(t, path)) & 0x00fffffffffffe00)
	}
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, path string)
		want  string
	}{
		{"no L1 table", func(t *testing.T, path string) { patch(t, path, l1Place, 0) }, "L1 table"},
		{"an L1 table within a cluster", func(t *testing.T, path string) { patch(t, path, l1Place, uint64(l1(t, path)+512)) }, "L1 table"},
		{"an L1 table behind the end", func(t *testing.T, path string) { patch(t, path, l1Place, 1<<40) }, "unexpected EOF"},
		{"an L1 table behind every end", func(t *testing.T, path string) { patch(t, path, l1Place, 1<<63) }, "L1 table"},
		{"an L1 table of nothing", func(t *testing.T, path string) { patch(t, path, 32, 0) }, "0 entries"},
		{"an L1 table without end", func(t *testing.T, path string) { patch(t, path, 32, 1<<32-1) }, "not possible"},
		{"encryption", func(t *testing.T, path string) { patch(t, path, 32, 2<<32|1) }, "encryption 2"},
		{"small clusters", func(t *testing.T, path string) { patch(t, path, 16, number(t, path, 16)&^0xffffffff|9) }, "clusters of 2^9"},
		{"clusters without end", func(t *testing.T, path string) { patch(t, path, 16, number(t, path, 16)&^0xffffffff|63) }, "clusters of 2^63"},
		{"a feature of the future", func(t *testing.T, path string) { patch(t, path, 72, number(t, path, 72)|1<<40) }, "features"},
		{"another compression", func(t *testing.T, path string) { patch(t, path, 72, number(t, path, 72)|1<<3) }, "features"},
		{"an L2 table within a cluster", func(t *testing.T, path string) {
			patch(t, path, l1(t, path), uint64(l2(t, path)+512))
		}, "multiple of a cluster"},
		{"an L2 table behind the end", func(t *testing.T, path string) { patch(t, path, l1(t, path), 1<<40) }, "unexpected EOF"},
		{"a compressed cluster", func(t *testing.T, path string) {
			patch(t, path, l2(t, path), number(t, path, l2(t, path))|1<<62)
		}, "compressed"},
		{"a cluster within another", func(t *testing.T, path string) {
			patch(t, path, l2(t, path), number(t, path, l2(t, path))+512)
		}, "no multiple"},
		{"blocks that are there and zero", func(t *testing.T, path string) { patch(t, path, l2(t, path)+8, 1<<32|1) }, "not possible"},
		{"blocks that are nowhere", func(t *testing.T, path string) { patch(t, path, l2(t, path), 0) }, "not possible"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := config(t)
			o := create(t, d, c)
			write(t, o, 0, []byte("mark"))
			tt.spoil(t, o.Path())
			changes, err := o.Changed(t.Context())
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if changes != nil {
				t.Errorf("changes came with the error")
				_ = changes.Close() // read only
			}
			if c, err := o.Next(t.Context(), ignore); err == nil {
				t.Error("it moves on all the same")
				_ = c.Close() // read only
			}
		})
	}
}

// TestAClusterBehindTheEnd reads as zeros, as it does for QEMU.
func TestAClusterBehindTheEnd(t *testing.T) {
	d, c := driver(t), config(t)
	o := create(t, d, c)
	write(t, o, 0, bytes.Repeat([]byte{7}, 128<<10))
	l1 := int64(number(t, o.Path(), 40))
	l2 := int64(number(t, o.Path(), l1) & 0x00fffffffffffe00)
	patch(t, o.Path(), l2, 1<<40)
	if got := whole(t, o, c)[:128<<10]; !bytes.Equal(got, make([]byte, len(got))) {
		t.Error("it does not read as zeros")
	}
}

// TestChangesHoldWhatTheyOpened, so that a disk may go before they do.
func TestChangesHoldWhatTheyOpened(t *testing.T) {
	d, c := driver(t), config(t)
	o := create(t, d, c)
	write(t, o, 0, []byte("mark"))
	changes, err := o.Changed(t.Context())
	must(t, err)
	must(t, o.Remove(t.Context()))
	got := make([]byte, 4)
	if _, err := changes.ReadAt(got, 0); err != nil || string(got) != "mark" {
		t.Errorf("%q, %v", got, err)
	}
	for range 2 {
		must(t, changes.Close())
	}
	if _, err := changes.ReadAt(got, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}
