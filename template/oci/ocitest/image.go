package ocitest

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Media types.
const (
	Manifest = "application/vnd.oci.image.manifest.v1+json"
	Index    = "application/vnd.oci.image.index.v1+json"
	Layer    = "application/vnd.oci.image.layer.v1.tar"
)

// Image is an image under construction.
type Image struct {
	Layers   [][]byte // as stored
	Types    []string // of the layers
	Plain    [][]byte // what they unpack to
	Config   map[string]any
	OS, Arch string
}

// ImageOf is an image of uncompressed layers for linux/amd64.
func ImageOf(layers ...[]byte) *Image {
	i := &Image{Config: map[string]any{}, OS: "linux", Arch: "amd64"}
	for _, l := range layers {
		i.Layers, i.Plain, i.Types = append(i.Layers, l), append(i.Plain, l), append(i.Types, Layer)
	}
	return i
}

// Parts are an image's blobs by digest, and its manifest, which is one of them.
func (i *Image) Parts(t testing.TB) (blobs map[string][]byte, manifest []byte) {
	t.Helper()
	blobs = map[string][]byte{}
	diffIDs, layers := []string{}, []map[string]any{}
	for n, l := range i.Layers {
		blobs[Digest(l)] = l
		diffIDs = append(diffIDs, Digest(i.Plain[n]))
		layers = append(layers, map[string]any{"mediaType": i.Types[n], "digest": Digest(l), "size": len(l)})
	}
	config := JSON(t, map[string]any{
		"os": i.OS, "architecture": i.Arch, "config": i.Config,
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})
	blobs[Digest(config)] = config
	manifest = JSON(t, map[string]any{
		"schemaVersion": 2, "mediaType": Manifest, "layers": layers,
		"config": map[string]any{"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest(config), "size": len(config)},
	})
	blobs[Digest(manifest)] = manifest
	return blobs, manifest
}

// Digest is the sha256 digest of data.
func Digest(data []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(data)) }

// JSON encodes.
func JSON(t testing.TB, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Descriptor describes a manifest in an index, with a name and, perhaps, an OS
// and an architecture.
func Descriptor(manifest []byte, name string, platform ...string) map[string]any {
	d := map[string]any{
		"mediaType": Manifest, "digest": Digest(manifest), "size": len(manifest),
		"annotations": map[string]string{"org.opencontainers.image.ref.name": name},
	}
	if len(platform) == 2 {
		d["platform"] = map[string]string{"os": platform[0], "architecture": platform[1]}
	}
	return d
}

// Layout writes an OCI layout with these blobs.
func Layout(t testing.TB, blobs map[string][]byte, manifests ...map[string]any) string {
	t.Helper()
	dir := t.TempDir()
	Write(t, filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`))
	Write(t, filepath.Join(dir, "index.json"), JSON(t, map[string]any{"schemaVersion": 2, "manifests": manifests}))
	for digest, data := range blobs {
		Write(t, filepath.Join(dir, "blobs", strings.Replace(digest, ":", "/", 1)), data)
	}
	return dir
}

// LayoutOf writes an OCI layout with one image.
func (i *Image) LayoutOf(t testing.TB) string {
	t.Helper()
	blobs, manifest := i.Parts(t)
	return Layout(t, blobs, Descriptor(manifest, "", i.OS, i.Arch))
}

// Write writes a file and makes the folders above it.
func Write(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// Pack makes a tar file of a folder, as "tar -C dir -c ." does.
func Pack(t testing.TB, dir string) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}
