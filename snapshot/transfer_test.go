package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/snapshot"
	"github.com/dormouse-sandbox/dormouse/snapshot/blob"
)

// pushed is a store with the reference "it", and a blob store that has it too.
func pushed(t *testing.T) (dir string, flat model, blobs *blob.Mem) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "s")
	flat, _ = whole(t, dir)
	s, err := snapshot.Open(snapshot.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	blobs = &blob.Mem{}
	for range 2 { // the second time there is nothing to do
		if err := s.Push(t.Context(), blobs, "it"); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return dir, flat, blobs
}

func TestPullOnAnotherMachine(t *testing.T) {
	_, flat, blobs := pushed(t)
	dir := t.TempDir()
	s := open(t, dir)
	for range 2 {
		if err := s.Pull(t.Context(), blobs, "it"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Collect(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	holds(t, s, "it", flat)
	if report, err := s.Verify(t.Context(), "it"); err != nil || len(report.Damage) > 0 || report.Objects != 1 {
		t.Errorf("%+v, %v", report, err)
	}
}

// TestPullTrustsNobody: whatever of a blob store is damaged or missing, nothing
// is given the name.
func TestPullTrustsNobody(t *testing.T) {
	_, _, blobs := pushed(t)
	keys, err := blobs.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range keys {
		r, err := blobs.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		spoiled := bytes.Clone(data)
		spoiled[len(spoiled)/2] ^= 4
		for name, now := range map[string][]byte{"flipped": spoiled, "cut": data[:len(data)/2], "gone": nil} {
			err := blobs.Put(t.Context(), key, bytes.NewReader(now), int64(len(now)))
			if name == "gone" {
				err = blobs.Delete(t.Context(), key)
			}
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			s, err := snapshot.Open(snapshot.Config{Dir: dir})
			if err != nil {
				t.Fatal(err)
			}
			err = s.Pull(t.Context(), blobs, "it")
			if _, known := s.Ref("it"); known == nil && !strings.HasPrefix(key, "refs/") || err == nil && !strings.HasPrefix(key, "refs/") {
				t.Errorf("%s %s: pull says %v", key, name, err)
			}
			if _, err := s.Collect(t.Context(), nil); err != nil {
				t.Error(err)
			}
			if left := files(t, dir); len(left) > 0 && err != nil {
				t.Errorf("%s %s left %v", key, name, left)
			}
			_ = s.Close() // nothing can be lost
		}
		if err := blobs.Put(t.Context(), key, bytes.NewReader(data), int64(len(data))); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRepair spoils every file of a snapshot and fetches it again; without a
// store to fetch from it says what is lost.
func TestRepair(t *testing.T) {
	dir, flat, blobs := pushed(t)
	s := open(t, dir)
	for name := range files(t, dir) {
		if filepath.Dir(name) == "refs" {
			continue
		}
		path := filepath.Join(dir, name)
		for _, spoil := range []func() error{
			func() error { return errors.Join(os.Chmod(path, 0o600), os.Truncate(path, 30)) },
			func() error { return os.Remove(path) },
		} {
			if err := spoil(); err != nil {
				t.Fatal(err)
			}
			if _, lost, err := s.Repair(t.Context(), nil, "it"); err != nil || len(lost) != 1 || lost[0].File != path {
				t.Errorf("%s without a store: lost %+v, %v", name, lost, err)
			}
			repaired, lost, err := s.Repair(t.Context(), blobs, "it")
			if err != nil || len(lost) > 0 || len(repaired) != 1 || repaired[0].File != path {
				t.Errorf("%s: repaired %+v, lost %+v, %v", name, repaired, lost, err)
			}
			holds(t, s, "it", flat)
		}
	}
}

// TestRepairBelowAnOpenImage: who has an image open of what is repaired closes it
// as any other, and the next one reads the new file.
func TestRepairBelowAnOpenImage(t *testing.T) {
	dir, flat, blobs := pushed(t)
	s := open(t, dir)
	ref, err := s.Ref("it")
	if err != nil {
		t.Fatal(err)
	}
	image, err := s.Image(ref.Manifests["memory"])
	if err != nil {
		t.Fatal(err)
	}
	path := image.Layer(0).Path()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if repaired, lost, err := s.Repair(t.Context(), blobs, "it"); err != nil || len(repaired) != 1 || len(lost) > 0 {
		t.Fatalf("%v, %v, %v", repaired, lost, err)
	}
	holds(t, s, "it", flat)
	for range 2 {
		if err := image.Close(); err != nil {
			t.Error(err)
		}
	}
	holds(t, s, "it", flat)
}

// TestPullBelowAnOpenImage: what is fetched in place of a damaged layer is what
// the next image reads, though another one has the damaged file open.
func TestPullBelowAnOpenImage(t *testing.T) {
	dir, flat, blobs := pushed(t)
	s := open(t, dir)
	ref, err := s.Ref("it")
	if err != nil {
		t.Fatal(err)
	}
	image, err := s.Image(ref.Manifests["memory"])
	if err != nil {
		t.Fatal(err)
	}
	path := image.Layer(0).Path()
	if err := errors.Join(os.Chmod(path, 0o600), os.Truncate(path, 30)); err != nil {
		t.Fatal(err)
	}
	if err := s.Pull(t.Context(), blobs, "it"); err != nil {
		t.Fatal(err)
	}
	holds(t, s, "it", flat)
	if err := image.Close(); err != nil {
		t.Error(err)
	}
	holds(t, s, "it", flat)
}

// TestFlattenBelowAnOpenImage: likewise, of a layer that is written anew.
func TestFlattenBelowAnOpenImage(t *testing.T) {
	s := open(t, t.TempDir())
	l := newLine(t, s, 400, 3)
	for generation := 1; generation <= 4; generation++ {
		l.next(generation)
	}
	pin, err := s.Flatten(t.Context(), l.pin.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Release()
	before, err := s.Image(pin.Digest)
	if err != nil {
		t.Fatal(err)
	}
	fresh := before.Layer(len(before.Manifest().Layers) - 1).Path() // the one that Flatten has written
	if err := errors.Join(os.Chmod(fresh, 0o600), os.Truncate(fresh, 30)); err != nil {
		t.Fatal(err)
	}
	l.flatten()
	if l.pin.Digest != pin.Digest {
		t.Fatal("the second time it is another manifest")
	}
	l.check()
	if err := before.Close(); err != nil {
		t.Error(err)
	}
	l.check()
}

// TestCollectDuringPull: what is announced and not here yet is no reason to
// delete nothing.
func TestCollectDuringPull(t *testing.T) {
	_, flat, blobs := pushed(t)
	s := open(t, t.TempDir())
	slow := collecting{Store: blobs, store: s}
	if err := s.Pull(t.Context(), slow, "it"); err != nil {
		t.Fatal(err)
	}
	holds(t, s, "it", flat)
}

// collecting runs a collection before everything that is fetched.
type collecting struct {
	blob.Store
	store *snapshot.Store
}

func (c collecting) Get(ctx context.Context, key string) (io.ReadCloser, error) {
	if _, err := c.store.Collect(ctx, nil); err != nil {
		return nil, err
	}
	return c.Store.Get(ctx, key)
}
