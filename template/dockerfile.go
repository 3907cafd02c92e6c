package template

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"time"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/dockerfile"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

const stepContext = "read context"

// dockerfileVersion is part of every key of a Dockerfile's steps.
const dockerfileVersion = 1

// Dockerfile says how a template is built from a Dockerfile and the files beside
// it.
type Dockerfile struct {
	Name string // of the template
	// Context is a tar file, plain or compressed with gzip, zstd, xz or bzip2.
	Context io.Reader
	File    string            // the Dockerfile's path in it; empty means "Dockerfile"
	Args    map[string]string // of ARG; not kept
	Target  string            // the stage to build; empty means the last one
	// Credentials are for registries, by their name in references
	// ("index.docker.io" for references without one). They are used and not kept.
	Credentials map[string]oci.Credentials
	ImageMiB    int
	Limits      oci.Limits
	Runner      Runner // for RUN; nil refuses it
}

// Runner runs the commands of RUN. A command of a build is foreign code: it runs
// in a microVM of its own, and what is left on its disk is as foreign.
type Runner interface {
	Run(ctx context.Context, r RunStep) error
}

// RunStep is one command of a build.
type RunStep struct {
	// Image is the disk to begin with: a raw ext4 file, not to be changed. It is
	// little larger than what is in it; its file system can grow.
	Image      string
	ImageBytes int64
	// Result is where the disk goes as it is afterwards: a new, raw, sparse file.
	Result  string
	Command []string
	Env     map[string]string
	User    string // an account of the image
	Workdir string
	Output  io.Writer // both streams, as they come
}

// BuildDockerfile builds and publishes a template. Steps that were done before,
// from the same base, with the same files, arguments and commands, are not done
// again. On an error nothing is published; its text has the step, and the end of
// its output.
func (s *Store) BuildDockerfile(ctx context.Context, d Dockerfile, p Progress) (Template, error) {
	if err := d.check(); err != nil {
		return Template{}, err
	}
	log, p := recorded(p)
	t, err := s.buildDockerfile(ctx, d, log, p)
	if err != nil {
		return Template{}, fmt.Errorf("build template %q: %w", d.Name, sandbox.NoSpace(err))
	}
	return t, nil
}

func (d Dockerfile) check() error {
	if err := sandbox.SafeName("template", d.Name); err != nil {
		return err
	}
	if d.Context == nil {
		return sandbox.Errorf(sandbox.KindInvalid, "a Dockerfile needs a context: the files beside it")
	}
	return checkImageMiB(d.ImageMiB)
}

func (s *Store) buildDockerfile(ctx context.Context, d Dockerfile, log *buildLog, p Progress) (_ Template, err error) {
	if os.Geteuid() != 0 {
		return Template{}, errNeedsRoot
	}
	w, err := s.newWork()
	if err != nil {
		return Template{}, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	b := &recipeBuild{s: s, d: d, p: p, w: w}
	defer func() { err = errors.Join(err, b.close()) }()
	if err := b.readContext(ctx); err != nil {
		return Template{}, fmt.Errorf("%s: %w", stepContext, err)
	}
	target, err := b.file.Target(d.Target)
	if err != nil {
		return Template{}, err
	}
	plan, err := b.plan(ctx, target)
	if err != nil {
		return Template{}, err
	}
	want, err := b.template(plan)
	if err != nil {
		return Template{}, err
	}
	if t, ok := s.published(want); ok {
		return t, nil
	}
	return s.build(ctx, job{
		want: want, first: stepContext, imageMiB: d.ImageMiB, log: log,
		fill: func(ctx context.Context, _ *work) (filled, error) { return b.fill(ctx, target, want) },
	}, p)
}

// template is what is known of it before anything is done.
func (b *recipeBuild) template(plan *stagePlan) (Template, error) {
	t := recordOf(b.d.Name, "Dockerfile", plan.config)
	t.Key = hashOf([]any{"dockerfile", dockerfileVersion, plan.key, plan.config, b.d.ImageMiB})
	return t, t.checkRecord()
}

// recipeBuild is one build of a Dockerfile.
type recipeBuild struct {
	s *Store
	d Dockerfile
	p Progress
	w *work

	context *oci.Tree
	file    *dockerfile.File
	stages  []*stagePlan // by index; nil for those that are not needed
	total   int          // steps of all stages that are needed
	trees   []*oci.Tree
}

func (b *recipeBuild) close() error {
	var errs []error
	for _, t := range b.trees {
		errs = append(errs, t.Close())
	}
	for _, s := range b.stages {
		if s != nil && s.image != nil {
			errs = append(errs, s.image.Close())
		}
	}
	return errors.Join(errs...)
}

func (b *recipeBuild) open(dir string) (*oci.Tree, error) {
	t, err := oci.OpenTree(dir)
	if err == nil {
		b.trees = append(b.trees, t)
	}
	return t, err
}

// readContext unpacks the context, reads the Dockerfile in it, and then leaves
// out what .dockerignore names.
func (b *recipeBuild) readContext(ctx context.Context) error {
	b.p.step(stepContext, Unknown)
	if err := fault.Point(ctx, "template/context"); err != nil {
		return err
	}
	dir, err := b.w.closedDir()
	if err != nil {
		return err
	}
	report, err := oci.UnpackTar(ctx, b.d.Context, dir, b.d.Limits)
	if err != nil {
		return err
	}
	b.p.leftOut(stepContext, report)
	if b.context, err = b.open(dir); err != nil {
		return err
	}
	name := b.d.File
	if name == "" {
		name = "Dockerfile"
	}
	text, err := b.context.ReadFile(name, dockerfile.MaxBytes)
	if errors.Is(err, os.ErrNotExist) {
		return sandbox.Errorf(sandbox.KindInvalid, "there is no %.200q in it", name)
	}
	if err != nil {
		return fmt.Errorf("read %.200q: %w", name, err)
	}
	if b.file, err = dockerfile.Parse(text, b.d.Args); err != nil {
		return err
	}
	b.stages = make([]*stagePlan, len(b.file.Stages))
	return b.ignore(name)
}

// ignore removes what is not to be copied. A file beside the Dockerfile with its
// name comes before the one of the context.
func (b *recipeBuild) ignore(name string) error {
	for _, file := range []string{name + ".dockerignore", ".dockerignore"} {
		f, err := b.context.ReadFile(file, dockerfile.MaxBytes)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read %.200q: %w", file, err)
		}
		excluded, err := excluder(f)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		return prune(b.context, "", excluded)
	}
	return nil
}

// excluder makes a question of the text of a .dockerignore.
func excluder(text []byte) (func(string) (bool, error), error) {
	patterns, err := ignorefile.ReadAll(bytes.NewReader(text))
	if err != nil {
		return nil, sandbox.WithKind(sandbox.KindInvalid, err)
	}
	return matcher(patterns)
}

func matcher(patterns []string) (func(string) (bool, error), error) {
	m, err := patternmatcher.New(patterns)
	if err != nil {
		return nil, sandbox.WithKind(sandbox.KindInvalid, err)
	}
	return func(name string) (bool, error) {
		out, err := m.MatchesOrParentMatches(name)
		return out, sandbox.WithKind(sandbox.KindInvalid, err)
	}, nil
}

// prune removes files, and directories that are empty then, that are excluded.
func prune(t *oci.Tree, dir string, excluded func(string) (bool, error)) error {
	names, err := t.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, base := range names {
		name := path.Join(dir, base)
		out, err := excluded(name)
		if err != nil {
			return err
		}
		info, err := t.Lstat(name)
		if err != nil {
			return err
		}
		if info.IsDir() {
			if err := prune(t, name, excluded); err != nil {
				return err
			}
			rest, err := t.ReadDir(name)
			if err != nil {
				return err
			}
			out = out && len(rest) == 0
		}
		if out {
			if err := t.Remove(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// fill does the steps and furnishes what comes out.
func (b *recipeBuild) fill(ctx context.Context, target int, want Template) (filled, error) {
	root, err := b.make(ctx, target)
	if err != nil {
		return filled{}, err
	}
	if err := fault.Point(ctx, "template/furnish"); err != nil {
		return filled{}, err
	}
	f := filled{root: root, record: want}
	note := func(line string) { b.p.line(stepImage, Unknown, line) }
	if err := furnish(root, b.stages[target].config, &f.record, note); err != nil {
		return f, err
	}
	if f.blocks, err = attributed(root); err != nil {
		return f, err
	}
	// What the steps have made is as old as it is: compiled modules hold the time
	// of their source.
	f.began = time.Now().Add(time.Hour)
	return f, nil
}
