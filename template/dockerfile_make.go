package template

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/dockerfile"
	"github.com/dormouse-sandbox/dormouse/template/ext4"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

// maxStepImages bounds the cache of disks after RUN steps.
const maxStepImages = 32

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

// run runs a command on a disk made of the tree, and makes a tree of what the
// disk is afterwards.
func (b *recipeBuild) run(ctx context.Context, s plannedStep, dir, step string) (_ string, err error) {
	var record Template
	asked := oci.Config{User: s.Run.User, WorkingDir: s.Run.Workdir}
	if err := furnish(dir, asked, &record, func(line string) { b.p.line(step, 0, line) }); err != nil {
		return "", err
	}
	if err := findProgram(dir, s.Run); err != nil {
		return "", err
	}
	names, err := saveNames(dir)
	if err != nil {
		return "", err
	}
	place, err := os.MkdirTemp(b.w.dir, "run-") // who makes a disk over an image may leave files beside it
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(place)) }()
	if err := os.Chmod(place, 0o711); err != nil { // the VMM has a user of its own
		return "", err
	}
	image, result := filepath.Join(place, "disk.ext4"), filepath.Join(place, "result.ext4")
	size, err := b.packRun(ctx, dir, image, s.key)
	if err != nil {
		return "", err
	}
	out := &tail{line: func(line string) { b.p.line(step, Unknown, line) }}
	err = b.d.Runner.Run(ctx, RunStep{
		Image: image, ImageBytes: size, Result: result, Command: s.Run.Command, Env: s.Run.Env,
		User: record.DefaultUser, Workdir: s.Run.Workdir, Output: out,
	})
	out.flush()
	if err != nil {
		if text := out.text(); text != "" {
			err = fmt.Errorf("%w; its output ends with:\n%s", err, text)
		}
		return "", err
	}
	if err := os.RemoveAll(filepath.Dir(dir)); err != nil {
		return "", err
	}
	if err := b.settle(ctx, result); err != nil {
		return "", err
	}
	after, err := b.export(ctx, result, step)
	if err != nil {
		return "", err
	}
	if err := names.restore(after); err != nil {
		return "", err
	}
	return after, b.keepStep(ctx, s.key, result, names)
}

// findProgram says before there is a VM that a command's program is missing, if
// its path does: whoever has an image without a shell will not guess it.
func findProgram(dir string, r *dockerfile.Run) error {
	program := r.Command[0]
	if !path.IsAbs(program) { // PATH is the guest's affair
		return nil
	}
	return inTree(dir, func(t *oci.Tree) error {
		_, err := t.Stat(program)
		switch {
		case err == nil || sandbox.Is(err, sandbox.KindInvalid):
			return err
		case r.Shell:
			return sandbox.Errorf(sandbox.KindInvalid,
				`the image has no %.200s, with which this line is to be run: write it as RUN ["program", "argument"], or name another shell with SHELL`, program)
		}
		return sandbox.Errorf(sandbox.KindInvalid, "the image has no %.200s", program)
	})
}

// packRun makes the disk of a RUN.
func (b *recipeBuild) packRun(ctx context.Context, dir, image, key string) (int64, error) {
	c, err := measure(dir, time.Now().Add(time.Hour))
	if err != nil {
		return 0, err
	}
	blocks, err := attributed(dir)
	if err != nil {
		return 0, err
	}
	c.blocks += blocks
	g, err := layout(c, 0)
	if err != nil {
		return 0, err
	}
	err = makeExt4(ctx, b.w, dir, image, g, key, c.newest, nil)
	return g.blocks * blockSize, err
}

// nobody is a user without rights.
const nobody = 65534

// settle writes back the journal of a disk that was not unmounted. The tool looks
// at foreign bytes: it runs as nobody, and this one file is all that it has.
func (b *recipeBuild) settle(ctx context.Context, image string) error {
	dirty, err := isDirty(image)
	if err != nil || !dirty {
		return err
	}
	f, err := os.Open(image)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // nothing is written through it
	if err := f.Chown(nobody, nobody); err != nil {
		return err
	}
	err = tool{
		name: "e2fsck", args: []string{"-y", "-E", "journal_only"}, file: f, user: nobody, dir: "/", hold: b.w.lock, cure: e2fsCure,
	}.run(ctx)
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) { // 1: it has done something
		return fmt.Errorf("write back the journal: %w", err)
	}
	if dirty, err = isDirty(image); err == nil && dirty {
		err = errors.New("the journal of the disk cannot be written back")
	}
	return err
}

func isDirty(image string) (dirty bool, err error) {
	f, err := os.Open(image)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	disk, err := ext4.Open(f)
	if err != nil {
		return false, fmt.Errorf("the disk after the step: %w", err)
	}
	return disk.Dirty(), nil
}

// export makes a tree of the disk after a step.
func (b *recipeBuild) export(ctx context.Context, image, step string) (_ string, err error) {
	dir, err := b.w.closedDir()
	if err != nil {
		return "", err
	}
	f, err := os.Open(image)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	disk, err := ext4.Open(f)
	if err != nil {
		return "", fmt.Errorf("the disk after the step: %w", err)
	}
	r, w := io.Pipe()
	go func() { _ = w.CloseWithError(disk.WriteTar(ctx, w)) }() // never fails
	report, err := oci.UnpackTar(ctx, r, dir, b.d.Limits)
	_ = r.Close() // never fails; ends the writer
	if err != nil {
		return "", fmt.Errorf("the disk after the step: %w", err)
	}
	b.p.leftOut(step, report)
	return dir, nil
}

// names are the files that the guest writes at every start. What they were
// before a step is what they are after it: they would hold the name and the
// addresses of the build.
type names map[string]*string

var nameFiles = []string{"etc/hostname", "etc/hosts", "etc/resolv.conf"}

func saveNames(dir string) (names, error) {
	saved := names{}
	return saved, inTree(dir, func(t *oci.Tree) error {
		for _, name := range nameFiles {
			data, err := t.ReadFile(name, maxAccounts)
			switch {
			case err == nil:
				text := string(data)
				saved[name] = &text
			case errors.Is(err, fs.ErrNotExist), sandbox.Is(err, sandbox.KindInvalid): // a link, or no file
				saved[name] = nil
			default:
				return err
			}
		}
		return nil
	})
}

func (n names) restore(dir string) error {
	return inTree(dir, func(t *oci.Tree) error {
		for _, name := range nameFiles {
			var err error
			if text := n[name]; text != nil {
				err = t.WriteFile(name, []byte(*text), 0o644)
			} else {
				err = t.Remove(name)
			}
			if err != nil {
				return fmt.Errorf("restore /%s: %w", name, err)
			}
		}
		return nil
	})
}

const (
	stepImageFile = "disk.ext4"
	stepNamesFile = "names.json"
)

func (s *Store) stepPath(key string) string { return filepath.Join(s.cfg.Cache, cacheSteps, key) }

// keepStep puts the disk after a step into the cache. The disk moves.
func (b *recipeBuild) keepStep(ctx context.Context, key, image string, n names) (err error) {
	lock, err := b.s.lock(ctx, "step-"+key, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	out, err := os.MkdirTemp(b.w.dir, "step-")
	if err != nil {
		return err
	}
	if err := errors.Join(os.Rename(image, filepath.Join(out, stepImageFile)), writeJSON("template-step", filepath.Join(out, stepNamesFile), n)); err != nil {
		return err
	}
	if err := b.s.intoCache(ctx, out, b.s.stepPath(key)); err != nil {
		return err
	}
	return b.s.pruneSteps()
}

// pruneSteps removes the disks that have been in the cache for the longest time.
func (s *Store) pruneSteps() error {
	dir := filepath.Join(s.cfg.Cache, cacheSteps)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) <= maxStepImages {
		return err
	}
	var infos []fs.FileInfo
	for _, e := range entries {
		if info, err := e.Info(); err == nil { // else it is gone
			infos = append(infos, info)
		}
	}
	slices.SortFunc(infos, func(x, y fs.FileInfo) int { return y.ModTime().Compare(x.ModTime()) })
	var errs []error
	for _, info := range infos[min(maxStepImages, len(infos)):] {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, info.Name())))
	}
	return errors.Join(errs...)
}

// resume begins behind the last RUN whose disk is in the cache; next is 0 if
// there is none.
func (b *recipeBuild) resume(ctx context.Context, p *stagePlan) (dir string, next int, err error) {
	for i := range slices.Backward(p.steps) {
		if p.steps[i].Run == nil {
			continue
		}
		dir, err := b.cachedStep(ctx, p.steps[i])
		if err != nil {
			return "", 0, err
		}
		if dir == "" {
			continue
		}
		for _, s := range p.steps[:i+1] {
			b.p.line(b.name(s), 1, "done before")
		}
		return dir, i + 1, nil
	}
	return "", 0, nil
}

// cachedStep makes a tree of a disk in the cache; without one it is "".
func (b *recipeBuild) cachedStep(ctx context.Context, s plannedStep) (string, error) {
	at := b.s.stepPath(s.key)
	data, err := osfs.ReadFileLimit(filepath.Join(at, stepNamesFile), 8*maxAccounts)
	var n names
	if err != nil || json.Unmarshal(data, &n) != nil {
		return "", nil // not there, or of no use
	}
	dir, err := b.export(ctx, filepath.Join(at, stepImageFile), b.name(s))
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if err != nil {
		b.s.log.Warn("a step in the template cache is of no use", "key", s.key, "err", err)
		return "", nil
	}
	now := time.Now()
	_ = os.Chtimes(at, now, now) // it was used; if it stays old, it goes earlier
	return dir, n.restore(dir)
}

// attributed counts the entries of a tree that have attributes.
func attributed(root string) (int64, error) {
	var n int64
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if size, err := unix.Llistxattr(path, nil); err == nil && size > 0 {
			n++
		}
		return nil
	})
	return n, err
}
