//go:build !release

package osfs_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
)

// pointsOf lists the failpoints that fn passes, so that no test forgets one.
func pointsOf(t *testing.T, fn func() error) []string {
	t.Helper()
	var points []string
	fault.Observe(func(p string) { points = append(points, p) })
	err := fn()
	fault.Observe(nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(points) == 0 {
		t.Fatal("the operation passes no failpoint")
	}
	return points
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestWriteFileReplacesWholeWithItsMode(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state")
	for _, text := range []string{"a long first text", "short"} {
		if err := osfs.WriteFile("state", path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
		if got := read(t, path); got != text {
			t.Errorf("read %q, want %q", got, text)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v; want 0640", info.Mode(), err)
	}
	if diff := cmp.Diff([]string{"state"}, names(t, dir)); diff != "" {
		t.Error(diff)
	}
}

// Each system call of a replacement fails once: the reader sees the old text
// whole (or, when only the last fsync failed, the new one), and nothing else
// stays in the directory.
func TestWriteFileFailsAtEachCall(t *testing.T) {
	scratch := filepath.Join(t.TempDir(), "state")
	points := pointsOf(t, func() error { return osfs.WriteFile("state", scratch, []byte("x"), 0o600) })
	want := []string{"osfs/state/create", "osfs/state/write", "osfs/state/fsync", "osfs/state/rename", "osfs/state/fsync-dir"}
	if diff := cmp.Diff(want, points); diff != "" {
		t.Fatal(diff)
	}
	for _, point := range points {
		t.Run(strings.ReplaceAll(point, "/", "."), func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "state")
			write(t, path, "old")
			defer fault.Set(point, fault.Fail)()
			err := osfs.WriteFile("state", path, []byte("new"), 0o600)
			if !errors.Is(err, fault.ErrInjected) {
				t.Fatalf("got %v, want the injected fault", err)
			}
			expect := "old"
			if point == "osfs/state/fsync-dir" {
				expect = "new" // renamed already; whether it lasts is what failed
			}
			if got := read(t, path); got != expect {
				t.Errorf("the file has %q, want %q", got, expect)
			}
			if err := osfs.SweepTemp(dir); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]string{"state"}, names(t, dir)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestReplaceKeepsTheOldWhenTheWriterFails(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state")
	write(t, path, "old")
	broken := errors.New("source broke off")
	err := osfs.Replace("state", path, 0o600, func(f *os.File) error {
		_, err := f.WriteString("half of the n")
		return errors.Join(err, broken)
	})
	if !errors.Is(err, broken) {
		t.Fatalf("got %v", err)
	}
	if got := read(t, path); got != "old" {
		t.Errorf("the file has %q", got)
	}
	if diff := cmp.Diff([]string{"state"}, names(t, dir)); diff != "" {
		t.Error(diff)
	}
}

func TestRenameBetweenDirectories(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "a"), filepath.Join(dir, "d", "b")
	write(t, from, "text")
	if err := osfs.MkdirAll("mk", filepath.Dir(to), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := osfs.Rename("mv", from, to); err != nil {
		t.Fatal(err)
	}
	if got := read(t, to); got != "text" {
		t.Errorf("read %q", got)
	}
	if _, err := os.Lstat(from); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the source is still there: %v", err)
	}
}

func TestRemove(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	write(t, path, "x")
	disarm := fault.Set("osfs/rm/remove", fault.Fail)
	if err := osfs.Remove("rm", path); !errors.Is(err, fault.ErrInjected) || read(t, path) != "x" {
		t.Errorf("a failed remove: %v", err)
	}
	disarm()
	for range 2 { // a missing file is success
		if err := osfs.Remove("rm", path); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
}

func TestRemoveAllLeavesNothingOrEverything(t *testing.T) {
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	if err := osfs.MkdirAll("mk", filepath.Join(tree, "a", "b"), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(tree, "a", "f"), "x")
	disarm := fault.Set("osfs/rmall/remove-all", fault.Fail)
	if err := osfs.RemoveAll("rmall", tree); !errors.Is(err, fault.ErrInjected) {
		t.Fatalf("got %v", err)
	}
	disarm()
	if got := read(t, filepath.Join(tree, "a", "f")); got != "x" {
		t.Errorf("the tree was touched: %q", got)
	}
	for range 2 { // a missing tree is success
		if err := osfs.RemoveAll("rmall", tree); err != nil {
			t.Fatal(err)
		}
	}
	if got := names(t, dir); len(got) != 0 {
		t.Errorf("left behind: %v", got)
	}
}

func TestMkdirAll(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a", "b", "c")
	disarm := fault.Set("osfs/mk/mkdir", fault.Fail)
	if err := osfs.MkdirAll("mk", path, 0o700); !errors.Is(err, fault.ErrInjected) || len(names(t, dir)) != 0 {
		t.Errorf("a failed mkdir: %v, left %v", err, names(t, dir))
	}
	disarm()
	for range 2 {
		if err := osfs.MkdirAll("mk", path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "f")
	write(t, file, "")
	if err := osfs.MkdirAll("mk", filepath.Join(file, "x"), 0o700); err == nil {
		t.Error("a directory below a file was made")
	}
}

func TestSweepTempRemovesOnlyWhatWasNotPublished(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{".tmp-state-123", "state", ".tmp", ".hidden", "x.tmp-y"} {
		write(t, filepath.Join(dir, name), "")
	}
	if err := os.MkdirAll(filepath.Join(dir, ".tmp-tree-9", "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := osfs.SweepTemp(dir); err != nil {
		t.Fatal(err)
	}
	want := []string{".hidden", ".tmp", "state", "x.tmp-y"}
	if got := names(t, dir); !slices.Equal(got, want) {
		t.Errorf("left %v, want %v", got, want)
	}
	if err := osfs.SweepTemp(filepath.Join(dir, "missing")); err != nil {
		t.Errorf("a missing directory: %v", err)
	}
}

func TestSyncTree(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "d", "f"), "x")
	if err := os.Symlink("/nowhere", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := osfs.SyncTree(dir); err != nil {
		t.Fatal(err)
	}
	if err := osfs.SyncTree(filepath.Join(dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing tree: %v", err)
	}
}

func TestReadFileLimit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	write(t, path, "12345")
	if b, err := osfs.ReadFileLimit(path, 5); err != nil || string(b) != "12345" {
		t.Errorf("at the limit: %q, %v", b, err)
	}
	if _, err := osfs.ReadFileLimit(path, 4); err == nil || !strings.Contains(err.Error(), "larger than 4 bytes") {
		t.Errorf("over the limit: %v", err)
	}
	if _, err := osfs.ReadFileLimit(path+"x", 4); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}
