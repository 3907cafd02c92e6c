package oci_test

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

// TestAttacks: whatever a layer holds, nothing outside the folder changes, and
// it is refused, or what it means inside the folder is done.
func TestAttacks(t *testing.T) {
	up := strings.Repeat("../", 20)
	for _, tt := range []struct {
		name   string
		layers [][]entry
		says   string // of the error; empty: there is none
		tree   string // what is there then
	}{
		{"a name that leads up", [][]entry{{file("../secret", "x")}}, "leads upwards", ""},
		{"a name that leads up later", [][]entry{{dir("a"), file("a/../../secret", "x")}}, "leads upwards", "a"},
		{"an absolute name is one in the tree", [][]entry{{file("/secret", "x")}}, "", "secret"},
		{"a directory that leads up", [][]entry{{dir("..")}}, "leads upwards", ""},
		{"a file through a link up", [][]entry{{link("out", up+"outside"), file("out/secret", "x")}}, "", "out outside outside/secret"},
		{"a file through an absolute link", [][]entry{{link("out", "BASE/outside"), file("out/secret", "x")}}, "", "BASE out"},
		{"a file through a link of the layer below", [][]entry{{link("out", up+"outside")}, {file("out/secret", "x")}}, "", "out outside outside/secret"},
		{"a file through two links", [][]entry{{link("a", "/b"), link("b", up), dir("x"), file("a/secret", "x")}}, "", "a b secret x"},
		{"a file in place of a link up", [][]entry{{link("out", "BASE/secret")}, {file("out", "x")}}, "", "out"},
		{"a directory in place of a link up", [][]entry{{link("out", "BASE/outside")}, {dir("out"), file("out/secret", "x")}}, "", "out out/secret"},
		{"a link in place of a directory, then a file in it", [][]entry{{dir("d"), file("d/f", "x")}, {link("d", "BASE/outside"), file("d/secret", "y")}}, "", "BASE d"},
		{"the mode of a directory through a link", [][]entry{{link("out", "BASE/outside"), dir("out").Moded(0o777)}}, "", "out"},
		{"a hard link up", [][]entry{{hard("h", "../secret")}}, "leads upwards", ""},
		{"a hard link to an absolute path", [][]entry{{hard("h", "BASE/secret")}}, "is not there", ""},
		{"a hard link through a link up", [][]entry{{link("out", "BASE/outside"), hard("h", "out/secret"), file("h", "x")}}, "is not there", "out"},
		{"a hard link to a link up, then a file over it", [][]entry{{link("out", "BASE/secret"), hard("h", "out"), file("h", "x")}}, "", "h out"},
		{"a hard link to a directory", [][]entry{{dir("d"), hard("h", "d")}}, "is not a file", "d"},
		{"a hard link to nothing", [][]entry{{hard("h", "")}}, "is not a file", ""},
		{"a whiteout that leads up", [][]entry{{whiteout("../.wh.secret")}}, "leads upwards", ""},
		{"a whiteout of the folder itself", [][]entry{{file("f", "")}, {whiteout(".wh..")}}, "whiteout of no name", "f"},
		{"a whiteout of the folder above", [][]entry{{file("f", "")}, {whiteout(".wh...")}}, "whiteout of no name", "f"},
		{"a whiteout without a name", [][]entry{{file("f", "")}, {whiteout(".wh.")}}, "whiteout of no name", "f"},
		{"a whiteout through a link up", [][]entry{{link("out", "BASE/outside")}, {whiteout("out/.wh.secret")}}, "", "out"},
		{"an opaque directory through a link up", [][]entry{{link("out", "BASE/outside")}, {whiteout("out/.wh..wh..opq")}}, "", "out"},
		{"an opaque link up", [][]entry{{link("out", up)}, {whiteout(".wh.out")}}, "", ""},
		{"a whiteout that removes a link and not its target", [][]entry{{link("out", "BASE/outside")}, {whiteout(".wh.out")}}, "", ""},
		{"a ring of links", [][]entry{{link("a", "b"), link("b", "a"), file("a/f", "x")}}, "more than 40 links", "a b"},
		{"a link to itself", [][]entry{{link("a", "a/a"), file("a/f", "x")}}, "more than 40 links", "a"},
		{"a file in a file", [][]entry{{file("f", "x"), file("f/g", "y")}}, "is not a directory", "f"},
		{"a file far in a file", [][]entry{{file("f", "x"), file("f/g/h", "y")}}, "is not a directory", "f"},
		{"a device is left out", [][]entry{{device("dev/null"), file("f", "")}}, "", "dev f"},
		{"a block device is left out", [][]entry{{entry{Name: "sda", Type: tar.TypeBlock}}}, "", ""},
		{"a pipe is left out", [][]entry{{entry{Name: "pipe", Type: tar.TypeFifo}, file("f", "")}}, "", "f"},
		{"a device over a file removes it", [][]entry{{file("f", "x")}, {device("f")}}, "", ""},
		{"a file over a device", [][]entry{{device("f")}, {file("f", "x")}}, "", "f"},
		{"an unknown type", [][]entry{{entry{Name: "f", Type: '7'}}}, "unknown type", ""},
		{"an owner that means nobody", [][]entry{{file("f", "").Owned(1<<32-1, 0)}}, "is not between", ""},
		{"an owner below zero", [][]entry{{file("f", "").Owned(0, -5)}}, "is not between", ""},
		{"an empty link", [][]entry{{link("f", "")}}, "link to nothing", ""},
		{"a part of a name that is too long", [][]entry{{file(strings.Repeat("n", 300), "")}}, "at most 255", ""},
		{"a name that is too long", [][]entry{{file(strings.Repeat("n/", 3000)+"f", "")}}, "at most 2048", ""},
		{"a link target that is too long", [][]entry{{link("f", strings.Repeat("n", 3000))}}, "at most 2048", ""},
		{"attributes that are too large", [][]entry{{file("f", "").Attr("user.x", strings.Repeat("v", 4000))}}, "attributes have more than", "f"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPlace(t)
			var layers [][]byte
			for _, entries := range tt.layers {
				for i := range entries {
					entries[i].Name = strings.ReplaceAll(entries[i].Name, "BASE", p.base)
					entries[i].Link = strings.ReplaceAll(entries[i].Link, "BASE", p.base)
				}
				layers = append(layers, tarOf(t, entries...))
			}
			_, err := p.unpack(t, oci.Limits{}, layers...)
			p.untouched(t)
			if tt.says == "" && err != nil {
				t.Errorf("refused: %v", err)
			}
			if tt.says != "" && (!sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), tt.says)) {
				t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
			}
			if strings.Contains(tt.tree, "BASE") { // the same path, but in the tree
				if _, err := os.Stat(filepath.Join(p.tree, p.base, "outside")); err != nil {
					t.Errorf("an absolute link did not stay in the tree: %v", err)
				}
				return
			}
			if got := p.names(t); got != tt.tree {
				t.Errorf("the tree has %q, want %q", got, tt.tree)
			}
		})
	}
}

// TestBombs: what grows is stopped by the bound that it breaks, before it has
// taken more than that.
func TestBombs(t *testing.T) {
	many := make([]entry, 200)
	for i := range many {
		many[i] = file(fmt.Sprintf("f%d", i), "")
	}
	deep := make([]entry, 100)
	for i := range deep {
		deep[i] = file(fmt.Sprintf("%d/b/c/d/e/f", i), "") // five folders for each name
	}
	for _, tt := range []struct {
		name   string
		limits oci.Limits
		layers [][]byte
		says   string
	}{
		{"a large file", oci.Limits{Bytes: 1000}, [][]byte{tarOf(t, file("f", strings.Repeat("x", 1001)))}, "more than 1000 bytes"},
		{"files that are large together", oci.Limits{Bytes: 1000}, [][]byte{
			tarOf(t, file("f", strings.Repeat("x", 600))), tarOf(t, file("f", strings.Repeat("y", 600))),
		}, "more than 1000 bytes"},
		{"a file that says it has a petabyte", oci.Limits{}, [][]byte{sparse(t, 1<<50)}, "more than 17179869184 bytes"},
		{"many entries", oci.Limits{Entries: 100}, [][]byte{tarOf(t, many...)}, "more than 100 entries"},
		{"many folders that no entry names", oci.Limits{Entries: 300}, [][]byte{tarOf(t, deep...)}, "more than 300 entries"},
		{"many bytes of names", oci.Limits{Names: 500}, [][]byte{tarOf(t, many...)}, "more than 500 bytes together"},
		{"zeros in gzip", oci.Limits{RatioFrom: 1 << 20}, [][]byte{gz(t, tarOf(t, file("f", strings.Repeat("\x00", 8<<20))))}, "more than 200 times"},
		{"zeros in zstd", oci.Limits{RatioFrom: 1 << 20}, [][]byte{zst(t, tarOf(t, file("f", strings.Repeat("\x00", 8<<20))))}, "more than 200 times"},
		{"zeros in xz", oci.Limits{RatioFrom: 1 << 20}, [][]byte{xzOf(t, tarOf(t, file("f", strings.Repeat("\x00", 8<<20))))}, "more than 200 times"},
		{"zeros in bzip2", oci.Limits{RatioFrom: 1 << 20}, [][]byte{bz2(t, tarOf(t, file("f", strings.Repeat("\x00", 8<<20))))}, "more than 200 times"},
		{"xz that wants to remember 192 MiB", oci.Limits{}, [][]byte{remembering(t, 31)}, "xz stream is broken: xz: LZMA2 dictionary size exceeds max"},
		{"zeros behind the end", oci.Limits{RatioFrom: 1 << 20}, [][]byte{gz(t, append(tarOf(t, file("f", "")), make([]byte, 8<<20)...))}, "more than 200 times"},
		{"many layers", oci.Limits{Layers: 2}, [][]byte{tarOf(t, file("a", "")), tarOf(t, file("b", "")), tarOf(t, file("c", ""))}, "3 layers, at most 2"},
		{"a gzip stream that is cut off", oci.Limits{}, [][]byte{gz(t, tarOf(t, file("f", strings.Repeat("x", 1<<20))))[:600]}, "gzip stream is broken"},
		{"a tar file that is cut off", oci.Limits{}, [][]byte{tarOf(t, file("f", strings.Repeat("x", 1<<20)))[:9000]}, "not a whole tar file"},
		{"no tar file at all", oci.Limits{}, [][]byte{bytes.Repeat([]byte("x"), 2000)}, "not a whole tar file"},
		{"an xz stream that is cut off", oci.Limits{}, [][]byte{xzOf(t, tarOf(t, file("f", strings.Repeat("x", 1<<20))))[:200]}, "xz stream is broken"},
		{"an xz stream that is none", oci.Limits{}, [][]byte{[]byte("\xfd7zXZ\x00 and more")}, "xz stream is broken"},
		{"a bzip2 stream that is cut off", oci.Limits{}, [][]byte{bz2(t, tarOf(t, file("f", strings.Repeat("x", 1<<20))))[:40]}, "bzip2 stream is broken"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPlace(t)
			_, err := p.unpack(t, tt.limits, tt.layers...)
			p.untouched(t)
			if !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
			}
		})
	}
}

// remembering is an xz stream whose dictionary has a size of this code, as the
// format counts them.
func remembering(t testing.TB, code byte) []byte {
	t.Helper()
	data := xzOf(t, tarOf(t, file("f", "x")))
	header := data[12 : 12+4*(int(data[12])+1)] // of the first block, behind that of the stream
	at := bytes.Index(header, []byte{0x21, 1})  // LZMA2, with one byte of properties
	if at < 0 {
		t.Fatalf("no LZMA2 in %x", header)
	}
	header[at+2] = code
	sum := len(header) - 4
	binary.LittleEndian.PutUint32(header[sum:], crc32.ChecksumIEEE(header[:sum]))
	return data
}

// sparse is a tar file with one file that is nothing but a hole.
func sparse(t testing.TB, size int64) []byte {
	t.Helper()
	raw := tarOf(t, entry{Name: "GNUSparseFile.0/f", Mode: 0o644, Data: "1\n0\n0\n" + strings.Repeat("\x00", 506)})
	r := tar.NewReader(bytes.NewReader(raw))
	h, err := r.Next()
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	// The library writes no sparse records: put them in by hand.
	records := ""
	for _, kv := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=f", fmt.Sprintf("GNU.sparse.realsize=%d", size)} {
		n := len(kv) + 2
		for ; len(fmt.Sprint(n))+len(kv)+2 != n; n++ {
		}
		records += fmt.Sprintf("%d %s\n", n, kv)
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.WriteHeader(&tar.Header{Name: "pax", Typeflag: tar.TypeReg, Size: int64(len(records)), Format: tar.FormatUSTAR}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(records)); err != nil {
		t.Fatal(err)
	}
	h.PAXRecords, h.Format = nil, tar.FormatUSTAR
	if err := w.WriteHeader(h); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	out := buf.Bytes()
	out[156] = 'x' // an extended header
	copy(out[148:156], "        ")
	check := 0
	for _, c := range out[:512] {
		check += int(c)
	}
	copy(out[148:156], fmt.Sprintf("%06o\x00 ", check))
	return out
}

// TestHolesTakeNoDisk: a file of zeros within the bounds is as large as it says
// and takes no blocks.
func TestHolesTakeNoDisk(t *testing.T) {
	p := newPlace(t)
	data := append(make([]byte, 3<<20), "end"...)
	copy(data[1<<20:], "middle")
	if _, err := p.unpack(t, oci.Limits{}, tarOf(t, file("f", string(data)))); err != nil {
		t.Fatal(err)
	}
	if p.read(t, "f") != string(data) {
		t.Error("the file has other bytes")
	}
	info, err := os.Stat(filepath.Join(p.tree, "f"))
	if err != nil {
		t.Fatal(err)
	}
	if blocks := allocated(info); blocks > 64<<10 {
		t.Errorf("%d bytes of mostly zeros take %d", info.Size(), blocks)
	}
}

// FuzzUnpack: no stream of bytes changes anything outside the folder, or takes
// more than its bounds.
func FuzzUnpack(f *testing.F) {
	for _, entries := range [][]entry{
		{dir("a"), file("a/b", "x"), link("l", "a"), file("l/c", "y"), hard("h", "a/b"), whiteout("a/.wh.b"), device("null")},
		{link("out", "../../outside"), file("out/secret", "x"), whiteout("out/.wh..wh..opq")},
		{file("../secret", "x"), file("f", "").Attr("user.a", "b").Owned(1, 2).Moded(0o4755)},
	} {
		whole := tarOf(f, entries...)
		f.Add(whole)
		f.Add(gz(f, whole))
		f.Add(zst(f, whole))
		f.Add(xzOf(f, whole))
		f.Add(bz2(f, whole))
	}
	f.Add(sparse(f, 1<<40))
	testkit.Root(f)
	limits := oci.Limits{Bytes: 1 << 20, Entries: 1000, RatioFrom: 1 << 20}
	f.Fuzz(func(t *testing.T, data []byte) {
		p := newPlace(t)
		report, err := p.unpack(t, limits, data)
		p.untouched(t)
		if err == nil && (report.Bytes > limits.Bytes || report.Entries > limits.Entries) {
			t.Errorf("past the bounds: %+v", report)
		}
		_, _ = oci.UnpackTar(t.Context(), bytes.NewReader(data), p.tree, limits) // over what is there
		p.untouched(t)
	})
}
