package oci_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

func allocated(info fs.FileInfo) int64 { return info.Sys().(*syscall.Stat_t).Blocks * 512 }

// capability is cap_net_bind_service=ep, as setcap writes it.
const capability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

func TestWhatIsKept(t *testing.T) {
	p := newPlace(t)
	old := syscall.Umask(0o077) // it must not count
	defer syscall.Umask(old)
	when := time.Date(2021, 2, 3, 4, 5, 6, 0, time.UTC)
	young := dir("d").Owned(3, 4).Moded(0o1777)
	young.Time = when
	report, err := p.unpack(t, oci.Limits{}, tarOf(t,
		young,
		file("d/suid", "x").Owned(5, 6).Moded(0o6755).Attr("security.capability", capability),
		file("d/f", "y").Owned(1<<31, 70_000).Moded(0o640).Attr("user.colour", "blue"),
		hard("d/g", "d/f"),
		link("d/l", "/nowhere").Owned(8, 9),
		file("implied/by/name", "z"),
		file("acl", "").Attr("system.posix_acl_access", "x"),
		device("dev/console"),
	))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name     string
		mode     uint32
		uid, gid uint32
		links    uint64
	}{
		{"d", syscall.S_IFDIR | 0o1777, 3, 4, 2},
		{"d/suid", syscall.S_IFREG | 0o6755, 5, 6, 1},
		{"d/f", syscall.S_IFREG | 0o640, 1 << 31, 70_000, 2},
		{"d/l", syscall.S_IFLNK | 0o777, 8, 9, 1},
		{"implied/by", syscall.S_IFDIR | 0o755, 0, 0, 2},
		{"implied/by/name", syscall.S_IFREG | 0o644, 0, 0, 1},
	} {
		var st syscall.Stat_t
		if err := syscall.Lstat(filepath.Join(p.tree, tt.name), &st); err != nil {
			t.Error(err)
		} else if st.Mode != tt.mode || st.Uid != tt.uid || st.Gid != tt.gid || uint64(st.Nlink) != tt.links {
			t.Errorf("%s: mode %o, owner %d:%d, %d links", tt.name, st.Mode, st.Uid, st.Gid, st.Nlink)
		}
	}
	for name, want := range map[string]time.Time{"d": when, "d/f": time.Unix(1_600_000_000, 0), "d/l": time.Unix(1_600_000_000, 0)} {
		if info, err := os.Lstat(filepath.Join(p.tree, name)); err != nil || !info.ModTime().Equal(want) {
			t.Errorf("%s has the time %v, %v", name, info.ModTime(), err)
		}
	}
	for _, a := range [][3]string{{"d/suid", "security.capability", capability}, {"d/f", "user.colour", "blue"}} {
		buf := make([]byte, 100)
		if n, err := unix.Lgetxattr(filepath.Join(p.tree, a[0]), a[1], buf); err != nil || string(buf[:n]) != a[2] {
			t.Errorf("%s has %s %q, %v", a[0], a[1], buf[:max(n, 0)], err)
		}
	}
	all := strings.Join(report.LeftOut, "\n")
	if report.LeftOutCount != 2 || !strings.Contains(all, "device /dev/console (0:0)") || !strings.Contains(all, `"system.posix_acl_access" of /acl`) {
		t.Errorf("left out: %d: %s", report.LeftOutCount, all)
	}
	if _, err := os.Lstat(filepath.Join(p.tree, "dev/console")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a device was made: %v", err)
	}
	p.untouched(t)
}

func TestLayersLieOnEachOther(t *testing.T) {
	below := []entry{dir("d"), file("d/a", "1"), file("d/b", "1"), dir("d/sub"), file("d/sub/c", "1"), file("e", "1"), link("l", "d")}
	for _, tt := range []struct {
		name  string
		above []entry
		tree  string
	}{
		{"a file replaces one", []entry{file("e", "2")}, "d d/a d/b d/sub d/sub/c e l"},
		{"a whiteout removes a file", []entry{whiteout("d/.wh.a")}, "d d/b d/sub d/sub/c e l"},
		{"a whiteout removes a directory", []entry{whiteout(".wh.d")}, "e l"},
		{"a whiteout of what is not there", []entry{whiteout("d/.wh.z"), whiteout("x/.wh.z")}, "d d/a d/b d/sub d/sub/c e l"},
		{"an opaque directory hides what is below", []entry{whiteout("d/.wh..wh..opq"), file("d/n", "2")}, "d d/n e l"},
		{"an opaque mark behind its content", []entry{dir("d"), file("d/n", "2"), file("d/sub/m", "2"), whiteout("d/.wh..wh..opq")}, "d d/n d/sub d/sub/m e l"},
		{"a whiteout spares its own layer", []entry{file("d/a", "2"), whiteout("d/.wh.a")}, "d d/a d/b d/sub d/sub/c e l"},
		{"a whiteout of a directory that the layer fills", []entry{file("d/n", "2"), whiteout(".wh.d")}, "d d/n e l"},
		{"an opaque root", []entry{whiteout(".wh..wh..opq"), file("n", "2")}, "n"},
		{"a file replaces a directory", []entry{file("d", "2")}, "d e l"},
		{"a directory replaces a file", []entry{dir("e"), file("e/n", "2")}, "d d/a d/b d/sub d/sub/c e e/n l"},
		{"a directory keeps what is in it", []entry{dir("d").Moded(0o700)}, "d d/a d/b d/sub d/sub/c e l"},
		{"a file through a link", []entry{file("l/n", "2")}, "d d/a d/b d/n d/sub d/sub/c e l"},
		{"a link replaces a directory", []entry{link("d", "e")}, "d e l"},
		{"a hard link to a file of the layer below", []entry{hard("n", "d/a")}, "d d/a d/b d/sub d/sub/c e l n"},
		{"bookkeeping of AUFS", []entry{file(".wh..wh.plnk", ""), file(".wh..wh.aufs", "")}, "d d/a d/b d/sub d/sub/c e l"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPlace(t)
			if _, err := p.unpack(t, oci.Limits{}, tarOf(t, below...), tarOf(t, tt.above...)); err != nil {
				t.Fatal(err)
			}
			if got := p.names(t); got != tt.tree {
				t.Errorf("the tree has %q, want %q", got, tt.tree)
			}
			p.untouched(t)
		})
	}
}

// A change to a file must not reach another one that was linked to it below.
func TestReplacingOneNameLeavesTheOther(t *testing.T) {
	p := newPlace(t)
	if _, err := p.unpack(t, oci.Limits{}, tarOf(t, file("a", "1"), hard("b", "a")), tarOf(t, file("b", "2").Moded(0o600))); err != nil {
		t.Fatal(err)
	}
	if p.read(t, "a") != "1" || p.read(t, "b") != "2" {
		t.Errorf("a is %q and b %q", p.read(t, "a"), p.read(t, "b"))
	}
}

func TestTarFile(t *testing.T) {
	whole := tarOf(t, dir("./"), dir("./etc"), file("./etc/os-release", "ID=x"), file("./.wh.kept", "this is no whiteout here"))
	for name, data := range map[string][]byte{"plain": whole, "gzip": gz(t, whole), "zstd": zst(t, whole), "xz": xzOf(t, whole), "bzip2": bz2(t, whole)} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			report, err := oci.UnpackTar(t.Context(), bytes.NewReader(data), p.tree, oci.Limits{})
			if err != nil || p.names(t) != ".wh.kept etc etc/os-release" || report.Entries != 4 {
				t.Errorf("%+v, %v: %s", report, err, p.names(t))
			}
		})
	}
	p := newPlace(t)
	if _, err := oci.UnpackTar(t.Context(), bytes.NewReader(tarOf(t)), p.tree, oci.Limits{}); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("an empty tar file: %v", err)
	}
	if _, err := oci.UnpackTar(t.Context(), strings.NewReader(""), p.tree, oci.Limits{}); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("an empty file: %v", err)
	}
}

// A name at the beginning of a plain tar file is no format.
func TestPlainTarThatBeginsLikeBzip2(t *testing.T) {
	p := newPlace(t)
	if _, err := oci.UnpackTar(t.Context(), bytes.NewReader(tarOf(t, file("BZh91-notes", "x"))), p.tree, oci.Limits{}); err != nil || p.names(t) != "BZh91-notes" {
		t.Errorf("%v: %s", err, p.names(t))
	}
}

func TestTreeIsAWorldOfItsOwn(t *testing.T) {
	p := newPlace(t)
	if _, err := p.unpack(t, oci.Limits{}, tarOf(t, dir("usr/etc"), link("etc", "/usr/etc"), link("usr/etc/hosts", p.base+"/secret"), file("f", "x"))); err != nil {
		t.Fatal(err)
	}
	tree, err := oci.OpenTree(p.tree)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tree.Close() }()
	if _, err := tree.ReadFile("/etc/hosts", 100); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file outside was read: %v", err)
	}
	if err := tree.WriteFile("/etc/hosts", []byte("mine"), 0o640); err != nil {
		t.Fatal(err)
	}
	if got := p.read(t, "usr/etc/hosts"); got != "mine" {
		t.Errorf("hosts is %q", got)
	}
	if err := errors.Join(tree.MkdirAll("/etc/a/b", 0o700), tree.Chown("/etc/a/b", 7, 8), tree.MkdirAll("/", 0o777)); err != nil {
		t.Error(err)
	}
	if info, err := tree.Stat("etc/a/b"); err != nil || info.Mode() != fs.ModeDir|0o700 || info.Sys().(*syscall.Stat_t).Uid != 7 {
		t.Errorf("a directory is %v, %v", info, err)
	}
	for what, err := range map[string]error{"a directory in a file": tree.MkdirAll("f/g", 0o755), "a file as one": tree.MkdirAll("f", 0o755), "a file over one": tree.WriteFile("usr", nil, 0o644)} {
		if !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	p.untouched(t)
}
