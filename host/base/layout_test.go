package base_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/disk/dm"
	"github.com/dormouse-sandbox/dormouse/host/base"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// sealer notes which layers it is asked to seal.
type sealer struct{ sealed []string }

func (s *sealer) IsSealed(layer string) (bool, error) {
	for _, l := range s.sealed {
		if l == layer {
			return true, nil
		}
	}
	return false, nil
}

func (s *sealer) Seal(_ context.Context, layer string) error {
	s.sealed = append(s.sealed, layer)
	return nil
}

// next makes another generation of an image, larger than the one before it.
func (p *place) next(of snapshot.Digest, generation int) snapshot.Digest {
	p.t.Helper()
	parent, err := p.store.Image(of)
	p.must(err)
	grown := parent.Manifest().Blocks + 500
	p.data = append(p.data, make([]byte, 500*block)...)
	b := p.store.Next(parent)
	p.must(b.Grow(grown))
	for at := int64(generation); at < grown; at += 97 {
		copy(p.data[at*block:], fmt.Sprintf("block %d of generation %d", at, generation))
	}
	clear(p.data[200*block : 210*block])
	p.must(b.Put(p.t.Context(), 0, p.data))
	pin, err := b.Publish(p.t.Context())
	p.must(err, parent.Close())
	p.t.Cleanup(pin.Release)
	return pin.Digest
}

func (p *place) must(errs ...error) {
	p.t.Helper()
	if err := errors.Join(errs...); err != nil {
		p.t.Fatal(err)
	}
}

// composed reads an image as a layout says.
func (p *place) composed(path string) (out []byte) {
	p.t.Helper()
	data, err := os.ReadFile(path)
	var l dm.Layout
	p.must(err, json.Unmarshal(data, &l))
	for _, e := range l.Extents {
		part := make([]byte, e.Bytes)
		if e.Layer != dm.Zero {
			f, err := os.Open(l.Layers[e.Layer])
			p.must(err)
			_, err = f.ReadAt(part, e.Offset)
			p.must(err, f.Close())
		}
		out = append(out, part...)
	}
	return out
}

func TestALayoutIsTheImage(t *testing.T) {
	p := newPlace(t)
	s := &sealer{}
	d := p.imported()
	for generation := range 3 {
		path := filepath.Join(p.dir, fmt.Sprint("layout", generation))
		for range 2 {
			p.must(base.WriteLayout(t.Context(), p.store, d, path, s))
		}
		if got := p.composed(path); !bytes.Equal(got, p.data) {
			t.Errorf("generation %d: %d bytes that are not the %d of the image", generation, len(got), len(p.data))
		}
		if len(s.sealed) != generation+1 {
			t.Errorf("generation %d: sealed are %v", generation, s.sealed)
		}
		d = p.next(d, generation)
	}
}

// TestDamageIsNotSealed: a hash tree over wrong bytes would call them right.
func TestDamageIsNotSealed(t *testing.T) {
	p := newPlace(t)
	d := p.imported()
	m, err := p.store.Manifest(d)
	p.must(err)
	layer := p.store.LayerPath(m.Layers[0].Digest)
	f, err := os.OpenFile(layer, os.O_RDWR, 0)
	p.must(err)
	_, err = f.WriteAt([]byte{1}, 200*block)
	p.must(err, f.Close())
	s := &sealer{}
	path := filepath.Join(p.dir, "layout")
	err = base.WriteLayout(t.Context(), p.store, d, path, s)
	var corrupt *snapshot.CorruptError
	if !errors.As(err, &corrupt) || corrupt.File != layer || len(s.sealed) > 0 {
		t.Errorf("%v, sealed are %v", err, s.sealed)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("there is a layout all the same")
	}
}

// TestADiskLiesOnAManifest takes a disk through what a sandbox's goes through, on a
// kernel: from a template, on under a running VM, paused, and made again from that.
func TestADiskLiesOnAManifest(t *testing.T) {
	testkit.Root(t)
	if err := dm.Available(); err != nil {
		testkit.Require(t, "dm", false, err.Error())
	}
	p := newPlace(t)
	nodes := "/dev/dmtest-basel"
	driver, err := dm.Open(dm.Config{Instance: "basel", NodeDir: nodes})
	p.must(err)
	t.Cleanup(func() {
		if err := errors.Join(driver.Sweep(context.Background(), nil), driver.Close(), os.RemoveAll(nodes)); err != nil {
			t.Error(err)
		}
	})
	d := p.imported()
	for round := range 3 {
		config := disk.Config{Dir: filepath.Join(p.dir, fmt.Sprint("disk", round)), SizeBytes: int64(len(p.data)) + 500*block}
		config.Layout = filepath.Join(config.Dir, "base.json")
		p.must(os.Mkdir(config.Dir, 0o755), base.WriteLayout(t.Context(), p.store, d, config.Layout, driver))
		overlay, err := driver.Create(t.Context(), config)
		p.must(err)
		p.data = append(p.data, make([]byte, 500*block)...)

		p.write(overlay, 300*round, 200)
		then := bytes.Clone(p.data)
		before, err := overlay.Next(t.Context(), nil)
		p.must(err)
		p.write(overlay, 300*round+100, 200)
		snapshotted := p.publish(d, before)
		now, err := overlay.Changed(t.Context())
		p.must(err)
		if most := int64(300); blocksOf(now.Runs()) > most {
			t.Errorf("round %d: %d blocks have changed, of %d that were written", round, blocksOf(now.Runs()), most)
		}
		paused := p.publish(d, now)
		p.must(overlay.Remove(t.Context()))
		p.holds(paused)
		p.data, then = then, p.data
		p.holds(snapshotted)
		p.data = then
		d = paused
	}
}

func blocksOf(runs []disk.BlockRun) (n int64) {
	for _, r := range runs {
		n += r.Blocks
	}
	return n
}

// write writes blocks as a VMM does.
func (p *place) write(d disk.Disk, from, blocks int) {
	p.t.Helper()
	f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
	p.must(err)
	for at := from; at < from+blocks; at++ {
		clear(p.data[at*block:][:block])
		if at%5 != 0 {
			copy(p.data[at*block:], fmt.Sprintf("block %d of %s", at, d.Path()))
		}
	}
	_, err = f.WriteAt(p.data[from*block:][:blocks*block], int64(from)*block)
	p.must(err, unix.Fdatasync(int(f.Fd())), f.Close())
}

// publish makes the next generation from what has changed.
func (p *place) publish(of snapshot.Digest, c disk.Changes) snapshot.Digest {
	p.t.Helper()
	parent, err := p.store.Image(of)
	p.must(err)
	b := p.store.Next(parent)
	p.must(b.Grow(parent.Manifest().Blocks + 500))
	for _, r := range c.Runs() {
		data := make([]byte, r.Blocks*block)
		_, err := c.ReadAt(data, r.Start*block)
		p.must(err, b.Put(p.t.Context(), r.Start, data))
	}
	pin, err := b.Publish(p.t.Context())
	p.must(err, parent.Close(), c.Close())
	p.t.Cleanup(pin.Release)
	return pin.Digest
}
