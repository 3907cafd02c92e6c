package template

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/template/dockerfile"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

// mode makes a file's mode of --chmod; nil for none.
func mode(text string) (*fs.FileMode, error) {
	if text == "" {
		return nil, nil
	}
	m, err := parseMode(text)
	if err != nil {
		return nil, err
	}
	out := fs.FileMode(m & 0o777)
	for bit, flag := range map[uint64]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if m&bit != 0 {
			out |= flag
		}
	}
	return &out, nil
}

// make makes the tree of a stage, once.
func (b *recipeBuild) make(ctx context.Context, index int) (string, error) {
	p := b.stages[index]
	if p.dir != "" {
		return p.dir, nil
	}
	dir, next, err := b.resume(ctx, p)
	if err != nil {
		return "", err
	}
	if next == 0 {
		if dir, err = b.begin(ctx, p); err != nil {
			return "", err
		}
	}
	for _, s := range p.steps[next:] {
		if dir, err = b.step(ctx, p, s, dir); err != nil {
			return "", err
		}
	}
	p.dir = dir
	return dir, nil
}

// begin makes the tree that a stage begins with.
func (b *recipeBuild) begin(ctx context.Context, p *stagePlan) (string, error) {
	if p.base != nil {
		return b.beginOn(ctx, p.base)
	}
	dir, err := b.w.closedDir()
	if err != nil || p.image == nil {
		return dir, err
	}
	b.p.step(stepUnpack, 0)
	report, err := p.image.Unpack(ctx, dir, b.d.Limits, func(done, of int, line string) {
		b.p.line(stepUnpack, float64(done)/float64(of), line)
	})
	if err != nil {
		return "", fmt.Errorf("%s: %w", stepUnpack, err)
	}
	b.p.leftOut(stepUnpack, report)
	return dir, nil
}

// beginOn takes another stage's tree, or a copy of it if that is needed as it is.
func (b *recipeBuild) beginOn(ctx context.Context, base *stagePlan) (string, error) {
	from, err := b.make(ctx, base.index)
	if err != nil || base.users == 1 {
		return from, err
	}
	dir, err := b.w.closedDir()
	if err != nil {
		return "", err
	}
	source, err := b.open(from)
	if err != nil {
		return "", err
	}
	target, err := b.open(dir)
	if err != nil {
		return "", err
	}
	_, err = target.Copy(ctx, oci.Selection{From: source, Sources: []string{""}, Keep: true}, "/", b.d.Limits)
	return dir, err
}

// step does one step, and says where the tree is then.
func (b *recipeBuild) step(ctx context.Context, p *stagePlan, s plannedStep, dir string) (string, error) {
	name := b.name(s)
	b.p.step(name, 0)
	if s.Note != "" {
		b.p.line(name, 0, s.Note)
	}
	err := fault.Point(ctx, "template/step")
	switch {
	case err != nil:
	case s.Run != nil:
		dir, err = b.run(ctx, s, dir, name)
	case s.MakeDir != "":
		err = inTree(dir, func(t *oci.Tree) error { return t.MkdirAll(s.MakeDir, 0o755) })
	case s.Copy != nil:
		err = inTree(dir, func(t *oci.Tree) error { return b.copy(ctx, s, t, name) })
	}
	if err != nil {
		return "", &StepError{Step: name, Line: s.Line, Err: err}
	}
	return dir, nil
}

func (b *recipeBuild) name(s plannedStep) string {
	return fmt.Sprintf("step %d of %d: %s", s.number, b.total, s.Text)
}

// StepError says which step of a Dockerfile has failed.
type StepError struct {
	Step string
	Line int
	Err  error
}

func (e *StepError) Error() string { return fmt.Sprintf("%s (line %d): %v", e.Step, e.Line, e.Err) }
func (e *StepError) Unwrap() error { return e.Err }

func inTree(dir string, do func(*oci.Tree) error) error {
	t, err := oci.OpenTree(dir)
	if err != nil {
		return err
	}
	return errors.Join(do(t), t.Close())
}

func (b *recipeBuild) copy(ctx context.Context, s plannedStep, to *oci.Tree, step string) error {
	c, from, sources := s.Copy, b.context, s.sources
	if c.Stage >= 0 {
		dir, err := b.make(ctx, c.Stage)
		if err != nil {
			return err
		}
		b.p.step(step, 0)
		if from, err = b.open(dir); err != nil {
			return err
		}
		if sources, err = matches(from, c.Sources); err != nil {
			return err
		}
	}
	selection, err := b.selection(from, c, sources)
	if err != nil {
		return err
	}
	if selection.UID, selection.GID, err = owner(to, c.Chown); err != nil {
		return err
	}
	if len(sources) > 0 {
		report, err := to.Copy(ctx, selection, c.Dest, b.d.Limits)
		if err != nil {
			return err
		}
		b.p.leftOut(step, report)
	}
	return b.write(c, selection, to)
}

// write writes the files whose content stands in the Dockerfile.
func (b *recipeBuild) write(c *dockerfile.Copy, s oci.Selection, to *oci.Tree) error {
	for _, content := range c.Contents {
		name := c.Dest
		if info, err := to.Stat(name); strings.HasSuffix(name, "/") || err == nil && info.IsDir() {
			name = filepath.Join(name, filepath.Base(content.Name))
		}
		perm := fs.FileMode(0o644)
		if s.Mode != nil {
			perm = *s.Mode
		}
		if err := to.WriteFile(name, []byte(content.Data), 0o600); err != nil {
			return err
		}
		if err := errors.Join(to.Chown(name, s.UID, s.GID), to.Chmod(name, perm)); err != nil {
			return err
		}
	}
	return nil
}
