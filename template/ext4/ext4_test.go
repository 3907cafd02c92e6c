package ext4_test

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/ext4"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	path := filepath.Join("/usr/sbin", name)
	_, err := os.Stat(path)
	testkit.Require(t, "e2fsprogs", err == nil, path+" does not exist")
	out, err := exec.CommandContext(t.Context(), path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
	return string(out)
}

// make fills a folder with everything that is easily lost.
func fill(t testing.TB, dir string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	must(os.MkdirAll(path("a/b/c"), 0o755))
	must(os.WriteFile(path("a/suid"), []byte("program"), 0o755))
	must(os.Chown(path("a/suid"), 70_000, 80_000))
	must(os.Chmod(path("a/suid"), 0o755|os.ModeSetuid))
	must(unix.Setxattr(path("a/suid"), "user.colour", []byte("blue"), 0))
	must(unix.Setxattr(path("a/suid"), "user.long", bytes.Repeat([]byte("v"), 500), 0)) // does not fit into the inode
	must(os.Link(path("a/suid"), path("a/b/hard")))
	must(os.Symlink("../short", path("a/link")))
	must(os.Symlink(strings.Repeat("long/", 40), path("a/longlink")))
	must(os.Chmod(path("a/b"), 0o777|os.ModeSticky))
	must(os.WriteFile(path("a/b/\xff not UTF-8 \n"), nil, 0o600))
	must(os.WriteFile(path("empty"), nil, 0o644))
	for n := range 500 { // a directory with an index
		must(os.WriteFile(path(fmt.Sprintf("a/b/c/%0100d", n)), []byte{byte(n)}, 0o644))
	}
	f, err := os.Create(path("sparse")) // more extents than an inode has room for
	must(err)
	for n := range 40 {
		_, err := f.WriteAt(bytes.Repeat([]byte{byte(n + 1)}, 5000), int64(n)*100_000)
		must(err)
	}
	must(f.Truncate(5_000_000))
	must(f.Close())
	when := time.Unix(1_600_000_000, 0)
	must(filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		ts := unix.NsecToTimespec(when.UnixNano())
		return firstOf(err, unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	}))
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// image makes a file system of a folder, as package template does.
func image(t testing.TB, dir string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	tool(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-O", "64bit,metadata_csum,^orphan_file", "-d", dir, path, "64M")
	return path
}

// describe is everything that a tree is.
func describe(t testing.TB, dir string) string {
	t.Helper()
	var out strings.Builder
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(p, &st); err != nil {
			return err
		}
		fmt.Fprintf(&out, "%q mode %o owner %d:%d size %d time %d", p[len(dir):], st.Mode, st.Uid, st.Gid, st.Size*int64(btoi(!d.IsDir())), st.Mtim.Sec)
		switch {
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(p)
			fmt.Fprintf(&out, " to %s %v", target, err)
		case d.Type().IsRegular():
			data, err := os.ReadFile(p)
			value := make([]byte, 1000)
			n, _ := unix.Lgetxattr(p, "user.long", value)
			m, _ := unix.Lgetxattr(p, "user.colour", value)
			fmt.Fprintf(&out, " links %d content %x %v, %d and %d bytes of attributes", st.Nlink, data, err, n, m)
		}
		out.WriteString("\n")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// unpack reads an image into a folder.
func unpack(t testing.TB, r io.ReaderAt, dir string, limits oci.Limits) error {
	t.Helper()
	f, err := ext4.Open(r)
	if err != nil {
		return err
	}
	read, write := io.Pipe()
	go func() { write.CloseWithError(f.WriteTar(t.Context(), write)) }()
	_, err = oci.UnpackTar(t.Context(), read, dir, limits)
	_ = read.Close()
	return err
}

func TestTreeComesBackAsItWas(t *testing.T) {
	testkit.Root(t)
	dir, back := t.TempDir(), t.TempDir()
	fill(t, dir)
	f, err := os.Open(image(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err := unpack(t, f, back, oci.Limits{}); err != nil {
		t.Fatal(err)
	}
	want, got := strings.Split(describe(t, dir), "\n"), strings.Split(describe(t, back), "\n")
	for i := range min(len(want), len(got)) {
		if want[i] != got[i] {
			t.Errorf("want %.300s\ngot  %.300s", want[i], got[i])
		}
	}
	if len(want) != len(got) || len(want) < 500 {
		t.Errorf("%d entries became %d", len(want), len(got))
	}
}

func TestWhatIsNotRead(t *testing.T) {
	testkit.Root(t)
	dir := t.TempDir()
	fill(t, dir)
	whole, err := os.ReadFile(image(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		at    int
		value []byte
		says  string
	}{
		{"another magic", 1024 + 0x38, []byte{0, 0}, "not an ext4"},
		{"blocks of 1 KiB", 1024 + 0x18, []byte{0}, "4 KiB"},
		{"a feature that is not known", 1024 + 0x60, []byte{0xC2, 0x82}, "features"},
		{"a journal that is not written back", 1024 + 0x60, []byte{0xC6}, "journal"},
		{"no groups", 1024 + 0x28, []byte{0, 0, 0, 0}, "no sizes that can be"},
		{"inodes of no size", 1024 + 0x58, []byte{3, 0}, "inodes have 3 bytes"},
		{"inodes beyond the end", 4096 + 0x8, []byte{0xff, 0xff, 0xff, 0x7f}, "at block 2147483647"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			broken := bytes.Clone(whole)
			copy(broken[tt.at:], tt.value)
			err := unpack(t, bytes.NewReader(broken), t.TempDir(), oci.Limits{})
			if !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
			}
		})
	}
	for size := 0; size < len(whole)/8; size += 997 * 100 {
		if err := unpack(t, bytes.NewReader(whole[:size]), t.TempDir(), oci.Limits{}); err == nil {
			t.Fatalf("the first %d bytes are taken for the whole", size)
		}
	}
}

// FuzzBroken writes over parts of a good file system: reading it ends, and with
// an error or within the bounds.
func FuzzBroken(f *testing.F) {
	testkit.Root(f)
	dir := f.TempDir()
	fill(f, dir)
	whole, err := os.ReadFile(image(f, dir))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(1024), []byte{1, 2, 3})
	f.Add(uint32(4096), []byte{0xff})
	f.Add(uint32(40<<10), bytes.Repeat([]byte{0xff}, 100))
	f.Fuzz(func(t *testing.T, at uint32, patch []byte) {
		broken := patched{bytes.NewReader(whole), int64(at) % int64(len(whole)), patch}
		limits := oci.Limits{Bytes: 32 << 20, Entries: 5000}
		_ = unpack(t, broken, t.TempDir(), limits) // ends: that is all
	})
}

// patched is a file system with other bytes at one place.
type patched struct {
	r     io.ReaderAt
	at    int64
	patch []byte
}

func (p patched) ReadAt(b []byte, at int64) (int, error) {
	n, err := p.r.ReadAt(b, at)
	for i := range n {
		if j := at + int64(i) - p.at; j >= 0 && j < int64(len(p.patch)) {
			b[i] = p.patch[j]
		}
	}
	return n, err
}
