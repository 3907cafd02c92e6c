package snapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Ref is a name for what belongs together: the memory and the disk of a VM at one
// point, the state of its devices, and what its owner has to say of it. What a
// reference names is kept.
type Ref struct {
	Name      string            `json:"name"`
	CreatedAt time.Time         `json:"created_at"`
	Manifests map[string]Digest `json:"manifests,omitempty"`
	Objects   map[string]Digest `json:"objects,omitempty"`
	Meta      json.RawMessage   `json:"meta,omitempty"` // the owner's
}

// refFile is a reference on the disk.
type refFile struct {
	Format int `json:"format"` // 1
	Ref
}

const (
	refSuffix   = ".json"
	refFormat   = 1
	maxRefBytes = 1 << 20
)

func (s *Store) refPath(name string) string {
	return filepath.Join(s.dir, refsDir, name+refSuffix)
}

// SetRef makes a reference, or replaces one whole. What it names must be there,
// with every layer, and pinned by the caller until then: after a crash there is
// the old reference or the new one, and all that it names.
func (s *Store) SetRef(r Ref) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("set reference %s: %w", r.Name, sandbox.NoSpace(err))
		}
	}()
	if err := sandbox.SafeName("reference", r.Name); err != nil {
		return err
	}
	defer s.publishing()()
	if err := s.whole(r); err != nil {
		return err
	}
	data, err := json.MarshalIndent(refFile{refFormat, r}, "", "  ")
	if err != nil {
		return err
	}
	if len(data) > maxRefBytes {
		return sandbox.Errorf(sandbox.KindInvalid, "%d bytes are more than %d", len(data), maxRefBytes)
	}
	return osfs.WriteFile("snapshot-ref", s.refPath(r.Name), append(data, '\n'), 0o600)
}

// whole says whether all that a reference names is there, by its size.
func (s *Store) whole(r Ref) error {
	for _, d := range r.Manifests {
		m, err := s.Manifest(d)
		if err != nil {
			return err
		}
		for _, l := range m.Layers {
			info, err := os.Stat(s.LayerPath(l.Digest))
			if err != nil {
				return missing("layer", l.Digest, err)
			}
			if want := l.Blocks*BlockBytes + tailBytes(l.Blocks); info.Size() != want {
				return &CorruptError{s.LayerPath(l.Digest), 0, info.Size(), fmt.Sprintf("are %d too few", want-info.Size())}
			}
		}
	}
	for _, d := range r.Objects {
		if _, err := s.Object(d); err != nil {
			return err
		}
	}
	return nil
}

// Ref reads a reference.
func (s *Store) Ref(name string) (Ref, error) {
	if err := sandbox.SafeName("reference", name); err != nil {
		return Ref{}, err
	}
	data, err := osfs.ReadFileLimit(s.refPath(name), maxRefBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return Ref{}, sandbox.Errorf(sandbox.KindNotFound, "there is no reference %s", name)
	}
	if err != nil {
		return Ref{}, fmt.Errorf("reference %s: %w", name, err)
	}
	r, err := parseRef(data)
	if err == nil && r.Name != name {
		err = fmt.Errorf("it is about %q", r.Name)
	}
	if err != nil {
		return Ref{}, fmt.Errorf("reference %s: %w", name, err)
	}
	return r, nil
}

func parseRef(data []byte) (Ref, error) {
	var f refFile
	if err := json.Unmarshal(data, &f); err != nil {
		return Ref{}, err
	}
	if f.Format != refFormat {
		return Ref{}, fmt.Errorf("format version %d, this build reads %d", f.Format, refFormat)
	}
	return f.Ref, sandbox.SafeName("reference", f.Name)
}

// Refs reads every reference, by name. One that cannot be read is an error with
// its name, beside those that can.
func (s *Store) Refs() ([]Ref, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, refsDir))
	if err != nil {
		return nil, fmt.Errorf("list references: %w", err)
	}
	var refs []Ref
	var errs []error
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), refSuffix)
		if !ok || strings.HasPrefix(e.Name(), tempPrefix) {
			continue
		}
		r, err := s.Ref(name)
		if sandbox.Is(err, sandbox.KindNotFound) {
			continue // it was removed just now
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		refs = append(refs, r)
	}
	return refs, errors.Join(errs...)
}

// RemoveRef removes a reference; what only it has kept goes with the next
// Collect. Removing what is gone is success.
func (s *Store) RemoveRef(name string) error {
	if err := sandbox.SafeName("reference", name); err != nil {
		return err
	}
	if err := osfs.Remove("snapshot-ref", s.refPath(name)); err != nil {
		return fmt.Errorf("remove reference %s: %w", name, err)
	}
	return nil
}

// digests are all that a reference names.
func (r Ref) digests() []Digest {
	return slices.Concat(slices.Collect(maps.Values(r.Manifests)), slices.Collect(maps.Values(r.Objects)))
}
