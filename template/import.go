package template

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

const (
	stepFetch  = "fetch image"
	stepUnpack = "unpack"
)

// importVersion is part of every key of an import: raise it when the same source
// gives another image than before.
const importVersion = 1

// maxTarBytes bounds a root file system's tar file as it arrives.
const maxTarBytes = 16 << 30

// Import says how something that others have built becomes a template.
type Import struct {
	Name string // of the template
	From Source
	// ImageMiB is the size of the file system; 0 is what fits, with some room.
	ImageMiB int
	// Limits bound what the source may take; zero fields get defaults.
	Limits oci.Limits
}

// Source is where the files of a template come from: Registry, Layout, Archive
// or Tar.
type Source interface {
	// open finds everything but the files. What it needs on disk goes into w.
	open(ctx context.Context, w *work, limits oci.Limits) (*opened, error)
	String() string // for people; never a secret
}

// Registry is an image in a registry. The credentials are used and not kept.
type Registry struct {
	Ref         string
	Credentials oci.Credentials
}

// Layout is an image in an OCI layout, a folder of this machine. Image says
// which, when there are several.
type Layout struct{ Dir, Image string }

// Archive is an image in an archive, OCI's or that of "docker save".
type Archive struct {
	Reader io.Reader
	Image  string
}

// Tar is a root file system in a tar file, plain or compressed with gzip, zstd, xz
// or bzip2.
type Tar struct{ Reader io.Reader }

func (r Registry) String() string { return "image " + r.Ref }
func (l Layout) String() string   { return "layout " + l.Dir }
func (a Archive) String() string  { return "archive" }
func (t Tar) String() string      { return "tar file" }

// opened is a source that is ready to be unpacked.
type opened struct {
	digest string // of all that it unpacks to, and of its configuration
	config oci.Config
	unpack func(ctx context.Context, dir string, note func(done, of int, line string)) (oci.Report, error)
	close  func() error
}

func (r Registry) open(ctx context.Context, _ *work, limits oci.Limits) (*opened, error) {
	i, err := oci.Pull(ctx, r.Ref, r.Credentials)
	return openedImage(i, limits, err)
}

func (l Layout) open(ctx context.Context, _ *work, limits oci.Limits) (*opened, error) {
	i, err := oci.OpenLayout(ctx, l.Dir, l.Image)
	return openedImage(i, limits, err)
}

func (a Archive) open(ctx context.Context, w *work, limits oci.Limits) (*opened, error) {
	scratch := w.path("archive")
	if err := os.Mkdir(scratch, 0o700); err != nil {
		return nil, err
	}
	i, err := oci.OpenArchive(ctx, a.Reader, scratch, a.Image)
	return openedImage(i, limits, err)
}

func openedImage(i *oci.Image, limits oci.Limits, err error) (*opened, error) {
	if err != nil {
		return nil, err
	}
	return &opened{digest: i.Digest, config: i.Config, close: i.Close, unpack: func(ctx context.Context, dir string, note func(int, int, string)) (oci.Report, error) {
		return i.Unpack(ctx, dir, limits, note)
	}}, nil
}

// open keeps the tar file until it is unpacked: only its end tells its digest.
func (t Tar) open(ctx context.Context, w *work, limits oci.Limits) (*opened, error) {
	f, err := os.OpenFile(w.path("root.tar"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(withContext{ctx, t.Reader}, maxTarBytes+1))
	if err == nil && n > maxTarBytes {
		err = sandbox.Errorf(sandbox.KindInvalid, "the tar file has more than %d bytes", int64(maxTarBytes))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &opened{digest: digestPrefix + hex.EncodeToString(h.Sum(nil)), close: f.Close, unpack: func(ctx context.Context, dir string, _ func(int, int, string)) (oci.Report, error) {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return oci.Report{}, err
		}
		return oci.UnpackTar(ctx, f, dir, limits)
	}}, nil
}

// withContext ends a reader with a context, between two reads.
type withContext struct {
	ctx context.Context
	r   io.Reader
}

func (c withContext) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

// Import makes and publishes a template from what others have built. The same
// source again costs no more than finding it. On an error nothing is published,
// and no temporary file stays.
func (s *Store) Import(ctx context.Context, imp Import, p Progress) (Template, error) {
	if err := imp.check(); err != nil {
		return Template{}, err
	}
	log, p := recorded(p)
	t, err := s.importFrom(ctx, imp, log, p)
	if err != nil {
		return Template{}, fmt.Errorf("build template %q: %w", imp.Name, sandbox.NoSpace(err))
	}
	return t, nil
}

func (imp Import) check() error {
	if err := sandbox.SafeName("template", imp.Name); err != nil {
		return err
	}
	if imp.From == nil {
		return sandbox.Errorf(sandbox.KindInvalid, "a template needs a source")
	}
	return checkImageMiB(imp.ImageMiB)
}

func checkImageMiB(mib int) error {
	if mib != 0 && (mib < minImageMiB || mib > maxImageMiB) {
		return sandbox.Errorf(sandbox.KindInvalid, "image size %d MiB must be 0 or between %d and %d", mib, minImageMiB, maxImageMiB)
	}
	return nil
}

func (s *Store) importFrom(ctx context.Context, imp Import, log *buildLog, p Progress) (_ Template, err error) {
	if os.Geteuid() != 0 {
		return Template{}, errNeedsRoot
	}
	w, err := s.newWork()
	if err != nil {
		return Template{}, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	p.step(stepFetch, Unknown)
	if err := fault.Point(ctx, "template/open"); err != nil {
		return Template{}, err
	}
	from, err := imp.From.open(ctx, w, imp.Limits)
	if err != nil {
		return Template{}, fmt.Errorf("%s: %w", stepFetch, err)
	}
	defer func() { err = errors.Join(err, from.close()) }()
	p.line(stepFetch, 1, imp.From.String()+" is "+from.digest)
	want, err := imp.template(from)
	if err != nil {
		return Template{}, err
	}
	if t, ok := s.published(want); ok {
		return t, nil
	}
	return s.build(ctx, job{
		want: want, first: stepUnpack, imageMiB: imp.ImageMiB, log: log,
		fill: func(ctx context.Context, w *work) (filled, error) { return fillFromImage(ctx, w, from, want, p) },
	}, p)
}

// template is what a source says about its template before it is unpacked.
func (imp Import) template(from *opened) (Template, error) {
	t := recordOf(imp.Name, imp.From.String(), from.config)
	t.Key = hashOf([]any{"import", importVersion, fmt.Sprintf("%T", imp.From) == "template.Tar", from.digest, imp.ImageMiB})
	return t, t.checkRecord()
}

// recordOf is what a configuration says about a template.
func recordOf(name, source string, c oci.Config) Template {
	t := Template{
		Name: name, Env: c.Env, Source: source,
		Config: &ImageConfig{
			Start: append(append([]string(nil), c.Entrypoint...), c.Cmd...), ExposedPorts: c.ExposedPorts, Labels: c.Labels,
			StopSignal: c.StopSignal, Shell: c.Shell, User: c.User,
		},
	}
	if h := c.Healthcheck; h != nil && len(h.Test) > 0 {
		t.Config.Healthcheck = &Healthcheck{Test: h.Test, Interval: h.Interval, Timeout: h.Timeout, StartPeriod: h.StartPeriod, Retries: h.Retries}
	}
	return t
}

// maxEnvBytes bounds the variables of an image: they travel with every create.
const maxEnvBytes = 256 << 10

// checkRecord refuses what could not be read back, or no process could be given.
func (t Template) checkRecord() error {
	size := 0
	for name, value := range t.Env {
		for _, c := range []byte(name + value) {
			if c == 0 {
				return sandbox.Errorf(sandbox.KindInvalid, "the variable %.100q of the image has a NUL byte in it", name)
			}
		}
		size += len(name) + len(value)
	}
	if size > maxEnvBytes {
		return sandbox.Errorf(sandbox.KindInvalid, "the variables of the image have %d bytes, at most %d", size, maxEnvBytes)
	}
	data, err := json.MarshalIndent(t, "", "  ")
	if err == nil && len(data) > maxRecordBytes/2 {
		err = sandbox.Errorf(sandbox.KindInvalid, "the configuration of the image has %d bytes, at most %d", len(data), maxRecordBytes/2)
	}
	return err
}

// fillFromImage unpacks a source.
func fillFromImage(ctx context.Context, w *work, from *opened, want Template, p Progress) (filled, error) {
	f := filled{record: want, began: time.Now()}
	var err error
	if f.root, err = w.closedDir(); err != nil {
		return f, err
	}
	p.step(stepUnpack, 0)
	if err := fault.Point(ctx, "template/unpack"); err != nil {
		return f, err
	}
	report, err := from.unpack(ctx, f.root, func(done, of int, line string) {
		p.line(stepUnpack, float64(done)/float64(of), line)
	})
	if err != nil {
		return f, fmt.Errorf("%s: %w", stepUnpack, err)
	}
	p.leftOut(stepUnpack, report)
	f.blocks = report.Attributed
	if err := fault.Point(ctx, "template/furnish"); err != nil {
		return f, err
	}
	err = furnish(f.root, from.config, &f.record, func(line string) { p.line(stepUnpack, 1, line) })
	return f, err
}
