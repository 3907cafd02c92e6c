package template

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/dockerfile"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

// stagePlan is a stage that is needed, with what its steps depend on.
type stagePlan struct {
	index int
	base  *stagePlan // or image, or neither: scratch
	image *oci.Image
	steps []plannedStep
	// key names what the stage's tree is in the end, config what holds then.
	key    string
	config oci.Config
	users  int    // stages that lie on it or copy from it, and the build itself
	dir    string // its tree, once it is made
}

type plannedStep struct {
	dockerfile.Step
	number  int    // among all steps of the build, from 1
	key     string // of the tree after it
	sources []string
}

// plan works out a stage and all that it needs, and counts its users.
func (b *recipeBuild) plan(ctx context.Context, index int) (*stagePlan, error) {
	if p := b.stages[index]; p != nil {
		p.users++
		return p, nil
	}
	stage := b.file.Stages[index]
	p := &stagePlan{index: index, users: 1}
	b.stages[index] = p
	switch {
	case stage.Base >= 0:
		base, err := b.plan(ctx, stage.Base)
		if err != nil {
			return nil, err
		}
		p.base, p.key, p.config = base, base.key, base.config
	case stage.Image == dockerfile.Scratch:
		p.key = hashOf([]any{"scratch", dockerfileVersion})
	default:
		if err := b.pull(ctx, p, stage); err != nil {
			return nil, err
		}
	}
	steps, err := b.file.Plan(index, p.config)
	if err != nil {
		return nil, err
	}
	for _, step := range steps {
		if err := b.planStep(ctx, p, step); err != nil {
			return nil, fmt.Errorf("line %d, %s: %w", step.Line, step.Text, err)
		}
	}
	return p, nil
}

// pull finds the image of a stage. Its layers come when they are needed.
func (b *recipeBuild) pull(ctx context.Context, p *stagePlan, stage dockerfile.Stage) (err error) {
	b.p.line(stepFetch, Unknown, "FROM "+stage.Image)
	p.image, err = oci.Pull(ctx, stage.Image, b.d.Credentials[oci.RegistryOf(stage.Image)])
	if err != nil {
		return fmt.Errorf("line %d: %w", stage.Line, err)
	}
	b.p.line(stepFetch, 1, stage.Image+" is "+p.image.Digest)
	p.config, p.key = p.image.Config, hashOf([]any{"image", dockerfileVersion, p.image.Digest})
	return nil
}

func (b *recipeBuild) planStep(ctx context.Context, p *stagePlan, step dockerfile.Step) error {
	s := plannedStep{Step: step, key: p.key}
	switch {
	case step.Run != nil:
		if b.d.Runner == nil {
			return sandbox.Errorf(sandbox.KindUnsupported, "nothing here can run commands")
		}
		s.key = hashOf([]any{p.key, "run", step.Run})
	case step.MakeDir != "":
		s.key = hashOf([]any{p.key, "mkdir", step.MakeDir})
	case step.Copy != nil:
		what, err := b.planCopy(ctx, &s)
		if err != nil {
			return err
		}
		s.key = hashOf([]any{p.key, "copy", step.Copy, what})
	}
	b.total++
	s.number = b.total
	p.steps = append(p.steps, s)
	p.key, p.config = s.key, step.Config
	return nil
}

// planCopy names what a copy copies: the files of the context, or the stage with
// which it is taken.
func (b *recipeBuild) planCopy(ctx context.Context, s *plannedStep) (string, error) {
	c := s.Copy
	if _, err := mode(c.Chmod); err != nil {
		return "", err
	}
	if c.Stage >= 0 {
		from, err := b.plan(ctx, c.Stage)
		if err != nil {
			return "", err
		}
		return from.key, nil
	}
	var err error
	if s.sources, err = matches(b.context, c.Sources); err != nil {
		return "", err
	}
	selection, err := b.selection(b.context, c, s.sources)
	if err != nil {
		return "", err
	}
	return selection.Digest(ctx, b.d.Limits)
}

// matches finds the sources of a copy; each pattern must find something.
func matches(t *oci.Tree, patterns []string) ([]string, error) {
	var out []string
	for _, pattern := range patterns {
		found, err := t.Match(pattern)
		if err != nil {
			return nil, err
		}
		if len(found) == 0 {
			return nil, sandbox.Errorf(sandbox.KindInvalid, "%.200q is not there, or is left out by .dockerignore", pattern)
		}
		out = append(out, found...)
	}
	return out, nil
}

func (b *recipeBuild) selection(from *oci.Tree, c *dockerfile.Copy, sources []string) (oci.Selection, error) {
	s := oci.Selection{From: from, Sources: sources, Unpack: c.Unpack}
	if len(c.Exclude) > 0 {
		var err error
		if s.Exclude, err = matcher(c.Exclude); err != nil {
			return s, err
		}
	}
	var err error
	s.Mode, err = mode(c.Chmod)
	return s, err
}

// owner finds the numbers of --chown in a tree.
func owner(t *oci.Tree, chown string) (uid, gid int, err error) {
	if chown == "" {
		return 0, 0, nil
	}
	who, group, hasGroup := strings.Cut(chown, ":")
	f := furnisher{tree: t, note: func(string) {}}
	id, known := parseID(who)
	gidOf := id // as Docker does: a number's group is the same number
	if !known {
		accounts, err := f.accounts()
		if err != nil {
			return 0, 0, err
		}
		for _, a := range accounts {
			if a.name == who {
				id, gidOf, known = a.uid, a.gid, true
				break
			}
		}
	}
	if !known {
		return 0, 0, sandbox.Errorf(sandbox.KindInvalid, "--chown=%.100s: the user is not in /etc/passwd", chown)
	}
	if hasGroup && group != "" {
		if gidOf, err = f.group(group); err != nil {
			return 0, 0, fmt.Errorf("--chown=%.100s: %w", chown, err)
		}
	}
	return int(id), int(gidOf), nil
}

// parseMode reads an octal mode.
func parseMode(text string) (uint64, error) {
	m, err := strconv.ParseUint(text, 8, 32)
	if err != nil || m > 0o7777 {
		return 0, sandbox.Errorf(sandbox.KindInvalid, "--chmod=%.100s: the mode must be octal, such as 755", text)
	}
	return m, nil
}
