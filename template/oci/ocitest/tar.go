// Package ocitest makes container images and registries for tests: as they
// should be, and as they should not.
package ocitest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"os/exec"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// Entry is one entry of a tar file; a zero type is a regular file, a zero time
// one in 2020.
type Entry struct {
	Name  string
	Type  byte
	Link  string
	Data  string
	Mode  int64
	UID   int
	GID   int
	Xattr map[string]string
	Time  time.Time
}

// Dir is a directory of mode 0755.
func Dir(name string) Entry { return Entry{Name: name, Type: tar.TypeDir, Mode: 0o755} }

// File is a file of mode 0644.
func File(name, data string) Entry { return Entry{Name: name, Data: data, Mode: 0o644} }

// Link is a symbolic link.
func Link(name, target string) Entry { return Entry{Name: name, Type: tar.TypeSymlink, Link: target} }

// Hard is a hard link.
func Hard(name, target string) Entry { return Entry{Name: name, Type: tar.TypeLink, Link: target} }

// Device is a character device.
func Device(name string) Entry { return Entry{Name: name, Type: tar.TypeChar, Mode: 0o666} }

// Owned gives it an owner.
func (e Entry) Owned(uid, gid int) Entry { e.UID, e.GID = uid, gid; return e }

// Moded gives it a mode.
func (e Entry) Moded(mode int64) Entry { e.Mode = mode; return e }

// Attr gives it one extended attribute.
func (e Entry) Attr(name, value string) Entry { e.Xattr = map[string]string{name: value}; return e }

// Tar makes a tar file.
func Tar(t testing.TB, entries ...Entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		if err := w.WriteHeader(e.header()); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.Data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func (e Entry) header() *tar.Header {
	h := &tar.Header{
		Name: e.Name, Typeflag: e.Type, Linkname: e.Link, Mode: e.Mode, Uid: e.UID, Gid: e.GID,
		Size: int64(len(e.Data)), ModTime: e.Time, Format: tar.FormatPAX,
	}
	if h.Typeflag == 0 {
		h.Typeflag = tar.TypeReg
	}
	if h.ModTime.IsZero() {
		h.ModTime = time.Unix(1_600_000_000, 0)
	}
	for k, v := range e.Xattr {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+k] = v
	}
	return h
}

// Gzip compresses.
func Gzip(t testing.TB, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// Zstd compresses.
func Zstd(t testing.TB, data []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(data, nil)
}

// Xz compresses.
func Xz(t testing.TB, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := xz.NewWriter(&buf)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// Bzip2 compresses. It takes the program: there is no library here that does.
func Bzip2(t testing.TB, data []byte) []byte {
	t.Helper()
	testkit.Tool(t, "bzip2")
	cmd := exec.Command("bzip2", "--compress", "--stdout")
	cmd.Stdin = bytes.NewReader(data)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}
