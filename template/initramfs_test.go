package template_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
)

// unpack lists an archive as "mode name size", and the files' contents. The
// library is the second opinion on the writer; it does not read device numbers.
func unpack(t *testing.T, data []byte) ([]string, map[string][]byte) {
	t.Helper()
	var list []string
	files := map[string][]byte{}
	r := cpio.NewReader(bytes.NewReader(data))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return list, files
		}
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, fmt.Sprintf("%06o %s %d", uint32(h.Mode), h.Name, h.Size))
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestInitramfsHoldsModulesInLoadOrder(t *testing.T) {
	dir := t.TempDir()
	fakeModules(t, dir)
	init := fakeELF(4321)
	data, err := template.PackInitramfs(init, dir)
	if err != nil {
		t.Fatal(err)
	}
	list, files := unpack(t, data)
	want := []string{
		"040755 dev 0", "040755 proc 0", "040755 sys 0", "040755 newroot 0", "040755 modules 0",
		"020600 dev/console 0", "020666 dev/null 0", "100755 init 4321",
	}
	for i, name := range fakeOrder {
		path := fmt.Sprintf("modules/%03d-%s.ko", i, name)
		want = append(want, fmt.Sprintf("100644 %s %d", path, len(files[path])))
		if !bytes.HasPrefix(files[path], []byte("\x7fELF")) {
			t.Errorf("%s is not decompressed", path)
		}
	}
	if diff := cmp.Diff(want, list); diff != "" {
		t.Errorf("archive (-want +got):\n%s", diff)
	}
	if !bytes.Equal(files["init"], init) {
		t.Error("/init has other bytes")
	}
	// Device numbers: fields 10 and 11 of the header, 8 digits each.
	for name, device := range map[string]string{"dev/console": "0000000500000001", "dev/null": "0000000100000003"} {
		at := bytes.Index(data, []byte(name+"\x00")) - 110
		if got := string(data[at+6+9*8 : at+6+11*8]); got != device {
			t.Errorf("%s has device %s", name, got)
		}
	}
	again, err := template.PackInitramfs(init, dir)
	if err != nil || !bytes.Equal(data, again) {
		t.Errorf("a second time other bytes: %v", err)
	}
}

func TestInitramfsIsCachedByContent(t *testing.T) {
	newFakes(t, fakeBoth(t))
	cfg := config(t)
	s := open(t, cfg)
	k, err := s.Kernel(t.Context(), template.KernelConfig{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	guest := filepath.Join(t.TempDir(), "guest")
	pathFor := func(binary []byte) string {
		if err := os.WriteFile(guest, binary, 0o755); err != nil {
			t.Fatal(err)
		}
		path, err := s.Initramfs(t.Context(), k, guest)
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	first := pathFor(fakeELF(1000))
	before, _ := os.Stat(first)
	if again := pathFor(fakeELF(1000)); again != first {
		t.Errorf("the same content went to %s and %s", first, again)
	}
	if after, _ := os.Stat(first); !os.SameFile(before, after) {
		t.Error("it was written again")
	}
	if other := pathFor(fakeELF(1001)); other == first {
		t.Error("another binary, the same file")
	}
	noTemp(t, cfg)
	if _, err := s.Initramfs(t.Context(), k, guest+"-missing"); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("missing binary: %v", err)
	}
	if err := os.WriteFile(guest, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Initramfs(t.Context(), k, guest); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("a script as guest: %v", err)
	}
}

func TestModuleErrors(t *testing.T) {
	for name, tt := range map[string]struct {
		path string
		data []byte // nil removes the file
	}{
		"a module that must be there is missing": {"kernel/drivers/block/virtio_blk.ko.gz", nil},
		"a dependency is missing":                {"kernel/net/core/failover.ko", nil},
		"a module is not ELF":                    {"kernel/fs/jbd2/jbd2.ko", []byte("text")},
		"a module is cut off":                    {"kernel/drivers/block/virtio_blk.ko.gz", packGzip(t, fakeModule("depends=\x00"))[:40]},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			fakeModules(t, dir)
			path := filepath.Join(dir, tt.path)
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if tt.data != nil {
				if err := os.WriteFile(path, tt.data, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := template.PackInitramfs(fakeELF(100), dir); err == nil {
				t.Error("no error")
			}
		})
	}
}
