package snapshot_test

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/dormouse-sandbox/dormouse/snapshot"
)

const block = snapshot.BlockBytes

func open(t testing.TB, dir string) *snapshot.Store {
	t.Helper()
	s, err := snapshot.Open(snapshot.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// keyed is a block whose content says where and when it was written.
func keyed(at int64, generation int) []byte {
	b := make([]byte, block)
	for i := 0; i < block; i += 16 {
		binary.LittleEndian.PutUint64(b[i:], uint64(at)<<16|uint64(generation)&0xffff)
		binary.LittleEndian.PutUint64(b[i+8:], uint64(i)*0x9e3779b97f4a7c15+1)
	}
	return b
}

// model is an image as one flat piece of bytes.
type model []byte

func (m model) block(at int64) []byte { return m[at*block:][:block] }

// line is an image through its generations, beside its model.
type line struct {
	t     testing.TB
	store *snapshot.Store
	flat  model
	pin   *snapshot.Pin
	rng   *rand.Rand
}

func newLine(t testing.TB, s *snapshot.Store, blocks int64, seed uint64) *line {
	t.Helper()
	l := &line{t: t, store: s, flat: make(model, blocks*block), rng: rand.New(rand.NewPCG(seed, 1))}
	b, err := s.First(snapshot.Memory, blocks)
	if err != nil {
		t.Fatal(err)
	}
	l.mutate(0)
	if err := b.Put(t.Context(), 0, l.flat); err != nil {
		t.Fatal(err)
	}
	l.publish(b)
	return l
}

func (l *line) publish(b *snapshot.Builder) {
	l.t.Helper()
	pin, err := b.Publish(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	if l.pin != nil {
		l.pin.Release()
	}
	l.pin = pin
}

// mutate overwrites some runs of blocks, zeroes others, and returns which blocks
// somebody who saw only the writes would call dirty: some of them are as before.
func (l *line) mutate(generation int) (dirty []int64) {
	blocks := int64(len(l.flat) / block)
	touched := map[int64]bool{}
	for range 1 + l.rng.IntN(12) {
		start := l.rng.Int64N(blocks)
		kind := l.rng.IntN(4)
		for at := start; at < min(blocks, start+1+l.rng.Int64N(40)); at++ {
			touched[at] = true
			switch kind {
			case 0:
				clear(l.flat.block(at))
			case 1, 2:
				copy(l.flat.block(at), keyed(at, generation))
			}
		}
	}
	for at := range blocks {
		if touched[at] {
			dirty = append(dirty, at)
		}
	}
	return dirty
}

// next makes another generation.
func (l *line) next(generation int) snapshot.Stats {
	l.t.Helper()
	image := l.image()
	dirty := l.mutate(generation)
	b := l.store.Next(image)
	for _, at := range dirty {
		if err := b.Put(l.t.Context(), at, l.flat.block(at)); err != nil {
			l.t.Fatal(err)
		}
	}
	l.publish(b)
	if err := image.Close(); err != nil {
		l.t.Error(err)
	}
	return b.Stats()
}

func (l *line) flatten() {
	l.t.Helper()
	pin, err := l.store.Flatten(l.t.Context(), l.pin.Digest)
	if err != nil {
		l.t.Fatal(err)
	}
	l.pin.Release()
	l.pin = pin
}

func (l *line) image() *snapshot.Image {
	l.t.Helper()
	image, err := l.store.Image(l.pin.Digest)
	if err != nil {
		l.t.Fatal(err)
	}
	return image
}

// check compares the whole image with the model, block for block and in odd
// pieces.
func (l *line) check() {
	l.t.Helper()
	image := l.image()
	got := make([]byte, len(l.flat))
	if _, err := image.ReadAt(got, 0); err != nil {
		l.t.Fatal(err)
	}
	l.compare(got, 0)
	for range 20 {
		at := l.rng.IntN(len(l.flat))
		part := got[:1+l.rng.IntN(min(200_000, len(l.flat)-at))]
		if _, err := image.ReadAt(part, int64(at)); err != nil {
			l.t.Fatal(err)
		}
		l.compare(part, at)
	}
	if err := image.Close(); err != nil {
		l.t.Error(err)
	}
}

func (l *line) compare(got []byte, at int) {
	l.t.Helper()
	if want := l.flat[at:][:len(got)]; !bytes.Equal(got, want) {
		for i := range got {
			if got[i] != want[i] {
				l.t.Fatalf("byte %d (block %d) is %#x, want %#x", at+i, (at+i)/block, got[i], want[i])
			}
		}
	}
}

// ref names what the line has now.
func (l *line) ref(name string) {
	l.t.Helper()
	err := l.store.SetRef(snapshot.Ref{Name: name, Manifests: map[string]snapshot.Digest{"memory": l.pin.Digest}})
	if err != nil {
		l.t.Fatal(err)
	}
}

// files lists everything in a store, relative to it.
func files(t testing.TB, dir string) map[string]int64 {
	t.Helper()
	out := map[string]int64{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == "lock" {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		out[rel] = info.Size()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
