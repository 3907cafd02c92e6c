package snapshot_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// whole makes a store with one reference that has a bit of everything: a line of
// several layers, an object, zeros.
func whole(t testing.TB, dir string) (flat model, digest snapshot.Digest) {
	t.Helper()
	s, err := snapshot.Open(snapshot.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	l := newLine(t, s, 400, 3)
	for generation := 1; generation <= 4; generation++ {
		l.next(generation)
	}
	object, err := s.WriteObject(t.Context(), bytes.Repeat([]byte("state"), 700))
	if err != nil {
		t.Fatal(err)
	}
	err = s.SetRef(snapshot.Ref{
		Name: "it", Manifests: map[string]snapshot.Digest{"memory": l.pin.Digest}, Objects: map[string]snapshot.Digest{"state": object.Digest},
	})
	if err != nil {
		t.Fatal(err)
	}
	digest = l.pin.Digest
	l.pin.Release()
	object.Release()
	if _, err := s.Collect(t.Context(), nil); err != nil { // what only earlier generations need is not read
		t.Fatal(err)
	}
	return l.flat, digest
}

// offsets are n offsets spread over a file, and every byte of its last 200 and
// first 200: headers, footers, digests.
func offsets(size int64, n int) []int64 {
	var out []int64
	for at := int64(0); at < min(200, size); at++ {
		out = append(out, at, size-1-at)
	}
	for i := range int64(n) {
		out = append(out, i*size/int64(n))
	}
	return out
}

// TestBitFlips: a flipped bit of any file of a snapshot is found when it is read,
// with the file and the place, and Verify finds it, also where the image does not
// need it. Wrong bytes never come out.
func TestBitFlips(t *testing.T) {
	dir := t.TempDir()
	flat, digest := whole(t, filepath.Join(dir, "s"))
	s := open(t, filepath.Join(dir, "s"))
	ref, err := s.Ref("it")
	if err != nil {
		t.Fatal(err)
	}
	for name, size := range files(t, filepath.Join(dir, "s")) {
		if filepath.Dir(name) == "refs" {
			continue // the root of trust, and text
		}
		path := filepath.Join(dir, "s", name)
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		for i, at := range offsets(size, 2000) {
			flip(t, f, at, byte(1)<<(i%8))
			err := readAll(s, digest, ref.Objects["state"], flat)
			if err != nil && !names(err, path) {
				t.Fatalf("%s with a bit of byte %d flipped: %v", name, at, err)
			}
			if err == nil || i%97 == 0 { // nothing of the image lies there any more: only Verify reads it
				report, err := s.Verify(t.Context(), "it")
				if err != nil || len(report.Damage) != 1 || !names(report.Damage[0].Err, path) {
					t.Fatalf("verify with a bit of byte %d of %s flipped: %+v, %v", at, name, report.Damage, err)
				}
			}
			flip(t, f, at, byte(1)<<(i%8))
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := readAll(s, digest, ref.Objects["state"], flat); err != nil {
		t.Errorf("with every bit back in its place: %v", err)
	}
}

func flip(t *testing.T, f *os.File, at int64, bit byte) {
	t.Helper()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= bit
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

// names reports whether an error is about damage in this file.
func names(err error, path string) bool {
	var c *snapshot.CorruptError
	return errors.As(err, &c) && c.File == path && c.Offset >= 0 && c.Bytes > 0
}

var errWrong = errors.New("wrong bytes came out")

// readAll reads everything as a restore would, and checks what comes out.
func readAll(s *snapshot.Store, manifest, object snapshot.Digest, flat model) error {
	if _, err := s.Object(object); err != nil {
		return err
	}
	image, err := s.Image(manifest)
	if err != nil {
		return err
	}
	defer func() { _ = image.Close() }() // read only
	buf := make([]byte, 64<<10)
	var first error
	for at := 0; at < len(flat); at += len(buf) {
		part := buf[:min(len(buf), len(flat)-at)]
		n, err := image.ReadAt(part, int64(at))
		if !bytes.Equal(part[:n], flat[at:][:n]) {
			return errWrong
		}
		if err != nil && first == nil {
			first = err
		}
	}
	return first
}

// TestTruncation cuts every file at every length.
func TestTruncation(t *testing.T) {
	dir := t.TempDir()
	flat, digest := whole(t, filepath.Join(dir, "s"))
	s := open(t, filepath.Join(dir, "s"))
	ref, err := s.Ref("it")
	if err != nil {
		t.Fatal(err)
	}
	for name, size := range files(t, filepath.Join(dir, "s")) {
		if filepath.Dir(name) == "refs" {
			continue
		}
		path := filepath.Join(dir, "s", name)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		for n := int64(0); n < size; n += 1 + size/300 {
			if err := os.WriteFile(path, data[:n], 0o600); err != nil {
				t.Fatal(err)
			}
			if err := readAll(s, digest, ref.Objects["state"], flat); err == nil || errors.Is(err, errWrong) {
				t.Fatalf("%s cut at %d: %v", name, n, err)
			}
			if err := s.SetRef(snapshot.Ref{Name: "more", Manifests: ref.Manifests, Objects: ref.Objects}); err == nil {
				t.Fatalf("%s cut at %d can be given a name", name, n)
			}
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCollectDeletesNothingInDoubt: what cannot be read might have been needed.
func TestCollectDeletesNothingInDoubt(t *testing.T) {
	for name, spoil := range map[string]func(dir string, m snapshot.Digest) error{
		"a manifest that is damaged": func(dir string, m snapshot.Digest) error {
			path := filepath.Join(dir, "manifests", m.String()+".manifest")
			return errors.Join(os.Chmod(path, 0o600), os.Truncate(path, 50))
		},
		"a manifest that is gone": func(dir string, m snapshot.Digest) error {
			return os.Remove(filepath.Join(dir, "manifests", m.String()+".manifest"))
		},
		"a reference that is damaged": func(dir string, _ snapshot.Digest) error {
			return os.Truncate(filepath.Join(dir, "refs", "it.json"), 10)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "s")
			_, digest := whole(t, dir)
			s := open(t, dir)
			if err := spoil(dir, digest); err != nil {
				t.Fatal(err)
			}
			before := files(t, dir)
			if _, err := s.Collect(t.Context(), nil); err == nil {
				t.Error("no error")
			}
			if after := files(t, dir); len(after) != len(before) {
				t.Errorf("%d files became %d", len(before), len(after))
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	s := open(f, f.TempDir())
	l := newLine(f, s, 50, 1)
	l.next(1)
	m, err := s.Manifest(l.pin.Digest)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(m.Encode())
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 32 { // with a right digest, so that the fuzzer gets past it
			body := data[:len(data)-32]
			d := snapshot.DigestOf(body)
			data = append(append([]byte(nil), body...), d[:]...)
		}
		m, err := snapshot.Decode(data)
		if err != nil {
			return
		}
		if !bytes.Equal(m.Encode(), data) {
			t.Error("it is encoded in another way")
		}
		for i, end := 0, int64(0); i < m.Extents(); i++ {
			e := m.Extent(i)
			if e.Start != end || e.Blocks < 1 || m.Find(e.Start) != e || m.Find(e.End()-1) != e {
				t.Fatalf("extent %d is %+v", i, e)
			}
			end = e.End()
		}
	})
}

func FuzzParseDigest(f *testing.F) {
	f.Add(snapshot.DigestOf(nil).String())
	f.Fuzz(func(t *testing.T, s string) {
		if d, err := snapshot.ParseDigest(s); err == nil && d.String() != s {
			t.Errorf("%q became %s", s, d)
		}
	})
}
