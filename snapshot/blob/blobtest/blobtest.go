// Package blobtest is the conformance suite of blob stores.
package blobtest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot/blob"
)

// Run runs the suite; fresh makes an empty store for each test.
func Run(t *testing.T, fresh func(t *testing.T) blob.Store) {
	for _, tt := range []struct {
		name string
		test func(t *testing.T, s blob.Store)
	}{
		{"what was put comes back", comesBack},
		{"what is not there is not found", absent},
		{"a put that fails leaves what was there", whole},
		{"lists are in order and by prefix", lists},
		{"deleting twice is fine", deletes},
		{"keys that climb or hide are refused", keys},
		{"many at once, also of one key", concurrent},
		{"a cancelled put leaves nothing", cancelled},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, fresh(t)) })
	}
}

func put(t *testing.T, s blob.Store, key, data string) {
	t.Helper()
	if err := s.Put(t.Context(), key, strings.NewReader(data), int64(len(data))); err != nil {
		t.Fatal(err)
	}
}

func expect(t *testing.T, s blob.Store, key, want string) {
	t.Helper()
	r, err := s.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s has %d bytes, want %d", key, len(got), len(want))
	}
	if size, err := s.Size(t.Context(), key); err != nil || size != int64(len(want)) {
		t.Errorf("size of %s: %d, %v", key, size, err)
	}
}

func expectNone(t *testing.T, s blob.Store, key string) {
	t.Helper()
	if _, err := s.Get(t.Context(), key); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("get %s: %v, want not_found", key, err)
	}
	if _, err := s.Size(t.Context(), key); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("size of %s: %v, want not_found", key, err)
	}
}

func comesBack(t *testing.T, s blob.Store) {
	large := strings.Repeat("dormouse", 1<<17)
	for key, data := range map[string]string{"a": "", "layers/b": "x", "layers/c.layer": large} {
		put(t, s, key, data)
		expect(t, s, key, data)
	}
	put(t, s, "a", "another")
	expect(t, s, "a", "another")
}

func absent(t *testing.T, s blob.Store) {
	expectNone(t, s, "a")
	put(t, s, "layers/b", "x")
	expectNone(t, s, "layers") // a folder, if anything
}

func whole(t *testing.T, s blob.Store) {
	put(t, s, "a", "precious")
	for name, data := range map[string]io.Reader{
		"a reader that fails": io.MultiReader(strings.NewReader("1234"), iotest.ErrReader(errors.New("the line is cut"))),
		"too short":           strings.NewReader("1234"),
		"too long":            strings.NewReader("123456789"),
	} {
		for _, key := range []string{"a", "new"} {
			if err := s.Put(t.Context(), key, data, 8); err == nil {
				t.Errorf("%s: no error", name)
			}
		}
	}
	expect(t, s, "a", "precious")
	expectNone(t, s, "new")
}

func lists(t *testing.T, s blob.Store) {
	for _, key := range []string{"layers/b", "layers/a", "layers-x", "manifests/a"} {
		put(t, s, key, key)
	}
	for prefix, want := range map[string][]string{
		"":         {"layers-x", "layers/a", "layers/b", "manifests/a"},
		"layers/":  {"layers/a", "layers/b"},
		"layers/b": {"layers/b"},
		"nothing":  nil,
	} {
		got, err := s.List(t.Context(), prefix)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v; want %v", prefix, got, err, want)
		}
	}
}

func deletes(t *testing.T, s blob.Store) {
	put(t, s, "layers/a", "x")
	for range 2 {
		if err := s.Delete(t.Context(), "layers/a"); err != nil {
			t.Fatal(err)
		}
	}
	expectNone(t, s, "layers/a")
}

func keys(t *testing.T, s blob.Store) {
	for _, key := range []string{"", "/", "../x", "a/../b", "a//b", ".tmp-x", "a/.hidden", "/etc/passwd", "a\x00b", "a/b/c/d/e", strings.Repeat("a", 200)} {
		if err := s.Put(t.Context(), key, strings.NewReader("x"), 1); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("put %q: %v", key, err)
		}
		if _, err := s.Get(t.Context(), key); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("get %q: %v", key, err)
		}
		if err := s.Delete(t.Context(), key); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("delete %q: %v", key, err)
		}
	}
	if got, err := s.List(t.Context(), ""); err != nil || len(got) > 0 {
		t.Errorf("left: %v, %v", got, err)
	}
}

func concurrent(t *testing.T, s blob.Store) {
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			data := bytes.Repeat([]byte{byte(i)}, 100_000)
			if err := s.Put(t.Context(), "same", bytes.NewReader(data), int64(len(data))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	r, err := s.Get(t.Context(), "same")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	if len(got) != 100_000 || !bytes.Equal(got, bytes.Repeat(got[:1], len(got))) {
		t.Errorf("%d bytes of several writers", len(got))
	}
}

func cancelled(t *testing.T, s blob.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Put(ctx, "a", strings.NewReader("x"), 1); err == nil {
		t.Error("no error")
	}
	expectNone(t, s, "a")
}
