package kernel_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// TestAsUser: what a user may not do, root does not do for him, and afterwards
// root is root.
func TestAsUser(t *testing.T) {
	testkit.Root(t)
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} { // the user passes through
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	secret, grouped, open := filepath.Join(dir, "secret"), filepath.Join(dir, "grouped"), filepath.Join(dir, "open")
	for path, mode := range map[string]fs.FileMode{secret: 0o600, grouped: 0o640} {
		if err := os.WriteFile(path, []byte("x"), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(grouped, 0, 777); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	read := func(path string) func() error {
		return func() error { _, err := os.ReadFile(path); return err }
	}
	if err := kernel.AsUser(4321, 4322, nil, read(secret)); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("a file of root's: %v", err)
	}
	if err := kernel.AsUser(4321, 4322, nil, read(grouped)); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("a file of another group: %v", err)
	}
	if err := kernel.AsUser(4321, 4322, []uint32{9, 777}, read(grouped)); err != nil {
		t.Errorf("a file of one of his groups: %v", err)
	}
	made := filepath.Join(open, "made")
	if err := kernel.AsUser(4321, 4322, nil, func() error { return os.WriteFile(made, nil, 0o600) }); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(made)
	if err != nil {
		t.Fatal(err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != 4321 || st.Gid != 4322 {
		t.Errorf("what he made belongs to %+v", st)
	}
	func() {
		defer func() {
			if recover() != "boom" {
				t.Error("the panic is lost")
			}
		}()
		_ = kernel.AsUser(4321, 4322, nil, func() error { panic("boom") })
	}()
	for range 100 {
		if err := read(secret)(); err != nil {
			t.Fatalf("root afterwards: %v", err)
		}
	}
}
