package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/internal/sparse"
)

// Report is what Verify found.
type Report struct {
	Manifests int
	Layers    int
	Objects   int
	Bytes     int64 // that were read and checked
	Damage    []Damage
}

// Damage is a file that is missing or not what was written.
type Damage struct {
	Digest Digest // of the layer, manifest or object
	File   string
	Err    error // a *CorruptError where something is there
}

// Verify reads everything that a reference names, to the last byte, and checks
// it; manifests that it was made from are checked as far as they are still there.
// An error says that it could not be found out.
func (s *Store) Verify(ctx context.Context, name string) (Report, error) {
	v := verifier{store: s, seen: map[Digest]bool{}}
	r, err := s.Ref(name)
	if err != nil {
		return v.report, err
	}
	for _, d := range r.Manifests {
		if err := v.line(ctx, d); err != nil {
			return v.report, fmt.Errorf("verify %s: %w", name, err)
		}
	}
	for _, d := range r.Objects {
		v.object(d)
	}
	return v.report, nil
}

type verifier struct {
	store  *Store
	seen   map[Digest]bool
	report Report
}

// line checks a manifest and those before it.
func (v *verifier) line(ctx context.Context, d Digest) error {
	for first := true; !d.IsZero() && !v.seen[d]; first = false {
		v.seen[d] = true
		m, err := v.store.Manifest(d)
		if errors.Is(err, fs.ErrNotExist) && !first {
			return nil // it was not needed any more
		}
		v.report.Manifests++
		if err != nil {
			v.damaged(d, v.store.ManifestPath(d), err)
			return nil
		}
		for _, ref := range m.Layers {
			if err := v.layer(ctx, ref.Digest, first); err != nil {
				return err
			}
		}
		d = m.Parent
	}
	return nil
}

// layer checks every chunk of a layer; one that only an earlier manifest of the
// line uses may be gone.
func (v *verifier) layer(ctx context.Context, d Digest, needed bool) (err error) {
	if v.seen[d] {
		return nil
	}
	path := v.store.LayerPath(d)
	l, err := openLayer(path, d)
	if errors.Is(err, fs.ErrNotExist) && !needed {
		return nil
	}
	v.seen[d] = true
	v.report.Layers++
	if err != nil {
		v.damaged(d, path, err)
		return nil
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	return l.verifyAll(ctx, func(bytes int, err error) error {
		v.report.Bytes += int64(bytes)
		if err != nil {
			v.damaged(d, path, err)
		}
		return nil
	})
}

// verifyAll reads every chunk of a layer, and says how much is good or what is not,
// until found returns an error.
func (l *Layer) verifyAll(ctx context.Context, found func(bytes int, err error) error) error {
	var buf [chunkBytes]byte
	for chunk := range int64(len(l.chunks)) {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		data, err := l.verify(chunk, &buf)
		if err := found(len(data), err); err != nil {
			return err
		}
	}
	return nil
}

// VerifyLayer reads a layer to its last byte and checks it: for whoever goes on to
// use the file in another way than through this package.
func (r *Reader) VerifyLayer(ctx context.Context, d Digest) (err error) {
	l, err := openLayer(r.LayerPath(d), d)
	if err != nil {
		return missing("layer", d, err)
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	var damage []error
	err = l.verifyAll(ctx, func(_ int, err error) error {
		if err != nil && len(damage) < maxLayerDamage {
			damage = append(damage, err)
		}
		return nil
	})
	return errors.Join(append(damage, err)...)
}

const maxLayerDamage = 10 // of VerifyLayer's error

func (v *verifier) object(d Digest) {
	v.report.Objects++
	data, err := v.store.Object(d)
	if err != nil {
		v.damaged(d, v.store.objectPath(d), err)
		return
	}
	v.report.Bytes += int64(len(data))
}

func (v *verifier) damaged(d Digest, file string, err error) {
	v.report.Damage = append(v.report.Damage, Damage{d, file, err})
}

// Sizes is what a reference takes on the disk, in bytes of allocated blocks: with
// what was put beside its layers, and with blocks that a file system shares counted
// in each file.
type Sizes struct {
	All int64 // of every file that it needs
	Own int64 // of those that no other reference needs
}

// Size measures a reference.
func (s *Store) Size(name string) (Sizes, error) {
	refs, err := s.Refs()
	if err != nil {
		return Sizes{}, err
	}
	users := map[string]int{}
	var mine map[string]bool
	for _, r := range refs {
		files, err := s.files(r)
		if err != nil {
			return Sizes{}, fmt.Errorf("size of %s: %w", r.Name, err)
		}
		for path := range files {
			users[path]++
		}
		if r.Name == name {
			mine = files
		}
	}
	if mine == nil {
		_, err := s.Ref(name)
		return Sizes{}, err
	}
	beside, err := s.besideLayers()
	if err != nil {
		return Sizes{}, fmt.Errorf("size of %s: %w", name, err)
	}
	var out Sizes
	for path := range mine {
		n, _ := sparse.AllocatedAt(path) // 0 for one that is gone
		n += beside[path]
		out.All += n
		if users[path] == 1 {
			out.Own += n
		}
	}
	return out, nil
}

// besideLayers is what was put beside each layer, in bytes of allocated blocks.
func (s *Store) besideLayers() (map[string]int64, error) {
	entries, err := os.ReadDir(s.layersDir())
	if err != nil {
		return nil, err
	}
	sizes := map[string]int64{}
	for _, e := range entries {
		if d, ok := ownerOf(e.Name(), layerSuffix); ok && e.Name() != layerName(d) {
			n, _ := sparse.AllocatedAt(filepath.Join(s.layersDir(), e.Name())) // 0 for one that is gone
			sizes[s.LayerPath(d)] += n
		}
	}
	return sizes, nil
}

// files are all that a reference needs.
func (s *Store) files(r Ref) (map[string]bool, error) {
	files := map[string]bool{s.refPath(r.Name): true}
	for _, d := range r.Manifests {
		m, err := s.Manifest(d)
		if err != nil {
			return nil, err
		}
		files[s.ManifestPath(d)] = true
		for _, l := range m.Layers {
			files[s.LayerPath(l.Digest)] = true
		}
	}
	for _, d := range r.Objects {
		files[s.objectPath(d)] = true
	}
	return files, nil
}
