// Package base makes what disks lie on: the images of templates become manifests in
// the snapshot store, and manifests become what a disk driver takes.
//
// From then on a base is one thing, wherever it comes from: a template, the pause of
// a sandbox, a snapshot. It promises that what it gives out is what was built: an
// image is compared with its digest when it is imported, a layer with its own before
// device-mapper gets it.
//
// It leaves to the host when this is done, and which manifests are in use.
package base

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// Disk is what the manifest of a disk is called in a reference.
const Disk = "disk"

const (
	refPrefix    = "dormouse.base." // no snapshot of a user's has such a name
	refDigits    = 50               // of the image's digest: names have 64 characters at the most
	digestPrefix = "sha256:"
)

// Images are the images of templates in a snapshot store. Each has a reference that
// is named after its digest.
type Images struct {
	Store *snapshot.Store
	Log   *slog.Logger
	Now   func() time.Time

	mu sync.Mutex // one import at a time: each reads as fast as the disk can
}

// meta is what a reference says of the image.
type meta struct {
	Image string `json:"image"` // "sha256:…" of its bytes
}

// refName is the reference of an image.
func refName(digest string) (string, error) {
	digits, ok := strings.CutPrefix(digest, digestPrefix)
	if sum, err := hex.DecodeString(digits); !ok || err != nil || len(sum) != sha256.Size || digits != strings.ToLower(digits) {
		return "", sandbox.Errorf(sandbox.KindInvalid, "%q is no digest of an image", digest)
	}
	return refPrefix + digits[:refDigits], nil
}

// Import finds the manifest of an image, or makes it at the first time, from the
// image's file. What is damaged in the store is made anew. The manifest is pinned
// for the caller, and kept by its reference until Sweep.
//
// The first time costs reading and hashing the whole file, and writing its data;
// afterwards a reference, a manifest and the tail of a layer are read. After a crash
// at any point there is the whole or nothing with a name.
func (i *Images) Import(ctx context.Context, path, digest string) (*snapshot.Pin, error) {
	name, err := refName(digest)
	if err != nil {
		return nil, err
	}
	if pin, err := i.find(name, digest); err == nil {
		return pin, nil // also while another one is imported
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	pin, err := i.find(name, digest)
	if err == nil {
		return pin, nil
	}
	if sandbox.Is(err, sandbox.KindConflict) {
		return nil, fmt.Errorf("find image %s: %w", digest, err)
	}
	if !sandbox.Is(err, sandbox.KindNotFound) {
		i.log().Warn("a base cannot be read and is made anew", "image", digest, "err", err)
	}
	if pin, err = i.make(ctx, name, path, digest); err != nil {
		return nil, fmt.Errorf("import image %s: %w", digest, err)
	}
	return pin, nil
}

func (i *Images) log() *slog.Logger {
	if i.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return i.Log
}

// find opens what a reference names, which checks it as far as that costs little.
func (i *Images) find(name, digest string) (*snapshot.Pin, error) {
	ref, err := i.Store.Ref(name)
	if err != nil {
		return nil, err
	}
	if m, err := metaOf(ref); err != nil || m.Image != digest {
		return nil, sandbox.Errorf(sandbox.KindConflict, "reference %s is about the image %q, not %s (%v)", name, m.Image, digest, err)
	}
	pin, err := i.Store.Pin(ref.Manifests[Disk])
	if err != nil {
		return nil, err
	}
	image, err := i.Store.Image(pin.Digest)
	if err == nil {
		err = image.Close()
	}
	if err != nil {
		pin.Release()
		return nil, err
	}
	return pin, nil
}

func metaOf(ref snapshot.Ref) (m meta, err error) {
	return m, json.Unmarshal(ref.Meta, &m)
}

// make imports an image and gives it its name.
func (i *Images) make(ctx context.Context, name, path, digest string) (_ *snapshot.Pin, err error) {
	began := time.Now()
	pin, stats, err := i.importChecked(ctx, path, digest)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			pin.Release()
		}
	}()
	data, err := json.Marshal(meta{Image: digest})
	if err != nil {
		return nil, err
	}
	now := i.Now
	if now == nil {
		now = time.Now
	}
	if err := fault.Point(ctx, "base/name"); err != nil {
		return nil, err
	}
	err = i.Store.SetRef(snapshot.Ref{Name: name, CreatedAt: now(), Manifests: map[string]snapshot.Digest{Disk: pin.Digest}, Meta: data})
	if err != nil {
		return nil, err
	}
	i.log().Info("image imported", "image", digest, "manifest", pin.Digest, "bytes", stats.Bytes, "took", time.Since(began))
	return pin, nil
}

// importChecked copies the image while it is compared with its digest. What is
// published and turns out to be something else has no name, and is collected.
func (i *Images) importChecked(ctx context.Context, path, digest string) (pin *snapshot.Pin, stats snapshot.Stats, err error) {
	group, both := errgroup.WithContext(ctx)
	group.Go(func() error { return hasDigest(both, path, digest) })
	group.Go(func() (err error) {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		if err := fault.Point(both, "base/import"); err != nil {
			return err
		}
		pin, stats, err = i.Store.Import(both, snapshot.Disk, f)
		return err
	})
	if err = group.Wait(); err != nil && pin != nil {
		pin.Release()
		pin = nil
	}
	return pin, stats, err
}

// hasDigest reads a file to the end.
func hasDigest(ctx context.Context, path, digest string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	hash := sha256.New()
	for n := int64(1); n > 0; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if n, err = io.CopyN(hash, f, 1<<20); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	if got := digestPrefix + hex.EncodeToString(hash.Sum(nil)); got != digest {
		return sandbox.Errorf(sandbox.KindConflict, "%s is not what was built: its digest is %s", path, got)
	}
	return nil
}

// Sweep takes the names from images that no template has any more. What a sandbox
// or a snapshot is made of stays, as long as somebody else keeps it.
func (i *Images) Sweep(keep []string) error {
	refs, err := i.Store.Refs()
	errs := []error{err}
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, ref := range refs {
		if !strings.HasPrefix(ref.Name, refPrefix) {
			continue
		}
		m, err := metaOf(ref)
		if name, bad := refName(m.Image); err != nil || bad != nil || name != ref.Name {
			continue // not one of these
		}
		if !slices.Contains(keep, m.Image) {
			errs = append(errs, i.Store.RemoveRef(ref.Name))
		}
	}
	return errors.Join(errs...)
}
