package dm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Layout is a base that is put together from several layers. Its extents follow
// one another from byte 0, so that they can neither overlap nor leave a gap.
type Layout struct {
	Format  int      `json:"format"` // 1
	Layers  []string `json:"layers"` // absolute paths of immutable files
	Extents []Extent `json:"extents"`
}

// Extent is a range of a layer, or zeros.
type Extent struct {
	Bytes  int64 `json:"n"`
	Layer  int   `json:"l"` // index of Layers, or Zero
	Offset int64 `json:"o"` // in the layer; 0 for zeros
}

// Zero is the layer of an extent of zeros.
const Zero = -1

// Bounds of a layout: what one table and one record can be.
const (
	maxLayers      = 1024
	maxExtents     = 1 << 20
	maxLayoutBytes = 128 << 20
	maxBaseBytes   = 1 << 50
)

// WriteLayout publishes a layout for disk.Config.Layout; neighbours are merged.
func WriteLayout(path string, l Layout) error {
	l.Format = 1
	if err := l.check(); err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	l.Extents = merge(l.Extents)
	data, err := json.Marshal(l)
	if err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	if err := osfs.WriteFile("disk-layout", path, data, 0o444); err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	return nil
}

func readLayout(path string) (Layout, error) {
	data, err := osfs.ReadFileLimit(path, maxLayoutBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return Layout{}, sandbox.Errorf(sandbox.KindNotFound, "read layout: %w", err)
	}
	if err != nil {
		return Layout{}, fmt.Errorf("read layout: %w", err)
	}
	l, err := parseLayout(data)
	if err != nil {
		return Layout{}, sandbox.Errorf(sandbox.KindInvalid, "read layout %s: %w", path, err)
	}
	return l, nil
}

func parseLayout(data []byte) (Layout, error) {
	var l Layout
	if err := json.Unmarshal(data, &l); err != nil {
		return Layout{}, err
	}
	if err := l.check(); err != nil {
		return Layout{}, err
	}
	return l, nil
}

func (l Layout) check() error {
	if l.Format != 1 {
		return fmt.Errorf("format %d is not known", l.Format)
	}
	if len(l.Layers) > maxLayers || len(l.Extents) > maxExtents {
		return fmt.Errorf("%d layers and %d extents are more than %d and %d", len(l.Layers), len(l.Extents), maxLayers, maxExtents)
	}
	for _, path := range l.Layers {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("layer %q must be an absolute path", path)
		}
	}
	var total int64
	for i, e := range l.Extents {
		ok := e.Bytes > 0 && e.Bytes%blockBytes == 0 && e.Bytes <= maxBaseBytes && total+e.Bytes <= maxBaseBytes
		switch {
		case e.Layer == Zero:
			ok = ok && e.Offset == 0
		default:
			ok = ok && e.Layer >= 0 && e.Layer < len(l.Layers) && e.Offset >= 0 && e.Offset <= maxBaseBytes && e.Offset%blockBytes == 0
		}
		if !ok {
			return fmt.Errorf("extent %d of %d bytes from layer %d at %d is not possible", i, e.Bytes, e.Layer, e.Offset)
		}
		total += e.Bytes
	}
	if total == 0 {
		return errors.New("no extents")
	}
	return nil
}

// merge joins extents that follow one another in the same layer: reading through
// many small ones is slow.
func merge(extents []Extent) []Extent {
	var out []Extent
	for _, e := range extents {
		if n := len(out); n > 0 {
			last := &out[n-1]
			if last.Layer == e.Layer && (e.Layer == Zero || last.Offset+last.Bytes == e.Offset) {
				last.Bytes += e.Bytes
				continue
			}
		}
		out = append(out, e)
	}
	return out
}

// layer is one sealed file.
type layer struct {
	path string
	seal seal
}

// base is what lies below an overlay.
type base struct {
	layers  []layer
	extents []Extent // merged, up to the size of the disk
	bytes   int64    // of the base without the zeros behind it
	id      string   // of the content and the size, in hex
}

// baseOf finds, checks and seals what a disk of size bytes lies on: one file,
// or what a layout says.
func (d *Driver) baseOf(ctx context.Context, file, layout string, size int64) (base, error) {
	var l Layout
	if layout != "" {
		var err error
		if l, err = readLayout(layout); err != nil {
			return base{}, err
		}
	} else {
		n, err := layerSize(file)
		if err != nil {
			return base{}, err
		}
		l = Layout{Format: 1, Layers: []string{file}, Extents: []Extent{{Bytes: n}}}
	}
	b := base{extents: l.Extents}
	for _, e := range l.Extents {
		b.bytes += e.Bytes
	}
	if size < b.bytes {
		return base{}, sandbox.Errorf(sandbox.KindInvalid, "disk of %d bytes is smaller than its base, which has %d", size, b.bytes)
	}
	for _, path := range l.Layers {
		s, err := d.sealed(ctx, path)
		if err != nil {
			return base{}, err
		}
		b.layers = append(b.layers, layer{path, s})
	}
	if size > b.bytes {
		b.extents = append(b.extents, Extent{Bytes: size - b.bytes, Layer: Zero})
	}
	b.extents = merge(b.extents)
	return b, b.identify()
}

// identify checks the extents against their layers and names what they make.
func (b *base) identify() error {
	hash := sha256.New()
	for _, l := range b.layers {
		_, _ = fmt.Fprintf(hash, "layer %q %s\n", l.path, l.seal.Root) // a hash takes everything
	}
	for i, e := range b.extents {
		if e.Layer != Zero && e.Offset+e.Bytes > b.layers[e.Layer].seal.Bytes {
			return sandbox.Errorf(sandbox.KindInvalid, "extent %d ends at %d of %s, which has %d bytes",
				i, e.Offset+e.Bytes, b.layers[e.Layer].path, b.layers[e.Layer].seal.Bytes)
		}
		_, _ = fmt.Fprintf(hash, "%d %d %d\n", e.Bytes, e.Layer, e.Offset) // a hash takes everything
	}
	b.id = hex.EncodeToString(hash.Sum(nil))
	return nil
}

// table maps the base over the devices of its layers.
func (b base) table(devs []uint64) []target {
	table := make([]target, 0, len(b.extents))
	var at uint64
	for _, e := range b.extents {
		t := target{start: at, length: uint64(e.Bytes / sector), kind: "zero"}
		if e.Layer != Zero {
			t.kind, t.params = "linear", fmt.Sprintf("%s %d", number(devs[e.Layer]), e.Offset/sector)
		}
		table = append(table, t)
		at += t.length
	}
	return table
}
