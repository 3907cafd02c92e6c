package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// What a store's folder has in it.
const (
	layersDir    = "layers"
	manifestsDir = "manifests"
	objectsDir   = "objects"
	refsDir      = "refs"

	layerSuffix    = ".layer"
	manifestSuffix = ".manifest"
	objectSuffix   = ".object"
	tempPrefix     = ".tmp-" // as osfs has it

	maxObjectBytes = 64 << 20
)

// Store is the manifests and layers of one machine. One process at a time has a
// store; within it, every method may be called from any goroutine.
type Store struct {
	Reader
	lock *os.File

	// gate is held shared by whoever publishes, until what was published is
	// pinned, and whole by Collect. It comes before mu.
	gate sync.RWMutex

	mu   sync.Mutex // guards what is below
	pins map[Digest]int
}

// Config says where a store is.
type Config struct {
	Dir string
	// Group may read it: the pager's. 0 is nobody but the owner, root. What is in
	// a store is all that its guests knew.
	Group int
}

// Open opens a store and makes it at the first time. What a crash left half
// written is removed.
func Open(cfg Config) (_ *Store, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open snapshot store: %w", sandbox.NoSpace(err))
		}
	}()
	dir := cfg.Dir
	if err := errors.Join(osfs.MkdirAll("snapshot-dir", dir, 0o710), shut(dir, cfg.Group)); err != nil {
		return nil, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	for _, sub := range []string{layersDir, manifestsDir, objectsDir, refsDir} {
		path := filepath.Join(dir, sub)
		if err := errors.Join(osfs.MkdirAll("snapshot-dir", path, 0o755), osfs.SweepTemp(path)); err != nil {
			return nil, err
		}
	}
	return &Store{Reader: Reader{dir: dir, layers: map[Digest]*sharedLayer{}}, lock: lock, pins: map[Digest]int{}}, nil
}

// shut keeps everybody but a group out of a folder, and so of all that is in it.
func shut(dir string, group int) error {
	if group == 0 {
		return os.Chmod(dir, 0o700)
	}
	return errors.Join(os.Chown(dir, -1, group), os.Chmod(dir, 0o710))
}

// lockDir keeps a second process out. The lock goes with the process.
func lockDir(dir string) (*os.File, error) {
	f, err := osfs.LockDir(dir)
	if errors.Is(err, osfs.ErrLocked) {
		return nil, sandbox.Errorf(sandbox.KindConflict, "another process has the store in %s", dir)
	}
	return f, err
}

// Close gives the store up. Open images stay readable.
func (s *Store) Close() error { return closeFile(s.lock) }

// publishing keeps Collect out until the returned function is called.
func (s *Store) publishing() (done func()) {
	s.gate.RLock()
	return s.gate.RUnlock
}

// Pin keeps a manifest, with all that it needs, an object or a layer from Collect.
type Pin struct {
	Digest Digest
	once   sync.Once
	store  *Store
}

// Release ends the pin. It may be called twice.
func (p *Pin) Release() {
	p.once.Do(func() {
		p.store.mu.Lock()
		defer p.store.mu.Unlock()
		if p.store.pins[p.Digest]--; p.store.pins[p.Digest] == 0 {
			delete(p.store.pins, p.Digest)
		}
	})
}

func (s *Store) pin(d Digest) *Pin {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pins[d]++
	return &Pin{Digest: d, store: s}
}

// Pin pins a manifest or an object that is there.
func (s *Store) Pin(d Digest) (*Pin, error) {
	defer s.publishing()()
	if _, err := os.Lstat(s.ManifestPath(d)); err == nil {
		return s.pin(d), nil
	}
	if _, err := os.Lstat(s.objectPath(d)); err != nil {
		return nil, missing("manifest or object", d, err)
	}
	return s.pin(d), nil
}

// Has says whether there is a manifest.
func (s *Store) Has(d Digest) bool {
	_, err := os.Lstat(s.ManifestPath(d))
	return err == nil
}

// publishLayer publishes a layer, in place of what may be there: that may be
// damaged, and open.
func (s *Store) publishLayer(w *layerWriter) (LayerRef, error) {
	ref, err := w.publish(s.layersDir())
	if err == nil {
		s.forget(ref.Digest)
	}
	return ref, err
}

// writeManifest publishes a manifest; one that is there already stays.
func (s *Store) writeManifest(d Digest, data []byte) error {
	return writeOnce("snapshot-manifest", s.ManifestPath(d), data)
}

// writeOnce writes a file whose name is the hash of its content.
func writeOnce(op, path string, data []byte) error {
	if have, err := osfs.ReadFileLimit(path, int64(len(data))); err == nil && bytes.Equal(have, data) {
		return osfs.SyncDir(filepath.Dir(path)) // it may have been renamed just before a crash
	}
	return osfs.WriteFile(op, path, data, 0o444)
}

// WriteObject publishes a small file, such as the state of a VM's devices, and
// pins it.
func (s *Store) WriteObject(ctx context.Context, data []byte) (*Pin, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	if len(data) > maxObjectBytes {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "an object of %d bytes is larger than %d", len(data), maxObjectBytes)
	}
	defer s.publishing()()
	d := DigestOf(data)
	if err := writeOnce("snapshot-object", s.objectPath(d), data); err != nil {
		return nil, fmt.Errorf("write object: %w", sandbox.NoSpace(err))
	}
	return s.pin(d), nil
}

// Image opens a manifest with its layers, and pins it until it is closed.
func (s *Store) Image(d Digest) (*Image, error) {
	pin, err := s.Pin(d)
	if err != nil {
		return nil, err
	}
	i, err := s.Reader.Image(d)
	if err != nil {
		pin.Release()
		return nil, err
	}
	unpinned := i.release
	i.release = func() error {
		defer pin.Release()
		return unpinned()
	}
	return i, nil
}
