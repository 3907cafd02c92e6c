package snapshot_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// TestTruth takes images through generations in which blocks are overwritten,
// zeroed and left alone, with flattens, forks and collections in between, and
// compares every block of every generation with a flat model.
func TestTruth(t *testing.T) {
	seeds := uint64(6)
	if testkit.IsLong() {
		seeds = 60
	}
	for seed := range seeds {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			s := open(t, t.TempDir())
			l := newLine(t, s, 3000+int64(seed)*7, seed)
			l.check()
			kept := map[string]*line{}
			for generation := 1; generation <= 12; generation++ {
				l.next(generation)
				l.check()
				switch l.rng.IntN(4) {
				case 0:
					l.flatten()
					l.check()
				case 1: // a fork: it stays as it is whatever happens to the other
					name := fmt.Sprint("fork", generation)
					l.ref(name)
					kept[name] = &line{t: t, store: s, flat: append(model(nil), l.flat...), rng: l.rng}
				case 2:
					if _, err := s.Collect(t.Context(), nil); err != nil {
						t.Fatal(err)
					}
				}
			}
			l.ref("last")
			l.pin.Release()
			if _, err := s.Collect(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			kept["last"] = l
			for name, k := range kept {
				ref, err := s.Ref(name)
				if err != nil {
					t.Fatal(err)
				}
				if k.pin, err = s.Pin(ref.Manifests["memory"]); err != nil {
					t.Fatal(err)
				}
				k.check()
				if report, err := s.Verify(t.Context(), name); err != nil || len(report.Damage) > 0 {
					t.Errorf("verify %s: %+v, %v", name, report, err)
				}
				k.pin.Release()
			}
		})
	}
}

// TestZeroedIsNotUntouched: a block that the guest zeroed must not come back
// with what the parent had, and one that nobody touched must.
func TestZeroedIsNotUntouched(t *testing.T) {
	s := open(t, t.TempDir())
	b, err := s.First(snapshot.Memory, 3)
	if err != nil {
		t.Fatal(err)
	}
	l := &line{t: t, store: s, flat: append(append(model(nil), keyed(0, 1)...), append(keyed(1, 1), keyed(2, 1)...)...)}
	if err := b.Put(t.Context(), 0, l.flat); err != nil {
		t.Fatal(err)
	}
	l.publish(b)
	image := l.image()
	b = s.Next(image)
	if err := b.Put(t.Context(), 1, make([]byte, block)); err != nil {
		t.Fatal(err)
	}
	l.publish(b)
	clear(l.flat.block(1))
	if got, want := b.Stats(), (snapshot.Stats{Put: 1, Zero: 1, Bytes: b.Stats().Bytes}); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
	after := l.image()
	got := make([]byte, 3*block)
	if _, err := after.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	l.compare(got, 0)
	if e := after.Manifest().Find(1); e.Layer != snapshot.Zero || e.Blocks != 1 {
		t.Errorf("the zeroed block is %+v", e)
	}
	_ = image.Close()
	_ = after.Close()
}

// TestCostFollowsChange: what is written is what has changed, also in the fifth
// generation, and what only looks dirty costs nothing.
func TestCostFollowsChange(t *testing.T) {
	s := open(t, t.TempDir())
	l := newLine(t, s, 20_000, 7)
	for generation := 1; generation <= 5; generation++ {
		image := l.image()
		b := s.Next(image)
		const changed = 1000
		for i := range int64(10_000) { // of which every tenth has changed
			at := 2 * i
			if i%10 == 0 {
				copy(l.flat.block(at), keyed(at, generation))
			}
			if err := b.Put(t.Context(), at, l.flat.block(at)); err != nil {
				t.Fatal(err)
			}
		}
		l.publish(b)
		_ = image.Close()
		stats := b.Stats()
		if stats.Written != changed || stats.Equal != 9000 {
			t.Errorf("generation %d: %+v", generation, stats)
		}
		if most := int64(changed*block*105/100 + 64<<10); stats.Bytes > most {
			t.Errorf("generation %d wrote %d bytes, at most %d", generation, stats.Bytes, most)
		}
	}
	l.check()
	image := l.image()
	defer func() { _ = image.Close() }()
	b := s.Next(image)
	if err := b.Put(t.Context(), 0, l.flat); err != nil {
		t.Fatal(err)
	}
	before := l.pin.Digest
	l.publish(b)
	if stats := b.Stats(); stats.Bytes != 0 || l.pin.Digest != before {
		t.Errorf("nothing has changed, and %d bytes were written", stats.Bytes)
	}
}

func TestBuilderRefuses(t *testing.T) {
	s := open(t, t.TempDir())
	for name, put := range map[string]func(b *snapshot.Builder) error{
		"half a block":       func(b *snapshot.Builder) error { return b.Put(t.Context(), 0, make([]byte, 100)) },
		"behind the end":     func(b *snapshot.Builder) error { return b.Put(t.Context(), 9, make([]byte, 2*block)) },
		"far behind the end": func(b *snapshot.Builder) error { return b.PutZero(1<<60, 1) },
		"before the start":   func(b *snapshot.Builder) error { return b.Put(t.Context(), -1, make([]byte, block)) },
		"a negative number":  func(b *snapshot.Builder) error { return b.PutZero(0, -1) },
		"the same block twice": func(b *snapshot.Builder) error {
			if err := b.Put(t.Context(), 3, keyed(3, 0)); err != nil {
				t.Error(err)
			}
			return b.Put(t.Context(), 3, keyed(3, 1))
		},
	} {
		b, err := s.First(snapshot.Disk, 10)
		if err != nil {
			t.Fatal(err)
		}
		if err := put(b); err == nil {
			t.Errorf("%s: no error", name)
		}
		if err := b.Abandon(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, blocks := range []int64{0, -1, snapshot.MaxBlocks + 1} {
		if _, err := s.First(snapshot.Memory, blocks); err == nil {
			t.Errorf("%d blocks: no error", blocks)
		}
	}
	if _, err := s.First(3, 1); err == nil {
		t.Error("an unknown kind: no error")
	}
}

func TestRefs(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	l := newLine(t, s, 100, 1)
	object, err := s.WriteObject(t.Context(), []byte("the state of the devices"))
	if err != nil {
		t.Fatal(err)
	}
	want := snapshot.Ref{
		Name: "a", Manifests: map[string]snapshot.Digest{"memory": l.pin.Digest},
		Objects: map[string]snapshot.Digest{"state": object.Digest}, Meta: []byte(`{"vcpus":2}`),
	}
	if err := s.SetRef(want); err != nil {
		t.Fatal(err)
	}
	got, err := s.Ref("a")
	if err != nil || got.Manifests["memory"] != l.pin.Digest || !strings.Contains(string(got.Meta), `"vcpus"`) {
		t.Errorf("%+v, %v", got, err)
	}
	data, err := s.Object(got.Objects["state"])
	if err != nil || string(data) != "the state of the devices" {
		t.Errorf("%q, %v", data, err)
	}
	for name, r := range map[string]snapshot.Ref{
		"a name that climbs":        {Name: "../a"},
		"no name":                   {},
		"a manifest that is absent": {Name: "b", Manifests: map[string]snapshot.Digest{"memory": snapshot.DigestOf([]byte("?"))}},
		"an object that is absent":  {Name: "b", Objects: map[string]snapshot.Digest{"state": l.pin.Digest}},
	} {
		if err := s.SetRef(r); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := s.Ref("b"); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("a refused reference is there: %v", err)
	}
	sizes, err := s.Size("a")
	if err != nil || sizes.All == 0 || sizes.Own != sizes.All {
		t.Errorf("%+v, %v", sizes, err)
	}
	want.Name = "copy"
	if err := s.SetRef(want); err != nil {
		t.Fatal(err)
	}
	if shared, err := s.Size("a"); err != nil || shared.All != sizes.All || shared.Own >= sizes.Own {
		t.Errorf("with a copy: %+v, %v", shared, err)
	}
	l.pin.Release()
	object.Release()
	for _, name := range []string{"a", "copy", "copy"} {
		if err := s.RemoveRef(name); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Collect(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if left := files(t, dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestSecondProcessIsRefused(t *testing.T) {
	dir := t.TempDir()
	open(t, dir)
	if _, err := snapshot.Open(snapshot.Config{Dir: dir}); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("%v", err)
	}
}
