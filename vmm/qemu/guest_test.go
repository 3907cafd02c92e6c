package qemu_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/cavaliergopher/cpio"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// The guest's /init is built once per test run.
var guestInit = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "dormouse-init-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }() // a temporary file may stay
	out := filepath.Join(dir, "init")
	if err := testkit.Program("./testdata/init", out); err != nil {
		return nil, err
	}
	return os.ReadFile(out)
})

// initramfs packs the test guest and extra files, by path in the archive.
func initramfs(t testing.TB, extra map[string][]byte) string {
	t.Helper()
	init, err := guestInit()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := cpio.NewWriter(&out)
	add := func(name string, mode cpio.FileMode, data []byte) {
		if err := w.WriteHeader(&cpio.Header{Name: name, Mode: mode, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	add("init", cpio.TypeReg|0o755, init)
	made := map[string]bool{}
	for name, data := range extra {
		if dir := filepath.Dir(name); dir != "." && !made[dir] {
			made[dir] = true
			add(dir, cpio.TypeDir|0o755, nil)
		}
		add(name, cpio.TypeReg|0o644, data)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// kernelImage is the guest kernel that these tests boot.
func kernelImage(t testing.TB) string {
	t.Helper()
	testkit.Tool(t, "qemu-system-x86_64")
	return testkit.Asset(t, "vmlinuz")
}

// virtioModules are the modules for disk and network in load order, from the
// modules folder of the assets. One that the kernel has built in is not there.
func virtioModules(t testing.TB) map[string][]byte {
	t.Helper()
	root, err := filepath.EvalSymlinks(testkit.Asset(t, "modules"))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for i, name := range []string{
		"virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "failover", "net_failover", "virtio_net",
	} {
		data := findModule(t, root, name+".ko")
		if data != nil {
			files["modules/"+string(rune('0'+i))+name+".ko"] = data
		}
	}
	return files
}

func findModule(t testing.TB, root, name string) (data []byte) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, "/"+name) {
			data, err = os.ReadFile(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return data
}
