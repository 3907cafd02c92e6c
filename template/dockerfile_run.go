package template

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/dockerfile"
	"github.com/dormouse-sandbox/dormouse/template/ext4"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

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
