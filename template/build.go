package template

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const (
	stepImage   = "make image"
	stepPublish = "publish"
	imageFile   = "root.ext4"
)

// Build makes and publishes the template of a recipe. The same recipe again
// costs nothing; of several builders of one recipe one works and the others
// wait. On error nothing of it is published, and no temporary file stays.
func (s *Store) Build(ctx context.Context, r Recipe, p Progress) (Template, error) {
	if err := r.check(); err != nil {
		return Template{}, err
	}
	want := r.template()
	if t, ok := s.published(want); ok {
		return t, nil
	}
	log, p := recorded(p)
	t, err := s.build(ctx, job{
		want: want, first: stepPackages, imageMiB: r.ImageMiB, log: log,
		fill: func(ctx context.Context, w *work) (filled, error) { return s.fillFromPackages(ctx, w, r, want, p) },
	}, p)
	if err != nil {
		return Template{}, fmt.Errorf("build template %q: %w", r.Name, sandbox.NoSpace(err))
	}
	return t, nil
}

// job is one way to make a template; all of them are cached, locked, packed and
// published by build.
type job struct {
	want     Template // its name and key, and what is known before the work
	first    string   // the step that waits when another process is at it
	imageMiB int
	log      *buildLog // of what the build has told so far
	fill     func(context.Context, *work) (filled, error)
}

// filled is a tree that is ready to become an image.
type filled struct {
	root   string
	record Template // what the tree has told about the template
	// began is when the work began: younger times are not from the source.
	began  time.Time
	blocks int64 // that the tree needs besides its files
}

// published finds a template that is what the recipe wants. One that cannot be
// read is built again.
func (s *Store) published(want Template) (Template, bool) {
	t, err := s.Get(want.Name)
	return t, err == nil && t.Key == want.Key
}

func (s *Store) build(ctx context.Context, j job, p Progress) (_ Template, err error) {
	started, want := time.Now(), j.want
	lock, err := s.lock(ctx, "image-"+want.Key, func() {
		p.line(j.first, Unknown, "another process builds this template; waiting for it")
	})
	if err != nil {
		return Template{}, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if t, ok := s.published(want); ok {
		return t, nil
	}
	cached := filepath.Join(s.cfg.Cache, cacheImages, want.Key)
	record, err := readRecord(cached)
	if err != nil { // not cached, or not usable
		if record, err = s.make(ctx, j, cached, p); err != nil {
			return Template{}, err
		}
	}
	record.Name = want.Name
	p.step(stepPublish, 0)
	if err := s.publish(ctx, record, cached); err != nil {
		return Template{}, fmt.Errorf("publish: %w", err)
	}
	p.step(stepPublish, 1)
	s.log.Info("template published", "template", want.Name, "digest", record.Digest, "took", time.Since(started))
	return s.Get(want.Name)
}

// readRecord reads a cached build and makes sure that its image is there.
func readRecord(cached string) (Template, error) {
	data, err := osfs.ReadFileLimit(filepath.Join(cached, templateFile), maxRecordBytes)
	if err != nil {
		return Template{}, err
	}
	var t Template
	if err := json.Unmarshal(data, &t); err != nil {
		return Template{}, err
	}
	info, err := os.Stat(filepath.Join(cached, imageFile))
	if err != nil {
		return Template{}, err
	}
	if info.Size() != t.ImageBytes {
		return Template{}, fmt.Errorf("cached image has %d bytes, not %d", info.Size(), t.ImageBytes)
	}
	return t, nil
}

// make builds the image in a work folder and moves it into the cache, whole.
func (s *Store) make(ctx context.Context, j job, cached string, p Progress) (_ Template, err error) {
	w, err := s.newWork()
	if err != nil {
		return Template{}, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	out := w.path("out")
	if err := os.Mkdir(out, 0o755); err != nil {
		return Template{}, err
	}
	f, err := j.fill(ctx, w)
	if err != nil {
		return Template{}, err
	}
	record, err := makeImage(ctx, w, f, j.imageMiB, filepath.Join(out, imageFile), p)
	if err != nil {
		return Template{}, err
	}
	if err := errors.Join(writeLog(out, j.log.text()), writeJSON("template-record", filepath.Join(out, templateFile), record)); err != nil {
		return Template{}, err
	}
	return record, s.intoCache(ctx, out, cached)
}

// intoCache replaces whatever unusable thing is there under that key. The
// caller holds the key's lock.
func (s *Store) intoCache(ctx context.Context, out, cached string) error {
	if err := fault.Point(ctx, "template/cache"); err != nil {
		return err
	}
	if err := s.makeCache(); err != nil {
		return err
	}
	if err := osfs.SyncTree(out); err != nil {
		return err
	}
	if err := os.RemoveAll(cached); err != nil {
		return err
	}
	return osfs.Rename("template-cache", out, cached)
}

// fillFromPackages makes the tree of a recipe.
func (s *Store) fillFromPackages(ctx context.Context, w *work, r Recipe, want Template, p Progress) (filled, error) {
	f := filled{root: w.path("root"), record: want, began: time.Now()}
	p.step(stepPackages, 0)
	err := errors.Join(fault.Point(ctx, "template/packages"),
		s.bootstrap(ctx, w, r.mmdebstrapArgs(f.root), bootstrapProgress(p, stepPackages, w.dir)))
	if err != nil {
		return f, fmt.Errorf("%s: %w", stepPackages, err)
	}
	p.step(stepImage, 0)
	if err := errors.Join(fault.Point(ctx, "template/finish"), finish(f.root, r)); err != nil {
		return f, fmt.Errorf("finish root: %w", err)
	}
	return f, nil
}

// makeImage goes from a tree to a finished, read-only image.
func makeImage(ctx context.Context, w *work, f filled, imageMiB int, image string, p Progress) (Template, error) {
	t := f.record
	p.step(stepImage, 0)
	c, err := measure(f.root, f.began)
	if err != nil {
		return t, fmt.Errorf("measure root: %w", err)
	}
	c.blocks += f.blocks
	g, err := layout(c, imageMiB)
	if err != nil {
		return t, err
	}
	if err := fault.Point(ctx, "template/image"); err != nil {
		return t, err
	}
	line := func(text string) {
		if !strings.Contains(text, w.dir) && !strings.Contains(text, "fs_type") { // our own paths, and our own configuration
			p.line(stepImage, 0, text)
		}
	}
	if err := makeExt4(ctx, w, f.root, image, g, t.Key, c.newest, line); err != nil {
		return t, fmt.Errorf("%s: %w", stepImage, err)
	}
	p.step(stepImage, 0.7)
	return seal(ctx, image, t)
}

// seal makes the image read-only and describes it.
func seal(ctx context.Context, image string, t Template) (Template, error) {
	if err := errors.Join(fault.Point(ctx, "template/digest"), os.Chmod(image, 0o444)); err != nil {
		return t, err
	}
	var err error
	if t.Digest, err = digestFile(image); err != nil {
		return t, err
	}
	info, err := os.Stat(image)
	if err != nil {
		return t, err
	}
	t.ImageBytes, t.AllocatedBytes = info.Size(), sparse.Allocated(info)
	t.BuiltAt = time.Now().UTC().Truncate(time.Second)
	return t, nil
}
