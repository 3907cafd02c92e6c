package oci

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
)

// maxLinks is how many links one path may lead through, as in Linux.
const maxLinks = 40

// Tree is a root file system in a folder. Every path is taken as if the folder
// were "/": links in it, absolute ones too, never lead out of it. That holds by
// the rule with which Tree follows links, and, should that be wrong, by the
// os.Root that everything goes through.
//
// It is for one goroutine, and for a folder that nobody else changes meanwhile.
type Tree struct {
	root *os.Root

	// The folder of the last entry: the next one is mostly in it too.
	last     *os.Root
	lastName string // as it was asked for
	lastPath string // without links
	stale    bool   // something was removed, which may have been on the way
}

// OpenTree opens an existing folder.
func OpenTree(dir string) (*Tree, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Tree{root: root}, nil
}

// Close may be called twice.
func (t *Tree) Close() error {
	err := t.forget()
	return errors.Join(err, t.root.Close())
}

func (t *Tree) forget() error {
	if t.last == nil {
		return nil
	}
	err := t.last.Close()
	t.last = nil
	return err
}

// Resolve replaces the links in a path by what they lead to; the last component
// only if follow is set. What does not exist is taken by its name. The result is
// relative to the folder, "." for the folder itself.
func (t *Tree) Resolve(name string, follow bool) (string, error) {
	rest := strings.Split(name, "/")
	done, links := ".", 0
	for len(rest) > 0 {
		part := rest[0]
		rest = rest[1:]
		if part == "" || part == "." {
			continue
		}
		if part == ".." {
			done = path.Dir(done) // "." stays: the parent of the root is the root
			continue
		}
		here := path.Join(done, part)
		if !follow && allEmpty(rest) {
			return here, nil
		}
		target, err := t.link(here)
		if err != nil {
			return "", err
		}
		if target == "" {
			done = here
			continue
		}
		if links++; links > maxLinks {
			return "", invalid("/%s leads through more than %d links", strings.TrimPrefix(name, "/"), maxLinks)
		}
		if strings.HasPrefix(target, "/") {
			done = "."
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return done, nil
}

func allEmpty(parts []string) bool {
	for _, p := range parts {
		if p != "" && p != "." {
			return false
		}
	}
	return true
}

// link reads a link; what is none, or not there, has no target.
func (t *Tree) link(name string) (string, error) {
	info, err := t.root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return "", nil
	case err != nil:
		return "", err
	case info.Mode()&fs.ModeSymlink == 0:
		return "", nil
	}
	return t.root.Readlink(name)
}

// folder opens the folder of an entry, and makes it if it is missing; made is
// called for each one that is made.
func (t *Tree) folder(name string, made func(string) error) (*os.Root, string, error) {
	if t.last != nil && !t.stale && t.lastName == name {
		return t.last, t.lastPath, nil
	}
	if err := t.forget(); err != nil {
		return nil, "", err
	}
	resolved, err := t.Resolve(name, true)
	if err != nil {
		return nil, "", err
	}
	dir, err := t.root.OpenRoot(resolved)
	if errors.Is(err, fs.ErrNotExist) {
		if err := t.makeFolders(resolved, made); err != nil {
			return nil, "", err
		}
		dir, err = t.root.OpenRoot(resolved)
	}
	if err != nil {
		if why := t.blocked(resolved); why != nil {
			err = why
		}
		return nil, "", err
	}
	t.last, t.lastName, t.lastPath, t.stale = dir, name, resolved, false
	return dir, resolved, nil
}

// blocked says which part of a path without links is there and no directory.
func (t *Tree) blocked(name string) error {
	for i := range len(name) + 1 {
		if i < len(name) && name[i] != '/' {
			continue
		}
		info, err := t.root.Lstat(name[:i])
		if err != nil {
			return nil // what is not there does not block
		}
		if !info.IsDir() {
			return invalid("/%s is not a directory, but something is to lie in it", name[:i])
		}
	}
	return nil
}

// makeFolders makes a path without links, owned by root.
func (t *Tree) makeFolders(name string, made func(string) error) error {
	for i := range len(name) + 1 {
		if i < len(name) && name[i] != '/' {
			continue
		}
		part := name[:i]
		switch err := t.root.Mkdir(part, 0o755); {
		case errors.Is(err, fs.ErrExist):
			if err := t.blocked(part); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		}
		if err := t.root.Chmod(part, 0o755); err != nil { // the umask does not count
			return err
		}
		if err := made(part); err != nil {
			return err
		}
	}
	return nil
}

// clear makes room for an entry; a directory may stay.
func (t *Tree) clear(dir *os.Root, base string, keepDirectory bool) error {
	info, err := dir.Lstat(base)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || keepDirectory && info.IsDir() {
		return err
	}
	t.stale = true
	return dir.RemoveAll(base)
}

// Lstat looks at what a path names, links on the way followed.
func (t *Tree) Lstat(name string) (fs.FileInfo, error) {
	resolved, err := t.Resolve(name, false)
	if err != nil {
		return nil, err
	}
	return t.root.Lstat(resolved)
}

// Stat looks at what a path leads to.
func (t *Tree) Stat(name string) (fs.FileInfo, error) {
	resolved, err := t.Resolve(name, true)
	if err != nil {
		return nil, err
	}
	return t.root.Lstat(resolved)
}

// ReadFile reads a regular file of at most limit bytes, links followed.
func (t *Tree) ReadFile(name string, limit int64) ([]byte, error) {
	resolved, err := t.Resolve(name, true)
	if err != nil {
		return nil, err
	}
	info, err := t.root.Lstat(resolved)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, invalid("/%s is not a regular file of at most %d bytes", resolved, limit)
	}
	return t.root.ReadFile(resolved)
}

// WriteFile replaces what a path names, a link too, by a file of root's.
// Directories on the way are made.
func (t *Tree) WriteFile(name string, data []byte, perm fs.FileMode) error {
	name = strings.Trim(path.Clean("/"+name), "/")
	dir, _, err := t.folder(parent(name), func(string) error { return nil })
	if err != nil {
		return err
	}
	base := path.Base(name)
	if info, err := dir.Lstat(base); err == nil && info.IsDir() {
		return invalid("/%s is a directory", name)
	}
	if err := t.clear(dir, base, false); err != nil {
		return err
	}
	f, err := dir.OpenFile(base, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Chmod(perm), f.Close()) // the umask does not count
}

// MkdirAll makes a directory of root's and its parents, links followed. One that
// is there stays as it is.
func (t *Tree) MkdirAll(name string, perm fs.FileMode) error {
	resolved, err := t.Resolve(strings.Trim(path.Clean("/"+name), "/"), true)
	if err != nil {
		return err
	}
	switch info, err := t.root.Lstat(resolved); {
	case err == nil && info.IsDir():
		return nil
	case err == nil:
		return invalid("/%s is not a directory", resolved)
	case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR):
		return err
	}
	if err := t.makeFolders(resolved, func(string) error { return nil }); err != nil {
		return err
	}
	return t.root.Chmod(resolved, perm)
}

// Chown gives what a path leads to an owner.
func (t *Tree) Chown(name string, uid, gid int) error {
	resolved, err := t.Resolve(name, true)
	if err != nil {
		return err
	}
	return t.root.Lchown(resolved, uid, gid)
}

// Chmod sets the mode of what a path leads to.
func (t *Tree) Chmod(name string, perm fs.FileMode) error {
	resolved, err := t.Resolve(name, true)
	if err != nil {
		return err
	}
	return t.root.Chmod(resolved, perm)
}

func parent(name string) string {
	if dir := path.Dir(name); dir != "." {
		return dir
	}
	return ""
}

// clean makes a path of an entry's name: relative, without a dot or a double
// slash. A name that leads up is refused, wherever it would lead.
func clean(name string) (string, error) {
	if strings.ContainsRune(name, 0) {
		return "", invalid("the name %q has a NUL byte in it", name)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", invalid("the name %q leads upwards", name)
		}
		if len(part) > maxComponent {
			return "", invalid("the name %.60q… has a part of %d bytes, at most %d", name, len(part), maxComponent)
		}
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

// in wraps an error with the entry that it is about, in place of the path that
// the host has for it.
func in(name string, err error) error {
	if err == nil {
		return nil
	}
	var path *fs.PathError
	var link *os.LinkError
	switch {
	case errors.As(err, &path):
		err = fmt.Errorf("%s: %w", path.Op, path.Err)
	case errors.As(err, &link):
		err = fmt.Errorf("%s: %w", link.Op, link.Err)
	}
	return fmt.Errorf("entry %.200q: %w", name, err)
}
