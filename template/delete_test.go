package template_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/template/oci/ocitest"
)

func gone(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}

func TestDelete(t *testing.T) {
	needImageTools(t)
	cfg := config(t)
	s := open(t, cfg)
	tree := ocitest.Tar(t, ocitest.File("bin/sh", "x").Moded(0o755))
	made, _ := importFrom(t, s, "a", template.Tar{Reader: bytes.NewReader(tree)})
	importFrom(t, s, "b", template.Tar{Reader: bytes.NewReader(tree)})
	cached := func() int {
		found, _ := filepath.Glob(filepath.Join(cfg.Cache, "image/*"))
		return len(found)
	}
	if err := s.Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get("a"); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("get: %v", err)
	}
	if _, err := s.Get("b"); err != nil || cached() != 1 {
		t.Errorf("a template of the same: %v, %d builds in the cache", err, cached())
	}
	if err := s.Delete(t.Context(), "a"); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("a second delete: %v", err)
	}
	if err := s.Delete(t.Context(), "b"); err != nil || cached() != 0 {
		t.Errorf("%v, %d builds in the cache", err, cached())
	}
	if gone(made.Image) {
		t.Error("the image is gone, which a sandbox may need")
	}
	for _, name := range []string{"../x", ".image", ""} {
		if err := s.Delete(t.Context(), name); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("delete %q: %v", name, err)
		}
	}
	noTemp(t, cfg)
}

func TestBrokenTemplateCanBeDeleted(t *testing.T) {
	store, templateJSON, _ := records(t)
	if err := os.WriteFile(templateJSON, []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := store.Delete(t.Context(), "base"); err != nil || !gone(filepath.Dir(templateJSON)) {
		t.Errorf("%v", err)
	}
}
