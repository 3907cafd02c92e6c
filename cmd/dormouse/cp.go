package main

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// place is one end of a copy: a path here, or in a sandbox if id is set. The
// path "-" here is standard input or output.
type place struct{ id, path string }

func (p place) isStream() bool { return p.id == "" && p.path == "-" }

// A file of ours whose name looks like ID:path is written ./ID:path.
var remotePlace = regexp.MustCompile(`^([a-z0-9]{4,24}):(.*)$`)

func newCpCommand() *cobra.Command {
	var user string
	var recursive bool
	cmd := &cobra.Command{
		Use:   "cp [-r] SOURCE DESTINATION",
		Short: "Copy files and directories into, out of or between sandboxes",
		Long: `Copy a file or, with -r, a directory. A path in a sandbox is ID:PATH, where PATH
counts from the home of the user unless it begins with a slash; "-" is standard
input or output. A destination that is a directory or ends in a slash keeps the
name of a file.

A directory is put into a destination that is one, under its own name; a
destination that does not exist becomes the copy. DIR/. means what is in it. Files
that are there are replaced, directories gone into. Permissions, times, symbolic
links (as they are) and hard links within the directory are kept; owners are not:
in a sandbox everything is done by the user, and belongs to the user. Sockets,
devices and pipes are left out, and counted at the end. After an error what was
copied before stays.`,
		Example: `  dormouse cp main.py 7kq2:work/
  dormouse cp 7kq2:/etc/os-release -
  dormouse cp -r src 7kq2:work          # becomes work, or work/src if work is there
  dormouse cp -r 7kq2:work/. results    # what is in work
  dormouse cp -r 7kq2:work x9bc:        # from one sandbox to another's home`,
		Args:              args(cobra.ExactArgs(2)),
		ValidArgsFunction: completeIDs(2, true),
		RunE: verb(func(cmd *cobra.Command, c *client.Client, given []string) error {
			from, err := parsePlace(cmd.Context(), c, given[0])
			if err != nil {
				return err
			}
			to, err := parsePlace(cmd.Context(), c, given[1])
			if err != nil {
				return err
			}
			if from.id == "" && to.id == "" {
				return usage(cmd, "neither %q nor %q is in a sandbox (ID:PATH)", given[0], given[1])
			}
			if recursive {
				isDir, err := isDirectory(cmd.Context(), c, from, user)
				if err != nil {
					return err
				}
				if isDir {
					return treeCopy{cmd, c, from, to, user}.run()
				}
			}
			return copyFile(cmd, c, from, to, user)
		}),
	}
	cmd.Flags().StringVarP(&user, "user", "u", "", "user inside the sandbox (default: the template's)")
	cmd.Flags().BoolVarP(&recursive, "recursive", "r", false, "copy a directory with all that is in it")
	return cmd
}

func parsePlace(ctx context.Context, c *client.Client, text string) (place, error) {
	m := remotePlace.FindStringSubmatch(text)
	if m == nil {
		return place{path: text}, nil
	}
	id, err := findID(ctx, c, m[1])
	if err != nil {
		return place{}, err
	}
	if m[2] == "" {
		return place{}, sandbox.Errorf(sandbox.KindInvalid, "%q names no path in the sandbox", text)
	}
	return place{id, m[2]}, nil
}

// copyFile opens the source, then writes the destination from it.
func copyFile(cmd *cobra.Command, c *client.Client, from, to place, user string) error {
	src, err := openSource(cmd, c, from, user)
	if err != nil {
		return err
	}
	defer func() { _ = src.body.Close() }() // read only
	bar := transferring(cmd, path.Base(filepath.ToSlash(from.path)), src.size)
	defer func() { _ = bar.Close() }() // it is only paint
	r := io.TeeReader(src.body, bar)
	if to.id != "" {
		return upload(cmd, c, to, user, src, r)
	}
	return download(cmd, to, src, r)
}

// source is an open file of either side.
type source struct {
	body io.ReadCloser
	size int64 // -1 when not known
	name string
	mode fs.FileMode
}

func openSource(cmd *cobra.Command, c *client.Client, from place, user string) (source, error) {
	if from.isStream() {
		return source{body: io.NopCloser(cmd.InOrStdin()), size: -1, mode: 0o644}, nil
	}
	if from.id == "" {
		return openLocal(from.path)
	}
	info, err := c.Stat(cmd.Context(), from.id, from.path, user)
	if err != nil {
		return source{}, err
	}
	if info.Type == "directory" {
		return source{}, directory(from.path)
	}
	body, n, err := c.ReadFile(cmd.Context(), from.id, from.path, user)
	if err != nil {
		return source{}, err
	}
	// The name is the one that was typed: the guest's would be a file of its
	// choice, such as a .bashrc, in a directory of ours.
	return source{body, n, path.Base(from.path), fs.FileMode(info.Mode) & fs.ModePerm}, nil
}

func openLocal(name string) (source, error) {
	f, err := os.Open(name)
	if err != nil {
		return source{}, localError(err)
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = directory(name)
	}
	if err != nil {
		_ = f.Close() // read only
		return source{}, localError(err)
	}
	n := info.Size()
	if !info.Mode().IsRegular() {
		n = -1
	}
	return source{f, n, filepath.Base(name), info.Mode().Perm()}, nil
}

func directory(name string) error {
	return sandbox.Errorf(sandbox.KindInvalid, "%s is a directory: copy it with -r", name)
}

// localError gives an error of our own file system its kind.
func localError(err error) error {
	switch {
	case os.IsNotExist(err):
		return sandbox.WithKind(sandbox.KindNotFound, err)
	case os.IsPermission(err):
		return sandbox.WithKind(sandbox.KindInvalid, err)
	}
	return err
}

func upload(cmd *cobra.Command, c *client.Client, to place, user string, src source, r io.Reader) error {
	target := to.path
	info, err := c.Stat(cmd.Context(), to.id, target, user)
	isDir := err == nil && info.Type == "directory"
	if isDir || strings.HasSuffix(target, "/") {
		if src.name == "" {
			return sandbox.Errorf(sandbox.KindInvalid, "%s is a directory; standard input has no name to get there", target)
		}
		target = strings.TrimRight(target, "/") + "/" + src.name
	}
	written, err := c.WriteFile(cmd.Context(), to.id, target, user, r)
	if err != nil {
		return explain(cmd.Context(), c, to.id, err)
	}
	if src.mode&0o111 != 0 {
		if err := makeExecutable(cmd.Context(), c, to.id, written.Path, user); err != nil {
			return err
		}
	}
	if asJSON(cmd) {
		return printJSON(cmd, written)
	}
	return nil
}

// makeExecutable keeps a script a script.
func makeExecutable(ctx context.Context, c *client.Client, id, target, user string) error {
	result, err := c.Exec(ctx, id, api.Exec{Command: []string{"chmod", "+x", "--", target}, User: user})
	if err == nil && result.ExitCode != 0 {
		err = fmt.Errorf("%s: %s", result.Status, strings.TrimSpace(result.Stderr))
	}
	if err != nil {
		return fmt.Errorf("%s was copied, but is not executable: %w", target, err)
	}
	return nil
}

// writtenByOthers are permissions that nothing of ours gets from a sandbox.
const writtenByOthers = 0o022

// download replaces a file of ours as a whole: a copy that breaks off leaves
// the old one. What is not a regular file (a pipe, /dev/null) is written to.
func download(cmd *cobra.Command, to place, src source, r io.Reader) error {
	if to.isStream() {
		_, err := io.Copy(cmd.OutOrStdout(), r)
		return err
	}
	target := to.path
	info, err := os.Stat(target)
	if err == nil && info.IsDir() || strings.HasSuffix(target, "/") {
		// A link that merely has the right name may have come from a sandbox, with
		// a directory: it is replaced, not followed.
		target = filepath.Join(target, src.name)
		if info, err = os.Lstat(target); err == nil && info.Mode()&fs.ModeSymlink != 0 {
			err = fs.ErrNotExist
		}
	} else if resolved, err := filepath.EvalSymlinks(target); err == nil {
		target = resolved // the link stays, what it points to is replaced
	}
	var written int64
	fill := func(f *os.File) (err error) {
		written, err = io.Copy(f, r)
		return err
	}
	if err == nil && !info.Mode().IsRegular() {
		err = writeInto(target, fill)
	} else {
		err = osfs.Replace("cp", target, src.mode&^writtenByOthers|0o600, fill)
	}
	if err != nil {
		return localError(err)
	}
	if asJSON(cmd) {
		return printJSON(cmd, api.Written{Path: target, Size: written})
	}
	return nil
}

func writeInto(target string, fill func(*os.File) error) error {
	f, err := os.OpenFile(target, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if err := fill(f); err != nil {
		_ = f.Close() // the first error says more
		return err
	}
	return f.Close()
}
