package oci_test

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/template/oci"
	"github.com/dormouse-sandbox/dormouse/template/oci/ocitest"
)

// Short names for what the tables are made of.
type entry = ocitest.Entry

var (
	dir, file, link, hard, device = ocitest.Dir, ocitest.File, ocitest.Link, ocitest.Hard, ocitest.Device
	tarOf, gz, zst, xzOf, bz2     = ocitest.Tar, ocitest.Gzip, ocitest.Zstd, ocitest.Xz, ocitest.Bzip2
	sum                           = ocitest.Digest
)

// whiteout is an entry whose name says that it removes something.
func whiteout(path string) entry { return file(path, "") }

// place is a folder to unpack into, beside things that must stay as they are.
type place struct{ base, tree, before string }

// newPlace asks for root: an image's files have owners.
func newPlace(t testing.TB) place {
	t.Helper()
	testkit.Root(t)
	base := t.TempDir()
	p := place{base: base, tree: filepath.Join(base, "tree")}
	ocitest.Write(t, filepath.Join(base, "outside/secret"), []byte("outside"))
	ocitest.Write(t, filepath.Join(base, "secret"), []byte("beside"))
	if err := os.Mkdir(p.tree, 0o700); err != nil {
		t.Fatal(err)
	}
	p.before = p.outside(t)
	return p
}

// outside describes everything beside the tree, times of changes included.
func (p place) outside(t testing.TB) string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(p.base, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if path == p.tree {
			return filepath.SkipDir
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return err
		}
		data := []byte{}
		if d.Type().IsRegular() {
			if data, err = os.ReadFile(path); err != nil {
				return err
			}
		}
		lines = append(lines, fmt.Sprintf("%s %o %d:%d links %d changed %d.%09d %q", path, st.Mode, st.Uid, st.Gid, st.Nlink, st.Ctim.Sec, st.Ctim.Nsec, data))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// untouched fails when anything beside the tree has changed.
func (p place) untouched(t testing.TB) {
	t.Helper()
	if after := p.outside(t); after != p.before {
		t.Errorf("outside the folder there was\n%s\nand now there is\n%s", p.before, after)
	}
}

// unpack puts layers on the place, as an image from a layout.
func (p place) unpack(t testing.TB, limits oci.Limits, layers ...[]byte) (oci.Report, error) {
	t.Helper()
	i, err := oci.OpenLayout(context.Background(), ocitest.ImageOf(layers...).LayoutOf(t), "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = i.Close() }() // read only
	return i.Unpack(context.Background(), p.tree, limits, nil)
}

func (p place) read(t testing.TB, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(p.tree, name))
	if err != nil {
		t.Error(err)
	}
	return string(data)
}

// names are all paths in the tree but the folders that lead to others.
func (p place) names(t testing.TB) string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(p.tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == p.tree {
			return err
		}
		names = append(names, strings.TrimPrefix(path, p.tree+"/"))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(names, " ")
}
