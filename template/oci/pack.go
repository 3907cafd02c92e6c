package oci

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Selection is files of a tree that are to be copied. Its tree is not changed
// while it is in use.
type Selection struct {
	From *Tree
	// Sources are paths, links to be followed: of a directory its content is
	// copied, of a file the file.
	Sources []string
	// Exclude says which files are left out, by their path below the source. A
	// directory that is left out is still looked into.
	Exclude func(name string) (bool, error)
	// Keep leaves owners as they are; else everything is UID's and GID's.
	Keep     bool
	UID, GID int
	// Mode is for every file and directory; nil leaves it.
	Mode *fs.FileMode
	// Unpack unpacks sources that are tar files.
	Unpack bool
}

// Match finds the paths that a pattern means, sorted; each part of a pattern is
// one of path.Match.
func (t *Tree) Match(pattern string) ([]string, error) {
	cleaned := strings.Trim(path.Clean("/"+pattern), "/")
	if _, err := path.Match(cleaned, ""); err != nil {
		return nil, invalid("%.100q is not a pattern", pattern)
	}
	found := []string{""}
	if cleaned == "" {
		return found, nil
	}
	for part := range strings.SplitSeq(cleaned, "/") {
		var next []string
		for _, dir := range found {
			names, err := t.matching(dir, part)
			if err != nil {
				return nil, err
			}
			next = append(next, names...)
		}
		found = next
	}
	slices.Sort(found)
	return found, nil
}

// matching lists what one part of a pattern means in one directory.
func (t *Tree) matching(dir, part string) ([]string, error) {
	if !strings.ContainsAny(part, `*?[\`) {
		name := path.Join(dir, part)
		if _, err := t.Stat(name); err != nil {
			return nil, ignoreMissing(err)
		}
		return []string{name}, nil
	}
	names, err := t.ReadDir(dir)
	if err != nil {
		return nil, ignoreMissing(err)
	}
	var out []string
	for _, name := range names {
		if ok, err := path.Match(part, name); err == nil && ok {
			out = append(out, path.Join(dir, name))
		}
	}
	return out, nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	return err
}

// ReadDir lists the names in a directory, sorted, links followed.
func (t *Tree) ReadDir(name string) ([]string, error) {
	resolved, err := t.Resolve(name, true)
	if err != nil {
		return nil, err
	}
	info, err := t.root.Lstat(resolved)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, &fs.PathError{Op: "list", Path: name, Err: syscall.ENOTDIR}
	}
	f, err := t.root.Open(resolved)
	if err != nil {
		return nil, err
	}
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	return names, errors.Join(err, f.Close())
}

// item is one file of a selection, and where it goes.
type item struct {
	from   string // without links on the way
	to     string
	info   fs.FileInfo
	unpack bool // its content, to the directory to
}

// lister makes the items of a selection.
type lister struct {
	s     Selection
	limit int64
	items []item
}

// list makes them all. Place says where what a source is goes: a file there, a
// directory's content below it.
func (s Selection) list(limits Limits, place func(source string, info fs.FileInfo, archive bool) (string, error)) ([]item, error) {
	l := lister{s: s, limit: limits.withDefaults().Entries}
	for _, source := range s.Sources {
		from, err := s.From.Resolve(source, true)
		if err != nil {
			return nil, err
		}
		info, err := s.From.root.Lstat(from)
		if err != nil {
			return nil, in(source, err)
		}
		archive := s.Unpack && info.Mode().IsRegular()
		if archive {
			if archive, err = s.From.isArchive(from); err != nil {
				return nil, in(source, err)
			}
		}
		to, err := place(source, info, archive)
		if err != nil {
			return nil, err
		}
		if info.IsDir() {
			err = l.below(from, "", to)
		} else {
			err = l.add(item{from: from, to: to, info: info, unpack: archive}, path.Base(source))
		}
		if err != nil {
			return nil, err
		}
	}
	return l.items, nil
}

func (l *lister) add(i item, name string) error {
	if l.s.Exclude != nil {
		if out, err := l.s.Exclude(name); err != nil || out {
			return err
		}
	}
	if int64(len(l.items)) >= l.limit {
		return invalid("more than %d files are copied", l.limit)
	}
	l.items = append(l.items, i)
	return nil
}

// below lists what lies in a directory. Name is its path from the source.
func (l *lister) below(from, name, to string) error {
	f, err := l.s.From.root.Open(from)
	if err != nil {
		return err
	}
	names, err := f.Readdirnames(-1)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	slices.Sort(names)
	for _, base := range names {
		i := item{from: path.Join(from, base), to: path.Join(to, base)}
		if i.info, err = l.s.From.root.Lstat(i.from); err != nil {
			return err
		}
		at := path.Join(name, base)
		if err := l.add(i, at); err != nil {
			return err
		}
		if i.info.IsDir() {
			if err := l.below(i.from, at, i.to); err != nil {
				return err
			}
		}
	}
	return nil
}

// Digest is the same for selections whose files are the same: names, kinds,
// modes, contents and attributes, but not times and owners.
func (s Selection) Digest(ctx context.Context, limits Limits) (string, error) {
	n := 0
	items, err := s.list(limits, func(source string, info fs.FileInfo, _ bool) (string, error) {
		n++
		if info.IsDir() {
			return fmt.Sprint(n), nil
		}
		return fmt.Sprint(n, "/", path.Base(source)), nil
	})
	if err != nil {
		return "", err
	}
	h := sha256.New()
	p := packer{ctx: ctx, s: s, seen: map[[2]uint64]string{}, w: tar.NewWriter(h), timeless: true}
	if err := errors.Join(p.all(items), p.w.Close()); err != nil {
		return "", err
	}
	return fmt.Sprintf("sha256:%x", h.Sum(nil)), nil
}

// Copy puts a selection at a place, as the COPY of a Dockerfile does: to a name,
// or into a directory if dest is one or ends with a slash.
func (t *Tree) Copy(ctx context.Context, s Selection, dest string, limits Limits) (Report, error) {
	into := strings.HasSuffix(dest, "/") || len(s.Sources) > 1
	info, err := t.Stat(dest)
	if err == nil && info.IsDir() {
		into = true
	}
	if err == nil && into && !info.IsDir() {
		return Report{}, invalid("%s is a file, not a directory", dest)
	}
	items, err := s.list(limits, func(source string, info fs.FileInfo, archive bool) (string, error) {
		if info.IsDir() {
			return dest, t.makeDest(dest, s)
		}
		if archive {
			return dest, nil
		}
		if into {
			return path.Join(dest, path.Base(source)), nil
		}
		return dest, nil
	})
	if err != nil {
		return Report{}, err
	}
	if items, err = t.fit(items); err != nil || len(items) == 0 {
		return Report{}, err
	}
	p := packer{ctx: ctx, s: s, seen: map[[2]uint64]string{}}
	return t.fill(ctx, limits, func(w *tar.Writer) error { p.w = w; return p.all(items) })
}

// makeDest makes the directory that content is copied to.
func (t *Tree) makeDest(dest string, s Selection) error {
	if info, err := t.Stat(dest); err == nil && info.IsDir() {
		return nil
	}
	if err := t.MkdirAll(dest, 0o755); err != nil || s.Keep {
		return err
	}
	return t.Chown(dest, s.UID, s.GID)
}

// fit leaves out directories that are there already, and refuses files in place
// of directories and the other way round.
func (t *Tree) fit(items []item) ([]item, error) {
	var out []item
	for _, i := range items {
		if i.unpack {
			out = append(out, i)
			continue
		}
		have, err := t.Stat(i.to)
		switch {
		case err != nil: // not there
		case have.IsDir() && i.info.IsDir():
			continue
		case have.IsDir():
			return nil, invalid("%s is a directory, and a file is to take its place", i.to)
		case i.info.IsDir():
			return nil, invalid("%s is a file, and a directory is to take its place", i.to)
		}
		out = append(out, i)
	}
	return out, nil
}

// fill unpacks what write writes.
func (t *Tree) fill(ctx context.Context, limits Limits, write func(*tar.Writer) error) (Report, error) {
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		tw := tar.NewWriter(w)
		err := write(tw)
		if err == nil {
			err = tw.Close()
		}
		_ = w.CloseWithError(err) // never fails
	}()
	u := newUnpacker(t, limits, false)
	err := u.layer(&meter{ctx: ctx, r: r})
	_ = r.CloseWithError(errors.New("the copy has ended")) // never fails; ends the writer
	<-done
	return u.report, err
}

// packer writes items into a tar stream.
type packer struct {
	ctx      context.Context
	s        Selection
	w        *tar.Writer
	seen     map[[2]uint64]string // files with several names
	timeless bool
}

func (p *packer) all(items []item) error {
	for _, i := range items {
		if p.ctx.Err() != nil {
			return context.Cause(p.ctx)
		}
		write := p.item
		if i.unpack && !p.timeless {
			write = p.archive
		}
		if err := write(i); err != nil {
			return in(i.from, err)
		}
	}
	return nil
}

func (p *packer) item(i item) error {
	h := &tar.Header{Name: strings.TrimPrefix(i.to, "/"), Format: tar.FormatPAX, Mode: unixMode(i.info.Mode()), ModTime: i.info.ModTime()}
	st, ok := i.info.Sys().(*syscall.Stat_t)
	if !ok {
		return errors.New("no owner is known")
	}
	h.Uid, h.Gid = int(st.Uid), int(st.Gid)
	p.own(h)
	if p.timeless {
		h.ModTime, h.Uid, h.Gid = time.Time{}, 0, 0
	}
	if p.s.Mode != nil && i.info.Mode()&fs.ModeSymlink == 0 {
		h.Mode = unixMode(*p.s.Mode)
	}
	switch mode := i.info.Mode(); {
	case mode.IsDir():
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
	case mode&fs.ModeSymlink != 0:
		h.Typeflag = tar.TypeSymlink
		var err error
		if h.Linkname, err = p.s.From.root.Readlink(i.from); err != nil {
			return err
		}
		return p.w.WriteHeader(h)
	case mode.IsRegular():
		if first, again := p.again(st, h.Name); again {
			h.Typeflag, h.Linkname = tar.TypeLink, first
			return p.w.WriteHeader(h)
		}
	default:
		return nil // the unpacker has left out what else there is
	}
	return p.content(i, h)
}

func (p *packer) own(h *tar.Header) {
	if !p.s.Keep {
		h.Uid, h.Gid = p.s.UID, p.s.GID
	}
}

// again says that a file was written under another name.
func (p *packer) again(st *syscall.Stat_t, name string) (string, bool) {
	if st.Nlink < 2 {
		return "", false
	}
	key := [2]uint64{st.Dev, st.Ino}
	first, ok := p.seen[key]
	if !ok {
		p.seen[key] = name
	}
	return first, ok
}

func (p *packer) content(i item, h *tar.Header) (err error) {
	f, err := p.s.From.root.Open(i.from)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if h.PAXRecords, err = readAttributes(f); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir {
		return p.w.WriteHeader(h)
	}
	h.Typeflag, h.Size = tar.TypeReg, i.info.Size()
	if err := p.w.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(p.w, f)
	return err
}

// readAttributes reads those that the unpacker keeps.
func readAttributes(f *os.File) (map[string]string, error) {
	list := make([]byte, 64<<10)
	n, err := unix.Flistxattr(int(f.Fd()), list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out map[string]string
	for name := range strings.SplitSeq(strings.TrimRight(string(list[:n]), "\x00"), "\x00") {
		if !keptAttribute(name) {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Fgetxattr(int(f.Fd()), name, value)
		if err != nil {
			return nil, err
		}
		if out == nil {
			out = map[string]string{}
		}
		out[xattrRecord+name] = string(value[:n])
	}
	return out, nil
}

// unixMode is a mode as tar has it.
func unixMode(m fs.FileMode) int64 {
	out := int64(m.Perm())
	for bit, value := range map[fs.FileMode]int64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			out |= value
		}
	}
	return out
}

// isArchive says whether a file, named without links, is a tar file, compressed
// or not.
func (t *Tree) isArchive(name string) (_ bool, err error) {
	f, err := t.root.Open(name)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	content, done, err := decompress(f)
	if sandbox.Is(err, sandbox.KindInvalid) { // it only begins like one
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer done()
	_, err = tar.NewReader(content).Next()
	return err == nil, nil // whatever is wrong: it is a file like others
}

// archive writes the content of a tar file.
func (p *packer) archive(i item) (err error) {
	f, err := p.s.From.root.Open(i.from)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	source := &meter{ctx: p.ctx, r: f}
	content, end, err := decompress(source)
	if err != nil {
		return err
	}
	defer end()
	r := tar.NewReader(&valve{r: content, packed: source, limits: Limits{}.withDefaults()})
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = p.move(h, i.to, r)
		}
		if err != nil {
			return broken(err)
		}
	}
}

// move writes one entry of an archive, below a directory.
func (p *packer) move(h *tar.Header, to string, data io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := clean(h.Name)
	if err != nil || name == "" {
		return err
	}
	out := &tar.Header{
		Typeflag: h.Typeflag, Name: path.Join(strings.TrimPrefix(to, "/"), name), Linkname: h.Linkname, Size: h.Size, Mode: h.Mode,
		Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime, Devmajor: h.Devmajor, Devminor: h.Devminor, Format: tar.FormatPAX,
	}
	switch h.Typeflag {
	case tar.TypeDir:
		out.Name += "/"
	case tar.TypeLink:
		target, err := clean(h.Linkname)
		if err != nil {
			return err
		}
		out.Linkname = path.Join(strings.TrimPrefix(to, "/"), target)
	case tar.TypeGNUSparse:
		out.Typeflag = tar.TypeReg
	}
	for key, value := range h.PAXRecords {
		if strings.HasPrefix(key, xattrRecord) {
			out.PAXRecords = with(out.PAXRecords, key, value)
		}
	}
	if p.s.UID != 0 || p.s.GID != 0 { // ADD --chown; else an archive's owners are its own
		p.own(out)
	}
	if err := p.w.WriteHeader(out); err != nil {
		return err
	}
	_, err = io.Copy(p.w, data)
	return err
}

func with(m map[string]string, key, value string) map[string]string {
	if m == nil {
		m = map[string]string{}
	}
	m[key] = value
	return m
}

// Remove removes what a path names and all below it; links on the way are
// followed, the last one is not.
func (t *Tree) Remove(name string) error {
	resolved, err := t.Resolve(name, false)
	if err != nil {
		return err
	}
	if resolved == "." {
		return invalid("the root cannot be removed")
	}
	t.stale = true
	return t.root.RemoveAll(resolved)
}
