package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
)

// packContext makes a tar file of a directory, while it is read: files, folders
// and links. What .dockerignore names stays here; the Dockerfile itself, and the
// lists of what to ignore, always go along.
func packContext(dir, dockerfile string) (io.ReadCloser, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	p := packer{root: root, always: map[string]bool{
		filepath.ToSlash(filepath.Clean(dockerfile)): true, ".dockerignore": true,
		filepath.ToSlash(filepath.Clean(dockerfile)) + ".dockerignore": true,
	}}
	if _, err := root.Stat(filepath.Clean(dockerfile)); err != nil {
		return nil, errors.Join(fmt.Errorf("the Dockerfile: %w", err), root.Close())
	}
	if err := p.readIgnore(dockerfile); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	r, w := io.Pipe()
	go func() {
		p.w = tar.NewWriter(w)
		err := fs.WalkDir(root.FS(), ".", p.add)
		if err == nil {
			err = p.w.Close()
		}
		_ = w.CloseWithError(errors.Join(err, root.Close())) // never fails
	}()
	return r, nil
}

type packer struct {
	root   *os.Root
	w      *tar.Writer
	ignore *patternmatcher.PatternMatcher
	always map[string]bool
}

func (p *packer) readIgnore(dockerfile string) error {
	for _, name := range []string{filepath.Clean(dockerfile) + ".dockerignore", ".dockerignore"} {
		f, err := p.root.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		patterns, err := ignorefile.ReadAll(f)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if p.ignore, err = patternmatcher.New(patterns); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
	return nil
}

func (p *packer) add(path string, d fs.DirEntry, err error) error {
	if err != nil || path == "." {
		return err
	}
	if p.ignore != nil && !p.always[path] {
		out, err := p.ignore.MatchesOrParentMatches(path)
		if err != nil {
			return err
		}
		if out && d.IsDir() && !p.ignore.Exclusions() && !p.leadsToAlways(path) {
			return fs.SkipDir
		}
		if out {
			return nil
		}
	}
	info, err := d.Info()
	if err != nil {
		return err
	}
	return p.entry(path, info)
}

// leadsToAlways says that a directory holds something that always goes along.
func (p *packer) leadsToAlways(dir string) bool {
	for name := range p.always {
		for at := filepath.Dir(name); at != "."; at = filepath.Dir(at) {
			if at == dir {
				return true
			}
		}
	}
	return false
}

func (p *packer) entry(path string, info fs.FileInfo) error {
	target := ""
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		var err error
		if target, err = p.root.Readlink(path); err != nil {
			return err
		}
	case !info.IsDir() && !info.Mode().IsRegular():
		return nil // a socket or a pipe is nothing to copy
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	h.Name, h.Uid, h.Gid, h.Uname, h.Gname = path, 0, 0, "", "" // who builds is nobody's business
	if info.IsDir() {
		h.Name += "/"
	}
	if err := p.w.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
		return err
	}
	f, err := p.root.Open(path)
	if err != nil {
		return err
	}
	_, err = io.CopyN(p.w, f, info.Size())
	return errors.Join(err, f.Close())
}
