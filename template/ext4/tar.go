package ext4

import (
	"archive/tar"
	"context"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
)

const (
	maxPath = 4096
	maxLink = 4095
)

// WriteTar writes the whole tree as a tar file, as it is: owners, modes, times,
// hard links, attributes, devices. Sockets are left out. Whoever reads the tar
// file bounds it; a file system that is broken ends with an error, not with a
// loop.
func (f *FS) WriteTar(ctx context.Context, w io.Writer) error {
	if f.dirty {
		return invalid("its journal has not been written back")
	}
	t := walk{ctx: ctx, f: f, w: tar.NewWriter(w), dirs: map[uint32]bool{}, files: map[uint32]string{}}
	root, err := f.inode(rootInode)
	if err != nil {
		return err
	}
	if err := t.children(root, ""); err != nil {
		return err
	}
	return t.w.Close()
}

type walk struct {
	ctx   context.Context
	f     *FS
	w     *tar.Writer
	dirs  map[uint32]bool   // that were entered: none is entered twice
	files map[uint32]string // with several names, by the first one
}

func (t *walk) children(dir inode, at string) error {
	if dir.mode()&typeMask != typeDir || t.dirs[dir.number] {
		return invalid("/%s is no directory, or one that is in itself", at)
	}
	t.dirs[dir.number] = true
	list, err := t.f.list(dir)
	if err != nil {
		return err
	}
	for _, e := range list {
		if at == "" && e.name == "lost+found" {
			continue // the next file system has its own
		}
		if e.name == "" || strings.ContainsAny(e.name, "/\x00") || len(at)+len(e.name) > maxPath {
			return invalid("/%s has an entry whose name cannot be: %.100q", at, e.name)
		}
		if err := t.entry(path.Join(at, e.name), e.inode); err != nil {
			return err
		}
	}
	return nil
}

func (t *walk) entry(at string, number uint32) error {
	if t.ctx.Err() != nil {
		return context.Cause(t.ctx)
	}
	i, err := t.f.inode(number)
	if err != nil {
		return err
	}
	h, err := t.header(i, at)
	if err != nil {
		return err
	}
	if i.mode()&typeMask != typeDir {
		if first, ok := t.files[number]; ok {
			h.Typeflag, h.Linkname, h.PAXRecords = tar.TypeLink, first, nil
			return t.w.WriteHeader(h)
		}
		if i.links() > 1 {
			t.files[number] = at
		}
	}
	switch i.mode() & typeMask {
	case typeDir:
		h.Typeflag, h.Name = tar.TypeDir, at+"/"
		if err := t.w.WriteHeader(h); err != nil {
			return err
		}
		return t.children(i, at)
	case typeReg:
		return t.file(i, h)
	case typeLink:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = t.f.target(i); err != nil {
			return err
		}
	case typeChar, typeBlk:
		h.Typeflag = map[uint16]byte{typeChar: tar.TypeChar, typeBlk: tar.TypeBlock}[i.mode()&typeMask]
	case typeFIFO:
		h.Typeflag = tar.TypeFifo
	case typeSock:
		delete(t.files, number)
		return nil
	default:
		return invalid("/%s is of no kind of file: mode %#o", at, i.mode())
	}
	return t.w.WriteHeader(h)
}

func (t *walk) header(i inode, at string) (*tar.Header, error) {
	h := &tar.Header{
		Name: at, Mode: int64(i.mode() & 0o7777), Uid: int(i.uid()), Gid: int(i.gid()),
		ModTime: time.Unix(i.mtime(), 0), Format: tar.FormatPAX,
	}
	attributes, err := t.f.attributes(i)
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(attributes)) {
		if strings.ContainsAny(name, "=\x00") || name == "" {
			continue // a tar file cannot say it
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = attributes[name]
	}
	return h, nil
}

func (t *walk) file(i inode, h *tar.Header) error {
	r, size, err := t.f.open(i)
	if err != nil {
		return err
	}
	h.Typeflag, h.Size = tar.TypeReg, size
	if err := t.w.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(t.w, r)
	return err
}

// target reads a symbolic link: short ones are in the inode itself.
func (f *FS) target(i inode) (string, error) {
	size, err := i.size()
	if err != nil {
		return "", err
	}
	if size == 0 || size > maxLink {
		return "", invalid("inode %d is a link of %d bytes", i.number, size)
	}
	if size < int64(len(i.content())) && i.flags()&flagExtents == 0 {
		return string(i.content()[:size]), nil
	}
	r, _, err := f.open(i)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(r)
	return string(b), err
}
