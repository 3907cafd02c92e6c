package host

import (
	"context"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

// Kitchen makes and removes templates.
type Kitchen interface {
	Build(ctx context.Context, r template.Recipe, p template.Progress) (template.Template, error)
	Import(ctx context.Context, imp template.Import, p template.Progress) (template.Template, error)
	BuildDockerfile(ctx context.Context, d template.Dockerfile, p template.Progress) (template.Template, error)
	Delete(ctx context.Context, name string) error
}

// The sources of a BuildRequest.
const (
	SourceImage      = "image"      // in a registry
	SourcePackages   = "packages"   // of a Debian suite
	SourceArchive    = "archive"    // of an image, uploaded
	SourceRootFS     = "rootfs"     // a tar file, uploaded
	SourceDockerfile = "dockerfile" // a context, uploaded
)

// Bounds of builds.
const (
	buildsAtOnce  = 2
	buildTime     = 6 * time.Hour // of one whole build
	maxBuildArgs  = 256
	maxRegistries = 32
	maxBuildText  = 4096 // bytes of each name, path and argument
)

// BuildRequest says what template to build, from what.
type BuildRequest struct {
	Name   string
	Source string
	// Image is a reference, or which image of an archive.
	Image      string
	Dockerfile string // its path in the context
	Target     string
	Args       map[string]string
	Suite      string // of packages; empty means the default
	Packages   []string
	Registries map[string]oci.Credentials // by their names in references
	ImageMiB   int
}

func (r BuildRequest) check() error {
	if err := sandbox.SafeName("template", r.Name); err != nil {
		return err
	}
	sources := []string{SourceImage, SourcePackages, SourceArchive, SourceRootFS, SourceDockerfile}
	if !slices.Contains(sources, r.Source) {
		return sandbox.Errorf(sandbox.KindInvalid, "source is %.100q, must be one of: %s", r.Source, strings.Join(sources, ", "))
	}
	if r.Source == SourceImage && r.Image == "" {
		return sandbox.Errorf(sandbox.KindInvalid, "image is missing: a reference such as debian:12")
	}
	if r.Source == SourcePackages && len(r.Packages) == 0 {
		return sandbox.Errorf(sandbox.KindInvalid, "packages is missing: a list such as python3, git")
	}
	if len(r.Args) > maxBuildArgs || len(r.Registries) > maxRegistries {
		return sandbox.Errorf(sandbox.KindInvalid, "there are %d arguments and %d registries, at most %d and %d are allowed",
			len(r.Args), len(r.Registries), maxBuildArgs, maxRegistries)
	}
	texts := []string{r.Image, r.Dockerfile, r.Target}
	for name, value := range r.Args {
		texts = append(texts, name, value)
	}
	for name, login := range r.Registries {
		texts = append(texts, name, login.Username, login.Password)
		if len(login.Token) > 16*maxBuildText {
			return sandbox.Errorf(sandbox.KindInvalid, "a token of a registry has %d bytes, at most %d are allowed", len(login.Token), 16*maxBuildText)
		}
	}
	for _, text := range texts {
		if len(text) > maxBuildText || strings.ContainsRune(text, 0) {
			return sandbox.Errorf(sandbox.KindInvalid, "a text has %d bytes, at most %d without a NUL byte are allowed: %.60q", len(text), maxBuildText, text)
		}
	}
	return nil
}

// BuildTemplate builds one; upload is what the source reads, if it is one. The
// build ends with the context.
func (a *Agent) BuildTemplate(ctx context.Context, r BuildRequest, upload io.Reader, news template.Progress) (template.Template, error) {
	if a.cfg.Kitchen == nil {
		return template.Template{}, sandbox.Errorf(sandbox.KindUnsupported, "this host builds no templates")
	}
	if err := r.check(); err != nil {
		return template.Template{}, err
	}
	select {
	case a.builds <- struct{}{}:
		defer func() { <-a.builds }()
	default:
		return template.Template{}, sandbox.Errorf(sandbox.KindBusy, "the host builds %d templates, its limit", buildsAtOnce)
	}
	if free := a.freeMiB(); free < a.cfg.MinFreeMiB {
		return template.Template{}, sandbox.Errorf(sandbox.KindNoSpace, "the host has %d MiB of free disk, builds need %d", free, a.cfg.MinFreeMiB)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(a.ctx, func() { cancel(errClosing) })()
	ctx, stop := context.WithTimeoutCause(ctx, buildTime, sandbox.Errorf(sandbox.KindTimeout, "the build took longer than %v", buildTime))
	defer stop()
	if err := fault.Point(ctx, "host/build/template"); err != nil {
		return template.Template{}, err
	}
	return a.cook(ctx, r, upload, news)
}

// cook hands a request to the kitchen.
func (a *Agent) cook(ctx context.Context, r BuildRequest, upload io.Reader, news template.Progress) (template.Template, error) {
	imp := template.Import{Name: r.Name, ImageMiB: r.ImageMiB}
	switch r.Source {
	case SourcePackages:
		return a.cfg.Kitchen.Build(ctx, template.DebianRecipe(r.Name, r.Suite, r.Packages, r.ImageMiB), news)
	case SourceImage:
		imp.From = template.Registry{Ref: r.Image, Credentials: r.Registries[oci.RegistryOf(r.Image)]}
	case SourceArchive:
		imp.From = template.Archive{Reader: upload, Image: r.Image}
	case SourceRootFS:
		imp.From = template.Tar{Reader: upload}
	default:
		return a.cfg.Kitchen.BuildDockerfile(ctx, template.Dockerfile{
			Name: r.Name, Context: upload, File: r.Dockerfile, Target: r.Target, Args: r.Args, Credentials: r.Registries,
			ImageMiB: r.ImageMiB, Runner: Steps{a},
		}, news)
	}
	return a.cfg.Kitchen.Import(ctx, imp, news)
}

// DeleteTemplate removes a template that no sandbox lies on.
func (a *Agent) DeleteTemplate(ctx context.Context, name string) error {
	if a.cfg.Kitchen == nil {
		return sandbox.Errorf(sandbox.KindUnsupported, "this host builds no templates")
	}
	t, err := a.cfg.Templates.Get(name)
	if sandbox.Is(err, sandbox.KindNotFound) || sandbox.Is(err, sandbox.KindInvalid) {
		return err
	}
	if users := a.liesOn(name, t.Image); len(users) > 0 {
		const most = 20
		list := strings.Join(users[:min(len(users), most)], ", ")
		if len(users) > most {
			list += ", …"
		}
		return sandbox.Errorf(sandbox.KindConflict, "template %s has %d sandboxes that lie on it: %s", name, len(users), list)
	}
	return a.cfg.Kitchen.Delete(ctx, name)
}

// liesOn names the sandboxes that need an image, or that were made from a template
// of this name: those that are being created do not say yet which image they found,
// and the others have theirs in the snapshot store.
func (a *Agent) liesOn(name, image string) []string {
	var out []string
	for _, b := range a.all() {
		e := b.now()
		switch {
		case e.State == stateEnded:
		case e.Disk != nil && e.Disk.Base == image && image != "",
			!e.Build && e.Spec.Template == name && (e.State == stateCreating || !e.Base.IsZero() || e.Last != nil):
			out = append(out, string(e.ID))
		}
	}
	slices.Sort(out)
	return out
}
