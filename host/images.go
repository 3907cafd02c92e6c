package host

import (
	"context"
	"log/slog"
	"os"
	"sync"

	"github.com/dormouse-sandbox/dormouse/host/base"
	"github.com/dormouse-sandbox/dormouse/snapshot"
	"github.com/dormouse-sandbox/dormouse/template"
)

// Pages is a page server, as package pager keeps it: a folder with a file for
// each manifest, by its digest.
type Pages interface {
	Path(name string) string
	File(name string) (*os.File, error)
	Damaged(name string) bool
}

// StoreImages is Images of a store that a page server serves. The dm driver gets
// layouts of the layers themselves, and needs no page server for its disks.
type StoreImages struct {
	Store *snapshot.Store
	Pages Pages
	// Sealer makes the layers of layouts ready; needed for dm alone.
	Sealer base.Sealer
	Log    *slog.Logger

	once   sync.Once
	images *base.Images
}

func (s *StoreImages) bases() *base.Images {
	s.once.Do(func() { s.images = &base.Images{Store: s.Store, Log: s.Log} })
	return s.images
}

// Base is the manifest of a template's disk. The first time, the image is copied
// into the store.
func (s *StoreImages) Base(ctx context.Context, t template.Template, bytes int64) (*snapshot.Pin, error) {
	image, err := s.bases().Import(ctx, t.Image, t.Digest)
	if err != nil {
		return nil, err
	}
	defer image.Release()
	return s.grown(ctx, image.Digest, bytes/snapshot.BlockBytes)
}

// Prepare makes ready what disks of a template will lie on, so that no create has
// to: the image is in the store, and its layers are what the driver needs.
func (s *StoreImages) Prepare(ctx context.Context, driver string, t template.Template) error {
	pin, err := s.Base(ctx, t, t.ImageBytes)
	if err != nil {
		return err
	}
	defer pin.Release()
	if driver == "dm" {
		_, _, err = s.Disk(ctx, driver, pin.Digest)
	}
	return err
}

// grown is an image with zeros behind it.
func (s *StoreImages) grown(ctx context.Context, d snapshot.Digest, blocks int64) (*snapshot.Pin, error) {
	small, err := s.Store.Image(d)
	if err != nil {
		return nil, err
	}
	defer func() { _ = small.Close() }() // it was only read
	b := s.Store.Next(small)
	if err := b.Grow(blocks); err != nil {
		return nil, err
	}
	return b.Publish(ctx)
}

// Sweep takes the names from images that no template has any more.
func (s *StoreImages) Sweep(keep []template.Template) error {
	var digests []string
	for _, t := range keep {
		digests = append(digests, t.Digest)
	}
	return s.bases().Sweep(digests)
}

// Disk says what a driver lays an overlay on. A layout lies beside its manifest: it
// is the same for all disks over that, and is collected with it.
func (s *StoreImages) Disk(ctx context.Context, driver string, d snapshot.Digest) (path, layout string, err error) {
	if driver != "dm" {
		return s.Pages.Path(d.String()), "", nil
	}
	layout = s.Store.ManifestPath(d) + ".layout"
	if _, err := os.Stat(layout); err == nil {
		return "", layout, nil
	}
	return "", layout, base.WriteLayout(ctx, s.Store, d, layout, s.Sealer)
}

// Memory opens the file that a VM maps as its memory.
func (s *StoreImages) Memory(d snapshot.Digest) (*os.File, error) { return s.Pages.File(d.String()) }

// Damaged says whether something of a memory could not be read.
func (s *StoreImages) Damaged(d snapshot.Digest) bool { return s.Pages.Damaged(d.String()) }
