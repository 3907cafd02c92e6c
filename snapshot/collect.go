package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
)

// Collected is what Collect removed.
type Collected struct {
	Files int
	Bytes int64 // of allocated blocks
}

// Collect deletes the layers, manifests and objects that no reference, no pin and
// none of roots needs; roots lists the digests that the caller knows to be in use,
// such as those of running VMs, and may be nil. It is asked when nothing can be
// published any more and the pins are known: whoever notes a digest among his
// roots before he releases its pin loses nothing. What cannot be read is a reason
// to delete nothing: it might have been needed.
//
// Nothing is published meanwhile. The cost is that of reading every manifest that
// is kept.
func (s *Store) Collect(ctx context.Context, roots func() []Digest) (c Collected, err error) {
	s.gate.Lock()
	defer s.gate.Unlock()
	keep, err := s.reachable(ctx, roots)
	if err != nil {
		return c, fmt.Errorf("collect: nothing is deleted: %w", err)
	}
	// Manifests first: there is none whose layers are gone, at any time.
	for _, kind := range []struct{ dir, suffix string }{{manifestsDir, manifestSuffix}, {objectsDir, objectSuffix}, {layersDir, layerSuffix}} {
		if err := s.sweep(ctx, kind.dir, kind.suffix, keep, &c); err != nil {
			return c, fmt.Errorf("collect: %w", err)
		}
	}
	return c, nil
}

// reachable is everything that has to stay.
func (s *Store) reachable(ctx context.Context, roots func() []Digest) (map[Digest]bool, error) {
	s.mu.Lock()
	pinned := slices.Collect(maps.Keys(s.pins))
	s.mu.Unlock()
	var must []Digest
	if roots != nil {
		must = roots()
	}
	refs, err := s.Refs()
	if err != nil {
		return nil, err
	}
	for _, r := range refs {
		must = append(must, r.digests()...)
	}
	keep := map[Digest]bool{}
	for i, d := range slices.Concat(must, pinned) {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		err := s.mark(d, keep)
		if errors.Is(err, fs.ErrNotExist) && i >= len(must) {
			keep[d] = true // a layer, or something that is pinned ahead of being fetched
			continue
		}
		if err != nil {
			return nil, err
		}
	}
	return keep, nil
}

// mark keeps a manifest with its layers, or an object.
func (s *Store) mark(d Digest, keep map[Digest]bool) error {
	if keep[d] {
		return nil
	}
	m, err := s.Manifest(d)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(s.objectPath(d)); err != nil {
			return missing("manifest or object", d, err)
		}
		keep[d] = true
		return nil
	}
	if err != nil {
		return err
	}
	keep[d] = true
	for _, l := range m.Layers {
		keep[l.Digest] = true
	}
	return nil
}

// sweep deletes the files of a folder that are not kept.
func (s *Store) sweep(ctx context.Context, dir, suffix string, keep map[Digest]bool, c *Collected) error {
	entries, err := os.ReadDir(filepath.Join(s.dir, dir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		d, ok := ownerOf(e.Name(), suffix)
		if !ok || keep[d] {
			continue // kept, or not ours
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		path := filepath.Join(s.dir, dir, e.Name())
		size, _ := sparse.AllocatedAt(path) // 0 for one that is gone
		if err := osfs.Remove("snapshot-collect", path); err != nil {
			return err
		}
		c.Files++
		c.Bytes += size
	}
	return nil
}

// ownerOf is the digest that a file belongs to: its own, or that of the file which
// it was put beside, by somebody who needs more to use that one.
func ownerOf(name, suffix string) (Digest, bool) {
	digits, rest, ok := strings.Cut(name, suffix)
	d, err := ParseDigest(digits)
	return d, ok && err == nil && (rest == "" || rest[0] == '.')
}
