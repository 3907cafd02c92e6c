package oci

import (
	"errors"
	"io/fs"
	"path"
	"strings"
)

// Of the OCI image specification, "Representing Changes".
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..opq" // behind the prefix: ".wh..wh..opq"
)

// whiteout removes what earlier layers have put at a place; base is the name of
// the entry behind the prefix.
func (u *unpacker) whiteout(dir, base string) error {
	if base == opaqueName {
		return u.opaque(dir)
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return nil // bookkeeping of AUFS, which is not part of the image
	}
	if base == "" || base == "." || base == ".." {
		return invalid("it is a whiteout of no name")
	}
	above, err := u.tree.Resolve(dir, true)
	if err != nil {
		return err
	}
	return u.removeLower(path.Join(above, base))
}

// opaque removes what earlier layers have put into a directory.
func (u *unpacker) opaque(dir string) error {
	at, err := u.tree.Resolve(dir, true)
	if err != nil {
		return err
	}
	return u.emptyLower(at)
}

// removeLower removes a path, but for what this layer has put there.
func (u *unpacker) removeLower(at string) error {
	info, err := u.tree.root.Lstat(at)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if u.own[at] {
		if info.IsDir() {
			return u.emptyLower(at)
		}
		return nil
	}
	u.tree.stale = true
	return u.tree.root.RemoveAll(at)
}

func (u *unpacker) emptyLower(at string) error {
	info, err := u.tree.root.Lstat(at)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
		return nil
	}
	if err != nil {
		return err
	}
	f, err := u.tree.root.Open(at)
	if err != nil {
		return err
	}
	names, err := f.Readdirnames(-1)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	for _, name := range names {
		if err := u.removeLower(path.Join(at, name)); err != nil {
			return err
		}
	}
	return nil
}
