package oci

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Image is one image for linux/amd64, found and described but not unpacked.
type Image struct {
	// Digest names all of it: that of its manifest or, in Docker's archives,
	// which have none, that of its configuration.
	Digest string
	Config Config

	layers []layer
	close  func() error
}

// Close removes what opening an archive has put into a temporary folder. It may
// be called twice.
func (i *Image) Close() error {
	if i.close == nil {
		return nil
	}
	err := i.close()
	i.close = nil
	return err
}

// Unpack puts the image into a folder that exists and is empty. Nobody else may
// reach into that folder: files in it can be setuid. Note is called with a line
// about each layer, when it begins. After an error, what is in the folder is of
// no use.
func (i *Image) Unpack(ctx context.Context, dir string, limits Limits, note func(done, of int, line string)) (_ Report, err error) {
	if most := limits.withDefaults().Layers; len(i.layers) > most {
		return Report{}, invalid("the image has %d layers, at most %d", len(i.layers), most)
	}
	tree, err := OpenTree(dir)
	if err != nil {
		return Report{}, err
	}
	defer func() { err = errors.Join(err, tree.Close()) }()
	u := newUnpacker(tree, limits, true)
	for n, l := range i.layers {
		if note != nil {
			note(n, len(i.layers), fmt.Sprintf("layer %d of %d: %s%s", n+1, len(i.layers), l.name(), sizeText(l.size)))
		}
		if err := l.unpack(ctx, u); err != nil {
			return Report{}, fmt.Errorf("layer %d of %d, %s: %w", n+1, len(i.layers), l.name(), err)
		}
	}
	return u.report, nil
}

func sizeText(bytes int64) string {
	if bytes < 0 {
		return ""
	}
	return fmt.Sprintf(", %.1f MiB", float64(bytes)/(1<<20))
}

// UnpackTar puts a root file system from a tar file, plain or compressed with
// gzip, zstd, xz or bzip2, into a folder that exists and is empty. What holds for
// Image.Unpack holds here, but a tar file has no whiteouts.
func UnpackTar(ctx context.Context, r io.Reader, dir string, limits Limits) (_ Report, err error) {
	tree, err := OpenTree(dir)
	if err != nil {
		return Report{}, err
	}
	defer func() { err = errors.Join(err, tree.Close()) }()
	u := newUnpacker(tree, limits, false)
	l := layer{size: -1, open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(r), nil }}
	if err := l.unpack(ctx, u); err != nil {
		return Report{}, fmt.Errorf("tar file: %w", err)
	}
	if u.report.Entries == 0 {
		return Report{}, invalid("tar file: it is empty")
	}
	return u.report, nil
}

// source is where the parts of images are.
type source interface {
	// manifest opens a manifest or an index.
	manifest(ctx context.Context, d v1.Descriptor) ([]byte, error)
	// blob opens anything else.
	blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error)
}

// readImage follows a manifest, or an index of several, to an image.
func readImage(ctx context.Context, from source, raw []byte) (*Image, error) {
	for range 4 { // an index may hold another one; nobody needs more
		index, err := indexOf(raw)
		if err != nil {
			return nil, err
		}
		if index == nil {
			return readManifest(ctx, from, raw)
		}
		d, err := choose(index)
		if err != nil {
			return nil, err
		}
		if raw, err = readMetadata(ctx, from.manifest, d); err != nil {
			return nil, fmt.Errorf("read manifest %s: %w", d.Digest, err)
		}
	}
	return nil, invalid("the image is an index in an index in an index")
}

// readMetadata reads something small whole, and compares it with its digest.
func readMetadata(ctx context.Context, read func(context.Context, v1.Descriptor) ([]byte, error), d v1.Descriptor) ([]byte, error) {
	if err := checkDescriptor(d, maxMetadata); err != nil {
		return nil, err
	}
	data, err := read(ctx, d)
	if err != nil {
		return nil, err
	}
	if have := digestOf(data); have != d.Digest.String() {
		return nil, invalid("its bytes have the digest %s", have)
	}
	return data, nil
}

func checkDescriptor(d v1.Descriptor, most int64) error {
	if err := checkDigest(d.Digest.String()); err != nil {
		return err
	}
	if d.Size < 0 || d.Size > most {
		return invalid("%s has %d bytes, at most %d", d.Digest, d.Size, most)
	}
	return nil
}

// indexOf parses an index; it is nil for what is something else.
func indexOf(raw []byte) (*v1.IndexManifest, error) {
	var what struct {
		MediaType types.MediaType `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
		Layers    json.RawMessage `json:"layers"`
	}
	if err := parse(raw, &what); err != nil {
		return nil, fmt.Errorf("parse manifest: %w", err)
	}
	if what.MediaType.IsSchema1() {
		return nil, invalid("the image is of Docker's first format, which has been given up: push it anew")
	}
	if what.Manifests == nil || what.Layers != nil {
		return nil, nil
	}
	var index v1.IndexManifest
	if err := parse(raw, &index); err != nil {
		return nil, fmt.Errorf("parse index: %w", err)
	}
	return &index, nil
}

// choose finds the image for this kind of machine. A single one that does not
// say what it is for is taken; its configuration is looked at later.
func choose(index *v1.IndexManifest) (v1.Descriptor, error) {
	var have []string
	var silent []v1.Descriptor
	for _, d := range index.Manifests {
		switch p := d.Platform; {
		case p == nil:
			silent = append(silent, d)
		case p.OS == "linux" && p.Architecture == "amd64":
			return d, nil
		case p.OS != "unknown": // attestations are
			have = append(have, fmt.Sprintf("%.40s/%.40s", p.OS, p.Architecture))
		}
	}
	if len(silent) == 1 {
		return silent[0], nil
	}
	if len(silent) > 1 {
		return v1.Descriptor{}, invalid("the index holds %d images and does not say which machines they are for", len(silent))
	}
	return v1.Descriptor{}, invalid("there is no image for linux/amd64, only for: %.500s", strings.Join(have, ", "))
}

func readManifest(ctx context.Context, from source, raw []byte) (*Image, error) {
	var m v1.Manifest
	if err := parse(raw, &m); err != nil {
		return nil, fmt.Errorf("parse manifest: %w", err)
	}
	config, err := readMetadata(ctx, readAll(from), m.Config)
	if err != nil {
		return nil, fmt.Errorf("read configuration %s: %w", m.Config.Digest, err)
	}
	image := &Image{Digest: digestOf(raw)}
	for _, d := range m.Layers {
		if err := checkDescriptor(d, maxBlob); err != nil {
			return nil, fmt.Errorf("layer: %w", err)
		}
		if !d.MediaType.IsLayer() && d.MediaType != "application/vnd.oci.image.layer.v1.tar+zstd" {
			return nil, invalid("layer %s is of type %.100q: this is not an image of a file system", d.Digest, d.MediaType)
		}
		image.layers = append(image.layers, layer{
			digest: d.Digest.String(), size: d.Size,
			open: func(ctx context.Context) (io.ReadCloser, error) { return from.blob(ctx, d) },
		})
	}
	return image, image.describe(config)
}

func readAll(from source) func(context.Context, v1.Descriptor) ([]byte, error) {
	return func(ctx context.Context, d v1.Descriptor) ([]byte, error) {
		r, err := from.blob(ctx, d)
		if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(io.LimitReader(r, maxMetadata+1))
		return data, errors.Join(err, r.Close())
	}
}

// describe takes over a configuration, and binds each layer to what it must
// unpack to.
func (i *Image) describe(raw []byte) error {
	var file v1.ConfigFile
	if err := parse(raw, &file); err != nil {
		return fmt.Errorf("parse configuration: %w", err)
	}
	if file.OS != "linux" || file.Architecture != "amd64" {
		return invalid("the image is for %.40s/%.40s, sandboxes are linux/amd64", file.OS, file.Architecture)
	}
	if len(file.RootFS.DiffIDs) != len(i.layers) {
		return invalid("the image has %d layers and the digests of %d", len(i.layers), len(file.RootFS.DiffIDs))
	}
	for n, id := range file.RootFS.DiffIDs {
		if err := checkDigest(id.String()); err != nil {
			return err
		}
		i.layers[n].diffID = id.String()
	}
	var err error
	i.Config, err = configOf(file.Config)
	return err
}

func parse(raw []byte, v any) error {
	if len(raw) > maxMetadata {
		return invalid("it has %d bytes, at most %d", len(raw), maxMetadata)
	}
	if err := json.NewDecoder(bytes.NewReader(raw)).Decode(v); err != nil {
		return sandbox.WithKind(sandbox.KindInvalid, err)
	}
	return nil
}
