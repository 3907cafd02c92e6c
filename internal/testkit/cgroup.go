package testkit

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroup makes a cgroup v2 of the test's own, which is gone with all that is in it
// when the test ends. It needs no controllers.
func Cgroup(t testing.TB) string {
	t.Helper()
	Root(t)
	mount := cgroupMount()
	Require(t, "cgroup2", mount != "", "no cgroup v2 hierarchy is mounted")
	dir, err := os.MkdirTemp(mount, "dormouse-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var left error
		gone := Poll(10*time.Second, func() bool {
			left = removeCgroup(dir)
			return left == nil
		})
		if !gone {
			t.Errorf("the cgroup of the test stays: %v", left)
		}
	})
	return dir
}

// cgroupMount is where a hierarchy of version 2 is mounted, if one is.
func cgroupMount() string {
	for _, path := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(path, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return path
		}
	}
	return ""
}

// removeCgroup ends what runs in a cgroup and removes it from its leaves on. Ended
// processes take a while to leave it.
func removeCgroup(dir string) error {
	_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0) // Linux 5.14; the removal tells
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), "cgroup.") {
			errs = append(errs, removeCgroup(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(append(errs, os.Remove(dir))...)
}
