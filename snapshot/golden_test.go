package snapshot_test

import (
	"bytes"
	"encoding/hex"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// TestFormatsAreWhatTheDocsSay compares what is written with the hexdumps in
// docs/formats, and reads those back.
func TestFormatsAreWhatTheDocsSay(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	first := func(data []byte) *snapshot.Pin {
		b, err := s.First(snapshot.Memory, int64(len(data)/block))
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Put(t.Context(), 0, data); err != nil {
			t.Fatal(err)
		}
		pin, err := b.Publish(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return pin
	}
	one := first(bytes.Repeat([]byte{0x5a}, block))
	base := first(bytes.Repeat([]byte{0x11}, 8*block))
	image, err := s.Image(base.Digest)
	if err != nil {
		t.Fatal(err)
	}
	b := s.Next(image)
	if err := b.Put(t.Context(), 1, append(bytes.Repeat([]byte{0x22}, 2*block), make([]byte, block)...)); err != nil {
		t.Fatal(err)
	}
	second, err := b.Publish(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Error(err)
	}
	m, err := s.Manifest(one.Digest)
	if err != nil {
		t.Fatal(err)
	}
	for doc, path := range map[string]string{
		"layer.md":    s.LayerPath(m.Layers[0].Digest),
		"manifest.md": filepath.Join(dir, "manifests", second.Digest.String()+".manifest"),
	} {
		written, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(filepath.Join("..", "docs", "formats", doc))
		if err != nil {
			t.Fatal(err)
		}
		if got := parseDump(t, string(text)); !bytes.Equal(got, written) {
			t.Errorf("%s has %d bytes, written are %d:\n%s", doc, len(got), len(written), hex.Dump(written))
		}
	}
}

var dumpLine = regexp.MustCompile(`(?m)^([0-9a-f]{8})  ((?:[0-9a-f]{2}(?: {1,2}|$)){1,16})`)

// parseDump reads a hexdump in which a line of * stands for repetitions.
func parseDump(t *testing.T, text string) []byte {
	t.Helper()
	var out []byte
	for _, line := range dumpLine.FindAllStringSubmatch(text, -1) {
		at, err := hex.DecodeString(line[1])
		if err != nil {
			t.Fatal(err)
		}
		offset := int(at[0])<<24 | int(at[1])<<16 | int(at[2])<<8 | int(at[3])
		for len(out) < offset { // the lines that * stands for
			out = append(out, out[len(out)-16:]...)
		}
		data, err := hex.DecodeString(strings.ReplaceAll(line[2], " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, data...)
	}
	return out
}
