package snapshot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot/blob"
)

// What is in a blob store has the names that it has on the disk. A reference is
// put last: what it needs is there before.
func layerKey(d Digest) string    { return layersDir + "/" + layerName(d) }
func manifestKey(d Digest) string { return manifestsDir + "/" + d.String() + manifestSuffix }
func objectKey(d Digest) string   { return objectsDir + "/" + d.String() + objectSuffix }
func refKey(name string) string   { return refsDir + "/" + name + refSuffix }

// Push copies a reference with all that it needs to a blob store. What is there
// already, by name and size, is not sent again.
func (s *Store) Push(ctx context.Context, to blob.Store, name string) error {
	if err := s.push(ctx, to, name); err != nil {
		return fmt.Errorf("push %s: %w", name, err)
	}
	return nil
}

func (s *Store) push(ctx context.Context, to blob.Store, name string) error {
	r, err := s.Ref(name)
	if err != nil {
		return err
	}
	for _, d := range r.Manifests {
		if err := s.pushManifest(ctx, to, d); err != nil {
			return err
		}
	}
	for _, d := range r.Objects {
		if err := pushFile(ctx, to, objectKey(d), s.objectPath(d)); err != nil {
			return err
		}
	}
	data, err := json.Marshal(refFile{refFormat, r})
	if err != nil {
		return err
	}
	return to.Put(ctx, refKey(name), bytes.NewReader(data), int64(len(data)))
}

func (s *Store) pushManifest(ctx context.Context, to blob.Store, d Digest) (err error) {
	image, err := s.Image(d) // pinned, and the tails of its layers are checked
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, image.Close()) }()
	for _, l := range image.layers {
		if err := pushFile(ctx, to, layerKey(l.ref.Digest), l.Path()); err != nil {
			return err
		}
	}
	return pushFile(ctx, to, manifestKey(d), s.ManifestPath(d))
}

func pushFile(ctx context.Context, to blob.Store, key, path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // read only
	info, err := f.Stat()
	if err != nil {
		return err
	}
	size, err := to.Size(ctx, key)
	if err == nil && size == info.Size() {
		return nil
	}
	if err != nil && !sandbox.Is(err, sandbox.KindNotFound) {
		return err
	}
	return to.Put(ctx, key, f, info.Size())
}

// Pull fetches a reference with all that it needs and is not here, checks every
// byte of what it fetches, and then sets the reference.
func (s *Store) Pull(ctx context.Context, from blob.Store, name string) error {
	if err := s.pull(ctx, from, name); err != nil {
		return fmt.Errorf("pull %s: %w", name, sandbox.NoSpace(err))
	}
	return nil
}

func (s *Store) pull(ctx context.Context, from blob.Store, name string) error {
	if err := sandbox.SafeName("reference", name); err != nil {
		return err
	}
	data, err := fetch(ctx, from, refKey(name), maxRefBytes)
	if err != nil {
		return err
	}
	r, err := parseRef(data)
	if err == nil && r.Name != name {
		err = fmt.Errorf("it is about %q", r.Name)
	}
	if err != nil {
		return err
	}
	// Everything is pinned ahead of being fetched, so that Collect may run meanwhile.
	var held pins
	defer func() { held.release() }()
	for _, d := range r.digests() {
		held = append(held, s.pin(d))
	}
	for _, d := range r.Manifests {
		if err := s.pullManifest(ctx, from, d, &held); err != nil {
			return err
		}
	}
	for _, d := range r.Objects {
		if _, err := s.Object(d); err == nil {
			continue
		}
		if err := s.fetchObject(ctx, from, d); err != nil {
			return err
		}
	}
	return s.SetRef(r)
}

// pins are released together.
type pins []*Pin

func (p pins) release() {
	for _, one := range p {
		one.Release()
	}
}

// pullManifest brings the layers first: a manifest that is here is whole.
func (s *Store) pullManifest(ctx context.Context, from blob.Store, d Digest, held *pins) error {
	m, err := s.Manifest(d)
	var fresh []byte
	if err != nil {
		if m, fresh, err = fetchManifest(ctx, from, d); err != nil {
			return err
		}
	}
	for _, l := range m.Layers {
		*held = append(*held, s.pin(l.Digest))
		if have, err := openLayer(s.LayerPath(l.Digest), l.Digest); err == nil {
			if err := have.Close(); err != nil {
				return err
			}
			continue
		}
		if err := s.fetchLayer(ctx, from, l.Digest); err != nil {
			return err
		}
	}
	if fresh == nil {
		return nil
	}
	return s.writeManifest(d, fresh)
}

func fetchManifest(ctx context.Context, from blob.Store, d Digest) (*Manifest, []byte, error) {
	data, err := fetch(ctx, from, manifestKey(d), maxManifestBytes)
	if err != nil {
		return nil, nil, err
	}
	m, err := Decode(data)
	if err == nil && m.digest != d {
		err = fmt.Errorf("manifest: it is %s", m.digest)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("fetch %s: %w", manifestKey(d), err)
	}
	return m, data, nil
}

// fetchLayer brings a layer, in place of what may be there; all of it is checked
// before it gets its name.
func (s *Store) fetchLayer(ctx context.Context, from blob.Store, d Digest) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("fetch layer %s: %w", d, err)
		}
	}()
	r, err := from.Get(ctx, layerKey(d))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	err = osfs.Replace("snapshot-fetch", s.LayerPath(d), 0o444, func(f *os.File) error {
		if _, err := io.Copy(f, r); err != nil {
			return err
		}
		return checkWhole(ctx, f.Name(), d)
	})
	s.forget(d) // what was there may be open; after an error it may be replaced all the same
	return err
}

// checkWhole reads a layer's file to its last byte.
func checkWhole(ctx context.Context, path string, d Digest) (err error) {
	l, err := openLayer(path, d)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	return l.verifyAll(ctx, func(_ int, err error) error { return err })
}

func (s *Store) fetchObject(ctx context.Context, from blob.Store, d Digest) error {
	data, err := fetch(ctx, from, objectKey(d), maxObjectBytes)
	if err != nil {
		return err
	}
	if DigestOf(data) != d {
		return fmt.Errorf("fetch %s: it is not what was written", objectKey(d))
	}
	return writeOnce("snapshot-fetch", s.objectPath(d), data)
}

// fetch reads a small blob.
func fetch(ctx context.Context, from blob.Store, key string, most int64) (_ []byte, err error) {
	r, err := from.Get(ctx, key)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	data, err := io.ReadAll(io.LimitReader(r, most+1))
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", key, err)
	}
	if int64(len(data)) > most {
		return nil, sandbox.Errorf(sandbox.KindTooLarge, "fetch %s: it has more than %d bytes", key, most)
	}
	return data, nil
}

// Repair fetches again what Verify finds damaged, and says what is lost: what the
// blob store does not have either. A nil store repairs nothing. Images that are
// open keep reading the damaged file, and its errors; the next one reads the new.
func (s *Store) Repair(ctx context.Context, from blob.Store, name string) (repaired, lost []Damage, err error) {
	report, err := s.Verify(ctx, name)
	if err != nil {
		return nil, nil, fmt.Errorf("repair: %w", err)
	}
	again := false
	for _, x := range report.Damage {
		if err := s.replace(ctx, from, x); err != nil {
			x.Err = errors.Join(x.Err, err)
			lost = append(lost, x)
			continue
		}
		repaired = append(repaired, x)
		again = again || filepath.Ext(x.File) == manifestSuffix
	}
	if again && len(lost) == 0 { // a manifest can be read now: what it names could not be looked at before
		more, stillLost, err := s.Repair(ctx, from, name)
		return append(repaired, more...), stillLost, err
	}
	return repaired, lost, nil
}

// replace fetches one file again.
func (s *Store) replace(ctx context.Context, from blob.Store, x Damage) error {
	if from == nil {
		return errors.New("there is no blob store to fetch it from")
	}
	switch filepath.Ext(x.File) {
	case layerSuffix:
		return s.fetchLayer(ctx, from, x.Digest)
	case manifestSuffix:
		_, data, err := fetchManifest(ctx, from, x.Digest)
		if err != nil {
			return err
		}
		return osfs.WriteFile("snapshot-fetch", x.File, data, 0o444)
	}
	return s.fetchObject(ctx, from, x.Digest)
}
