package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// story is one of everything that is written to a store, on one that holds the
// reference "before" already. It goes on after an error, as a host would.
func story(s *snapshot.Store) error {
	ctx := context.Background()
	var errs []error
	note := func(err error) bool { errs = append(errs, err); return err == nil }
	ref, err := s.Ref("before")
	if !note(err) {
		return err
	}
	image, err := s.Image(ref.Manifests["memory"])
	if !note(err) {
		return errors.Join(errs...)
	}
	b := s.Next(image)
	note(b.Put(ctx, 1, keyed(1, 99)))
	note(b.Put(ctx, 5, make([]byte, block)))
	pin, err := b.Publish(ctx)
	note(image.Close())
	if note(err) {
		object, err := s.WriteObject(ctx, []byte("devices"))
		if note(err) {
			note(s.SetRef(snapshot.Ref{
				Name: "after", Manifests: map[string]snapshot.Digest{"memory": pin.Digest}, Objects: map[string]snapshot.Digest{"state": object.Digest},
			}))
			object.Release()
		}
		flat, err := s.Flatten(ctx, pin.Digest)
		if note(err) {
			note(s.SetRef(snapshot.Ref{Name: "after", Manifests: map[string]snapshot.Digest{"memory": flat.Digest}}))
			flat.Release()
		}
		pin.Release()
	}
	note(s.RemoveRef("doomed"))
	_, err = s.Collect(ctx, nil)
	note(err)
	return errors.Join(errs...)
}

// stage makes the store that a story begins with.
func stage(t *testing.T, dir string) model {
	t.Helper()
	s, err := snapshot.Open(snapshot.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	l := newLine(t, s, 64, 5)
	for at := range int64(8) {
		copy(l.flat.block(at), keyed(at, 1))
	}
	image := l.image()
	b := s.Next(image)
	if err := b.Put(t.Context(), 0, l.flat); err != nil {
		t.Fatal(err)
	}
	l.publish(b)
	_ = image.Close()
	l.ref("before")
	other := newLine(t, s, 32, 6)
	other.ref("doomed")
	other.pin.Release()
	l.pin.Release()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return l.flat
}

// sound looks at what a story left that broke somewhere: every reference is whole
// and verified, the old one has its bytes, the new one those of the story, and
// after a collection nothing is there that no reference needs.
func sound(t *testing.T, dir string, before model) {
	t.Helper()
	s, err := snapshot.Open(snapshot.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }() // nothing was written
	after := bytes.Clone(before)
	copy(after[block:], keyed(1, 99))
	clear(after[5*block : 6*block])
	holds(t, s, "before", before)
	if _, err := s.Ref("after"); !sandbox.Is(err, sandbox.KindNotFound) {
		holds(t, s, "after", after)
	}
	if _, err := s.Collect(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	refs, err := s.Refs()
	if err != nil {
		t.Fatal(err)
	}
	need := map[string]bool{}
	for _, r := range refs {
		if report, err := s.Verify(t.Context(), r.Name); err != nil || len(report.Damage) > 0 {
			t.Errorf("%s: %+v, %v", r.Name, report, err)
		}
		need["refs/"+r.Name+".json"] = true
		for _, d := range r.Manifests {
			m, err := s.Manifest(d)
			if err != nil {
				t.Fatal(err)
			}
			need["manifests/"+d.String()+".manifest"] = true
			for _, l := range m.Layers {
				need["layers/"+l.Digest.String()+".layer"] = true
			}
		}
		for _, d := range r.Objects {
			need["objects/"+d.String()+".object"] = true
		}
	}
	if have, want := slices.Sorted(maps.Keys(files(t, dir))), slices.Sorted(maps.Keys(need)); !slices.Equal(have, want) {
		t.Errorf("the store has %v, needed are %v", have, want)
	}
}

func holds(t *testing.T, s *snapshot.Store, name string, want model) {
	t.Helper()
	r, err := s.Ref(name)
	if err != nil {
		t.Fatal(err)
	}
	image, err := s.Image(r.Manifests["memory"])
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = image.Close() }() // read only
	got := make([]byte, len(want))
	if _, err := image.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s does not hold what it should (%v)", name, err)
	}
}

// points lists every step of a story, each as often as it is passed.
func points(t *testing.T) []string {
	t.Helper()
	dir := t.TempDir()
	stage(t, dir)
	var mu sync.Mutex
	count := map[string]int{}
	var seen []string
	fault.Observe(func(p string) {
		mu.Lock()
		defer mu.Unlock()
		count[p]++
		seen = append(seen, fmt.Sprintf("%s@%d", p, count[p]))
	})
	s, err := snapshot.Open(snapshot.Config{Dir: dir})
	if err == nil {
		err = errors.Join(story(s), s.Close())
	}
	fault.Observe(nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(seen) < 30 {
		t.Fatalf("a story passes only %v", seen)
	}
	return seen
}

// TestFailsAt fails every step once.
func TestFailsAt(t *testing.T) {
	for _, p := range points(t) {
		t.Run(p, func(t *testing.T) {
			dir := t.TempDir()
			before := stage(t, dir)
			name, nth, _ := strings.Cut(p, "@")
			var n int
			if _, err := fmt.Sscan(nth, &n); err != nil {
				t.Fatal(err)
			}
			defer fault.Set(name, fault.Nth(n, fault.Fail))()
			s, err := snapshot.Open(snapshot.Config{Dir: dir})
			if err == nil {
				err = errors.Join(story(s), s.Close())
			}
			if !errors.Is(err, fault.ErrInjected) {
				t.Fatalf("the story did not notice: %v", err)
			}
			fault.Set(name, nil)
			for path := range files(t, dir) {
				if strings.HasPrefix(filepath.Base(path), ".tmp-") {
					t.Errorf("left behind: %s", path)
				}
			}
			sound(t, dir, before)
		})
	}
}

// TestKilledAt kills the process at every step.
func TestKilledAt(t *testing.T) {
	for _, p := range points(t) {
		t.Run(p, func(t *testing.T) {
			dir := t.TempDir()
			before := stage(t, dir)
			name, nth, _ := strings.Cut(p, "@")
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestStoryInAChild$", "-test.v")
			cmd.Env = append(os.Environ(), "SNAPSHOT_STORY="+dir, "DORMOUSE_FAULT="+name+"=kill@"+nth)
			if out, err := cmd.CombinedOutput(); err == nil {
				t.Fatalf("the child was not killed:\n%s", out)
			}
			sound(t, dir, before)
		})
	}
}

// TestStoryInAChild is the process that TestKilledAt kills.
func TestStoryInAChild(t *testing.T) {
	dir := os.Getenv("SNAPSHOT_STORY")
	if dir == "" {
		return // it is another test's process
	}
	s, err := snapshot.Open(snapshot.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	_ = story(s)
}
