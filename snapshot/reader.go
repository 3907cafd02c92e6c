package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Reader reads the store of another process, which keeps what is read from being
// collected. Its methods may be called from any goroutine.
type Reader struct {
	dir string

	readMu sync.Mutex // guards what is below; comes last
	layers map[Digest]*sharedLayer
}

// NewReader reads the store in a folder.
func NewReader(dir string) *Reader { return &Reader{dir: dir, layers: map[Digest]*sharedLayer{}} }

// sharedLayer is a layer that several images read.
type sharedLayer struct {
	digest Digest
	once   sync.Once
	layer  *Layer
	err    error
	users  int // guarded by Reader.readMu
}

func layerName(d Digest) string { return d.String() + layerSuffix }

func (r *Reader) layersDir() string { return filepath.Join(r.dir, layersDir) }

// LayerPath is where a layer's file is.
func (r *Reader) LayerPath(d Digest) string { return filepath.Join(r.layersDir(), layerName(d)) }

// ManifestPath is where a manifest's file is. What is put beside it, under the same
// name with a dot and more behind it, goes with it, as with a layer.
func (r *Reader) ManifestPath(d Digest) string {
	return filepath.Join(r.dir, manifestsDir, d.String()+manifestSuffix)
}

func (r *Reader) objectPath(d Digest) string {
	return filepath.Join(r.dir, objectsDir, d.String()+objectSuffix)
}

// Manifest reads a manifest and checks it.
func (r *Reader) Manifest(d Digest) (*Manifest, error) {
	path := r.ManifestPath(d)
	data, err := osfs.ReadFileLimit(path, maxManifestBytes)
	if err != nil {
		return nil, missing("manifest", d, err)
	}
	m, err := Decode(data)
	if err == nil && m.digest != d {
		err = fmt.Errorf("it is the manifest %s", m.digest)
	}
	if err != nil {
		return nil, &CorruptError{path, 0, int64(len(data)), "are not what was written: " + err.Error()}
	}
	return m, nil
}

// Manifests lists the manifests that there are, in no order.
func (r *Reader) Manifests() ([]Digest, error) {
	entries, err := os.ReadDir(filepath.Join(r.dir, manifestsDir))
	if err != nil {
		return nil, fmt.Errorf("list manifests: %w", err)
	}
	out := make([]Digest, 0, len(entries))
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), manifestSuffix)
		if d, err := ParseDigest(name); ok && err == nil {
			out = append(out, d)
		}
	}
	return out, nil
}

// Object reads an object and checks it.
func (r *Reader) Object(d Digest) ([]byte, error) {
	path := r.objectPath(d)
	data, err := osfs.ReadFileLimit(path, maxObjectBytes)
	if err != nil {
		return nil, missing("object", d, err)
	}
	if DigestOf(data) != d {
		return nil, &CorruptError{path, 0, int64(len(data)), "are not what was written"}
	}
	return data, nil
}

// Image opens a manifest with its layers.
func (r *Reader) Image(d Digest) (_ *Image, err error) {
	i := &Image{}
	var shared []*sharedLayer
	i.release = sync.OnceValue(func() error {
		var errs []error
		for _, l := range shared {
			errs = append(errs, r.leave(l))
		}
		return errors.Join(errs...)
	})
	defer func() {
		if err != nil {
			err = errors.Join(err, i.release())
		}
	}()
	if i.manifest, err = r.Manifest(d); err != nil {
		return nil, err
	}
	for _, ref := range i.manifest.Layers {
		user, err := r.layer(ref.Digest)
		if err != nil {
			return nil, fmt.Errorf("open layer: %w", err)
		}
		l := user.layer
		shared, i.layers = append(shared, user), append(i.layers, l)
		if l.ref.Blocks != ref.Blocks {
			return nil, fmt.Errorf("layer %s has %d blocks, the manifest says %d", ref.Digest, l.ref.Blocks, ref.Blocks)
		}
	}
	return i, nil
}

// layer opens a layer, once for all images.
func (r *Reader) layer(d Digest) (*sharedLayer, error) {
	r.readMu.Lock()
	shared := r.layers[d]
	if shared == nil {
		shared = &sharedLayer{digest: d}
		r.layers[d] = shared
	}
	shared.users++
	r.readMu.Unlock()
	shared.once.Do(func() { shared.layer, shared.err = openLayer(r.LayerPath(d), d) }) // not under the lock: it reads
	if shared.err != nil {
		return nil, errors.Join(missing("layer", d, shared.err), r.leave(shared))
	}
	return shared, nil
}

// leave closes a layer after its last user.
func (r *Reader) leave(shared *sharedLayer) error {
	r.readMu.Lock()
	shared.users--
	last := shared.users == 0
	if last && r.layers[shared.digest] == shared { // else it was forgotten
		delete(r.layers, shared.digest)
	}
	r.readMu.Unlock()
	if !last || shared.layer == nil {
		return nil
	}
	return shared.layer.Close()
}

// forget makes the next image open a layer's file anew.
func (r *Reader) forget(d Digest) {
	r.readMu.Lock()
	defer r.readMu.Unlock()
	delete(r.layers, d)
}

func missing(what string, d Digest, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return sandbox.Errorf(sandbox.KindNotFound, "there is no %s %s: %w", what, d, err)
	}
	return fmt.Errorf("%s %s: %w", what, d, err)
}

// Allocated is what a manifest takes with its layers, in bytes of allocated
// blocks.
func (r *Reader) Allocated(d Digest) (int64, error) {
	m, err := r.Manifest(d)
	if err != nil {
		return 0, err
	}
	total, err := sparse.AllocatedAt(r.ManifestPath(d))
	if err != nil {
		return 0, err
	}
	for _, l := range m.Layers {
		n, err := sparse.AllocatedAt(r.LayerPath(l.Digest))
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, nil
}
