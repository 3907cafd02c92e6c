package dm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

const goodSeal = `{"format": 1, "algorithm": "sha256", "block_bytes": 4096, "data_bytes": 8192,
 "root": "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"}`

func TestParseSeal(t *testing.T) {
	s, err := parseSeal([]byte(goodSeal))
	if err != nil || s.blocks() != 2 || s.root[31] != 0x1f {
		t.Fatalf("%+v, %v", s, err)
	}
	for name, change := range map[string][2]string{
		"another format":        {`"format": 1`, `"format": 2`},
		"another hash":          {`sha256`, `sha512`},
		"another block":         {`4096`, `512`},
		"half a block":          {`8192`, `8191`},
		"no data":               {`8192`, `0`},
		"less than none":        {`8192`, `-4096`},
		"a root too short":      {`1e1f"`, `1e"`},
		"a root too long":       {`1e1f"`, `1e1f20"`},
		"a root that is no hex": {`1e1f"`, `1e1g"`},
		"no root":               {`"root"`, `"boot"`},
		"something behind":      {"\"}", "\"} {}"},
	} {
		text := strings.Replace(goodSeal, change[0], change[1], 1)
		if s, err := parseSeal([]byte(text)); err == nil || s != (seal{}) {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	for n := range goodSeal {
		if s, err := parseSeal([]byte(goodSeal[:n])); err == nil {
			t.Fatalf("cut at %d: %+v", n, s)
		}
	}
}

func FuzzParseSeal(f *testing.F) {
	f.Add([]byte(goodSeal))
	f.Add([]byte(`{"format":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parseSeal(data)
		if err != nil {
			return
		}
		if root, err := hex.DecodeString(s.Root); err != nil || digest(root) != s.root || s.blocks() < 1 || s.blocks()*blockBytes != s.Bytes {
			t.Errorf("%+v is taken", s)
		}
	})
}

const goodRecord = `{"format": 1, "base": "/b", "size_bytes": 8192, "id": "00ff"}`

func TestParseRecord(t *testing.T) {
	r, err := parseRecord([]byte(goodRecord))
	if diff := cmp.Diff(record{Format: 1, Base: "/b", SizeBytes: 8192, ID: "00ff"}, r); err != nil || diff != "" {
		t.Fatalf("%v\n%s", err, diff)
	}
	if r, err := parseRecord([]byte(strings.Replace(goodRecord, "1", "2", 1))); err == nil {
		t.Errorf("another format: %+v", r)
	}
	for n := range goodRecord {
		if r, err := parseRecord([]byte(goodRecord[:n])); err == nil {
			t.Fatalf("cut at %d: %+v", n, r)
		}
	}
}

func FuzzParseRecord(f *testing.F) {
	f.Add([]byte(goodRecord))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseRecord(data)
		if err == nil && r.Format != 1 || err != nil && r != (record{}) {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

func goodLayout() Layout {
	return Layout{Format: 1, Layers: []string{"/a", "/b"}, Extents: []Extent{
		{Bytes: 4096, Layer: 0}, {Bytes: 8192, Layer: Zero}, {Bytes: 4096, Layer: 1, Offset: 4096},
	}}
}

func TestParseLayoutRefuses(t *testing.T) {
	for name, change := range map[string]func(l *Layout){
		"another format":            func(l *Layout) { l.Format = 2 },
		"no extents":                func(l *Layout) { l.Extents = nil },
		"a layer by relative path":  func(l *Layout) { l.Layers[1] = "b" },
		"a layer that is not named": func(l *Layout) { l.Extents[0].Layer = 2 },
		"a layer below zero":        func(l *Layout) { l.Extents[0].Layer = -2 },
		"half a block":              func(l *Layout) { l.Extents[0].Bytes = 2048 },
		"an empty extent":           func(l *Layout) { l.Extents[0].Bytes = 0 },
		"less than nothing":         func(l *Layout) { l.Extents[0].Bytes = -4096 },
		"from half a block":         func(l *Layout) { l.Extents[2].Offset = 512 },
		"from before the start":     func(l *Layout) { l.Extents[2].Offset = -4096 },
		"zeros from somewhere":      func(l *Layout) { l.Extents[1].Offset = 4096 },
		"more than an int64 holds":  func(l *Layout) { l.Extents[0].Bytes, l.Extents[1].Bytes = 1<<62, 1<<62 },
		"an end beyond an int64":    func(l *Layout) { l.Extents[2].Offset = 1<<63 - 4096 },
		"too many layers":           func(l *Layout) { l.Layers = slices.Repeat([]string{"/a"}, maxLayers+1) },
	} {
		l := goodLayout()
		change(&l)
		data, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseLayout(data); err == nil {
			t.Errorf("%s is taken", name)
		}
		if l.Format == 1 {
			if err := WriteLayout(filepath.Join(t.TempDir(), "l"), l); err == nil {
				t.Errorf("%s is written", name)
			}
		}
	}
	many := goodLayout()
	if many.Extents = slices.Repeat(many.Extents[:1], maxExtents+1); many.check() == nil {
		t.Error("too many extents are taken")
	}
	whole, err := json.Marshal(goodLayout())
	if err != nil {
		t.Fatal(err)
	}
	for n := range whole {
		if l, err := parseLayout(whole[:n]); err == nil {
			t.Fatalf("cut at %d: %+v", n, l)
		}
	}
}

func TestWriteLayoutMergesNeighbours(t *testing.T) {
	path := filepath.Join(t.TempDir(), "layout")
	err := WriteLayout(path, Layout{Layers: []string{"/a", "/b"}, Extents: []Extent{
		{Bytes: 4096, Layer: 0},
		{Bytes: 8192, Layer: 0, Offset: 4096},
		{Bytes: 4096, Layer: 0, Offset: 20480}, // not a neighbour
		{Bytes: 4096, Layer: 1, Offset: 24576}, // another layer
		{Bytes: 4096, Layer: Zero},
		{Bytes: 4096, Layer: Zero},
	}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := readLayout(path)
	if err != nil {
		t.Fatal(err)
	}
	want := []Extent{{12288, 0, 0}, {4096, 0, 20480}, {4096, 1, 24576}, {8192, Zero, 0}}
	if diff := cmp.Diff(want, l.Extents); diff != "" {
		t.Error(diff)
	}
}

func FuzzParseLayout(f *testing.F) {
	whole, err := json.Marshal(goodLayout())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add([]byte(`{"format":1,"layers":[],"extents":[{"n":4096,"l":-1,"o":0}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := parseLayout(data)
		if err != nil {
			return
		}
		var total int64
		for _, e := range merge(l.Extents) {
			if e.Bytes <= 0 || e.Offset < 0 || e.Offset+e.Bytes < 0 || e.Layer >= len(l.Layers) {
				t.Fatalf("extent %+v is taken", e)
			}
			total += e.Bytes
		}
		if total <= 0 || total > maxBaseBytes {
			t.Errorf("%d bytes in all", total)
		}
	})
}

func TestParseFill(t *testing.T) {
	got, err := parseFill("24/2080 16")
	if want := (Fill{Used: 24 * 512, Total: 2080 * 512, Metadata: 16 * 512}); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []string{
		"", "Invalid", "Overflow", "Merge failed", "Unknown", "24/2080", "24 2080 16", "1 2/3", "24/2080 16 1", "-1/2080 16", "24/2080 x", "24//2080 16",
		"99999999999999999999/1 1", "24/2080 ",
	} {
		if got, err := parseFill(bad); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("%q: %+v, %v", bad, got, err)
		}
	}
}

func FuzzParseFill(f *testing.F) {
	f.Add("24/2080 16")
	f.Add("Invalid")
	f.Fuzz(func(t *testing.T, status string) {
		if got, err := parseFill(status); err == nil && (got.Used < 0 || got.Total < 0 || got.Metadata < 0 || (got.Used|got.Total|got.Metadata)%sector != 0) {
			t.Errorf("%q: %+v", status, got)
		}
	})
}

// TestTreeIsWhatVeritysetupReads keeps the tree's format: its hash was taken when
// veritysetup (cryptsetup 2.6) had verified it, and does so again where there is one.
func TestTreeIsWhatVeritysetupReads(t *testing.T) {
	for _, tt := range []struct {
		blocks int
		root   string
		tree   string // SHA-256 of the file
	}{
		{1, "4b51793bf408c73c17c59c31594fb308c19444cf42803758b1c6cdcf01dca242", "b61928a1dac8e878358da2430608e235608989ce69078691d8c35c8e5e25633f"},
		{2, "f3a2eda417e87ea746ce770e6beca62fb4b4b24a8a7549b5664abe9ccbf5522b", "821e0170286190cf894c3b7baf9a27194ff2177da58e80eb8364a4d940a1c4b8"},
		{128, "274b98c4c15d4091afb346162e0be5289c9ca174bb7f643ce7d5224a962f16f2", "758161e4e06749d5713c421a57c03b64a11057ba6ef848b13ea5644d0cbc8ace"},
		{129, "59518a121dca0c6f3f5d996e1c18f7d214645d6bceb002ef644a2d862cb715dd", "6d74a474596ac90a93692f4095bd3391518e4fb97ef5f255eb12042cb88763d8"},
		{128*128 + 1, "464575435b4486db6c8d0460aea9ac0db1d2f9d976cf003bebb999ee693b90c3", "d3bc49460385f7932260a7054e849d6d0f90de5d85fb491e47d0ae3b10c7d4b6"}, // three levels
	} {
		if testkit.InLab() && tt.blocks > 1000 {
			continue // TestVeritysetupAgrees makes that one
		}
		layer, s := sealedLayer(t, tt.blocks)
		tree, err := os.ReadFile(layer + treeSuffix)
		if err != nil {
			t.Fatal(err)
		}
		if sum := sha256.Sum256(tree); s.Root != tt.root || hex.EncodeToString(sum[:]) != tt.tree {
			t.Errorf("{%d, %q, \"%x\"}", tt.blocks, s.Root, sum)
		}
		if int64(len(tree)) != treeBytes(int64(tt.blocks)) {
			t.Errorf("the tree of %d blocks has %d bytes, not %d", tt.blocks, len(tree), treeBytes(int64(tt.blocks)))
		}
	}
}

func sealedLayer(t *testing.T, blocks int) (string, seal) {
	t.Helper()
	layer := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(layer, pattern(blocks, 7), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := fakeRig(t).driver.sealed(t.Context(), layer)
	if err != nil {
		t.Fatal(err)
	}
	return layer, s
}

// TestVeritysetupAgrees asks cryptsetup's own tool, which needs no kernel for it.
func TestVeritysetupAgrees(t *testing.T) {
	_, err := exec.LookPath("veritysetup")
	testkit.Require(t, "dm", err == nil, "veritysetup is not on PATH") // the lab has both
	verify := func(layer string, s seal) ([]byte, error) {
		return exec.CommandContext(t.Context(), "veritysetup", "verify", layer, layer+treeSuffix, s.Root).CombinedOutput()
	}
	for _, blocks := range []int{1, 2, 128, 129, 128*128 + 1} {
		layer, s := sealedLayer(t, blocks)
		if out, err := verify(layer, s); err != nil {
			t.Errorf("%d blocks: %v: %s", blocks, err, out)
		}
		if blocks > 1000 { // that was slow, under emulation
			continue
		}
		flip(t, layer, int64(blocks)*blockBytes*8-9)
		if out, err := verify(layer, s); err == nil {
			t.Errorf("%d blocks, one of them damaged: veritysetup says it is right: %s", blocks, out)
		}
	}
}

// flip changes one bit of a file, as a worn disk does: without a new time.
func flip(t testing.TB, path string, bit int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrPermission) {
		err = os.Chmod(path, 0o600)
		if err == nil {
			f, err = os.OpenFile(path, os.O_RDWR, 0)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, bit/8); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1 << (bit % 8)
	_, err = f.WriteAt(b, bit/8)
	if err := errors.Join(err, f.Close(), os.Chtimes(path, info.ModTime(), info.ModTime())); err != nil {
		t.Fatal(err)
	}
}

func TestRecordsAreBounded(t *testing.T) {
	dir := t.TempDir()
	if err := osfs.WriteFile("test", filepath.Join(dir, recordFile), bytes.Repeat([]byte(" "), maxDiskRecord+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if r, err := readRecord(dir); err == nil {
		t.Errorf("%+v", r)
	}
}
