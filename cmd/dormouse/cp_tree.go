package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/tree"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// treeCopy is one copy of a directory.
type treeCopy struct {
	cmd      *cobra.Command
	c        *client.Client
	from, to place
	user     string
}

// isDirectory says whether a place is one, links followed: it was named by whoever
// typed it.
func isDirectory(ctx context.Context, c *client.Client, p place, user string) (bool, error) {
	if p.isStream() {
		return false, nil
	}
	if p.id == "" {
		info, err := os.Stat(p.path)
		return err == nil && info.IsDir(), localError(err)
	}
	info, err := c.Stat(ctx, p.id, p.path, user)
	return err == nil && info.Type == "directory", err
}

// ownName is under which name a directory is put into another one. It is empty if
// its content is meant, as with "dir/.", or if it has no name to be known by.
func ownName(p string) string {
	p = strings.TrimRight(p, "/")
	name := p[strings.LastIndexByte(p, '/')+1:]
	if name == "." || name == ".." || name == "~" {
		return ""
	}
	return name
}

// shown is what a progress bar calls a directory.
func shown(p string) string {
	if name := ownName(p); name != "" {
		return name
	}
	return p
}

func (t treeCopy) run() (err error) {
	var made api.Tree
	switch {
	case t.to.isStream():
		return sandbox.Errorf(sandbox.KindInvalid, "%s is a directory, and standard output takes one file", t.from.path)
	case t.to.id == "":
		made, err = t.download()
	case t.from.id == "":
		made, err = t.upload()
	default:
		made, err = t.across()
	}
	if err != nil {
		return err
	}
	if made.Skipped > 0 {
		_, err = fmt.Fprintf(t.cmd.ErrOrStderr(), "dormouse: %d left out: not a file, directory or link; the first is %.300q\n", made.Skipped, made.FirstSkipped)
	}
	if asJSON(t.cmd) {
		return printJSON(t.cmd, made)
	}
	return err
}

// remoteTarget is the directory in the sandbox that becomes the copy.
func (t treeCopy) remoteTarget() (string, error) {
	info, err := t.c.Stat(t.cmd.Context(), t.to.id, t.to.path, t.user)
	switch {
	case sandbox.Is(err, sandbox.KindNotFound):
		return t.to.path, nil
	case err != nil:
		return "", explain(t.cmd.Context(), t.c, t.to.id, err)
	case info.Type != "directory":
		return "", notADirectory(t.to.path)
	}
	return path.Join(info.Path, ownName(filepath.ToSlash(t.from.path))), nil
}

func notADirectory(name string) error {
	return sandbox.Errorf(sandbox.KindConflict, "%s is there and is not a directory: a directory cannot be copied onto it", name)
}

func (t treeCopy) upload() (made api.Tree, err error) {
	target, err := t.remoteTarget()
	if err != nil {
		return made, err
	}
	root, err := os.OpenRoot(t.from.path)
	if err != nil {
		return made, localError(err)
	}
	defer func() { _ = root.Close() }() // read only
	total, err := tree.Measure(t.cmd.Context(), root)
	if err != nil {
		return made, fmt.Errorf("look at %s: %w", t.from.path, err)
	}
	bar := transferring(t.cmd, shown(t.from.path), total.Bytes)
	defer func() { _ = bar.Close() }() // it is only paint
	return t.send(target, func(w io.Writer) error {
		if _, err := tree.Pack(t.cmd.Context(), w, root, bar); err != nil {
			return fmt.Errorf("read %s: %w", t.from.path, err)
		}
		return nil
	})
}

// across copies from one sandbox to another, or within one.
func (t treeCopy) across() (made api.Tree, err error) {
	target, err := t.remoteTarget()
	if err != nil {
		return made, err
	}
	if err := t.intoItself(target); err != nil {
		return made, err
	}
	body, err := t.c.ReadTree(t.cmd.Context(), t.from.id, t.from.path, t.user)
	if err != nil {
		return made, explain(t.cmd.Context(), t.c, t.from.id, err)
	}
	defer func() { _ = body.Close() }() // read only
	bar := transferring(t.cmd, shown(t.from.path), -1)
	defer func() { _ = bar.Close() }() // it is only paint
	return t.send(target, func(w io.Writer) error {
		if _, err := tree.Relay(w, body, bar); err != nil {
			return fmt.Errorf("read %s: %w", t.from.path, err)
		}
		return nil
	})
}

// intoItself refuses what would never end: a copy that lies in its source. Where
// links lead nobody asks; the bound on the depth of a tree ends that.
func (t treeCopy) intoItself(target string) error {
	if t.from.id != t.to.id {
		return nil
	}
	source, err := t.absolute(t.from.path)
	if err != nil {
		return err
	}
	if target, err = t.absolute(target); err != nil {
		return err
	}
	if target == source || strings.HasPrefix(target, strings.TrimSuffix(source, "/")+"/") {
		return sandbox.Errorf(sandbox.KindInvalid, "%s lies in what is copied, %s", target, source)
	}
	return nil
}

// absolute is a path in the sandbox that is copied to. The part of it that exists
// tells where it begins.
func (t treeCopy) absolute(name string) (string, error) {
	info, err := t.c.Stat(t.cmd.Context(), t.to.id, name, t.user)
	if above := path.Dir(name); sandbox.Is(err, sandbox.KindNotFound) && above != name {
		above, err := t.absolute(above)
		return path.Join(above, path.Base(name)), err
	}
	return path.Clean(info.Path), err
}

// send has a stream unpacked while it is made.
func (t treeCopy) send(target string, produce func(io.Writer) error) (api.Tree, error) {
	r, w := io.Pipe()
	over := errors.New("nobody reads on")
	produced := make(chan error, 1)
	go func() {
		buffered := bufio.NewWriterSize(w, 128<<10)
		err := produce(buffered)
		if err == nil {
			err = buffered.Flush()
		}
		_ = w.CloseWithError(err) // it never fails
		produced <- err
	}()
	made, err := t.c.WriteTree(t.cmd.Context(), t.to.id, target, t.user, r)
	_ = r.CloseWithError(over) // likewise
	if failed := <-produced; failed != nil && !errors.Is(failed, over) {
		return api.Tree{}, failed
	}
	if err != nil {
		return api.Tree{}, explain(t.cmd.Context(), t.c, t.to.id, err)
	}
	return made, nil
}

// localTarget is the directory here that becomes the copy, and whether it was made
// for that. A link is followed where it was typed; one that merely has the right
// name may have come from a sandbox with an earlier copy.
func (t treeCopy) localTarget() (target string, made bool, err error) {
	target = t.to.path
	info, err := os.Stat(target)
	if name := ownName(t.from.path); err == nil && info.IsDir() && name != "" {
		target = filepath.Join(target, name)
		info, err = os.Lstat(target)
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return target, true, localError(os.Mkdir(target, 0o700))
	case err != nil:
		return "", false, localError(err)
	case !info.IsDir():
		return "", false, notADirectory(target)
	}
	return target, false, nil
}

func (t treeCopy) download() (made api.Tree, err error) {
	body, err := t.c.ReadTree(t.cmd.Context(), t.from.id, t.from.path, t.user)
	if err != nil {
		return made, explain(t.cmd.Context(), t.c, t.from.id, err)
	}
	defer func() { _ = body.Close() }() // read only
	target, isNew, err := t.localTarget()
	if err != nil {
		return made, err
	}
	root, err := os.OpenRoot(target)
	if err != nil {
		return made, localError(err)
	}
	defer func() { _ = root.Close() }() // what was written in it was closed with its own errors
	bar := transferring(t.cmd, shown(t.from.path), -1)
	defer func() { _ = bar.Close() }() // it is only paint
	report, err := tree.Unpack(body, root, tree.Options{Mask: writtenByOthers, New: isNew, Progress: bar})
	if err != nil {
		return made, fmt.Errorf("copy to %s: %w", target, err)
	}
	return api.Tree{
		Path: target, Files: report.Files, Directories: report.Directories, Bytes: report.Bytes,
		Skipped: report.Skipped, FirstSkipped: report.FirstSkipped,
	}, nil
}
