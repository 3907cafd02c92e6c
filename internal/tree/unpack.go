package tree

import (
	"archive/tar"
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	zeros "github.com/dormouse-sandbox/dormouse/internal/sparse"
)

// Options say how a tree is unpacked.
type Options struct {
	// Mask are permission bits that nothing gets.
	Mask fs.FileMode
	// New says that the directory was made for this: it gets the tree's own mode
	// and time. A directory that was there stays as it is.
	New bool
	// Progress is given the content of files as it goes.
	Progress io.Writer
}

// Unpack puts a stream's entries into a directory. A file that is there is
// replaced, whole or not at all; a directory is gone into; anything else in the
// place of a directory is an error, and so is a directory in the place of a file.
// After an error what was unpacked before stays.
//
// A directory gets its mode and time when the stream has left it: the entries of
// one come together, as every tar program writes them.
func Unpack(r io.Reader, root *os.Root, o Options) (Report, error) {
	o.Progress = orNobody(o.Progress)
	in := newReader(r)
	u := &unpacker{Options: o, in: in, buf: make([]byte, copyBuffer), levels: []*level{{dir: root, made: o.New, mode: 0o755}}}
	err := u.all()
	for len(u.levels) > 0 { // also after an error, or they would keep the modes of making
		err = errors.Join(err, u.leave())
	}
	u.report.skip(in.report.FirstSkipped, in.report.Skipped)
	return u.report, err
}

// level is an open directory on the way to where the unpacker is.
type level struct {
	name string
	dir  *os.Root
	made bool // by us
	mode fs.FileMode
	time time.Time // zero: as it comes
}

type unpacker struct {
	Options
	in     *reader
	levels []*level // the first is the root, which is the caller's
	report Report
	buf    []byte
}

func (u *unpacker) all() error {
	for {
		h, err := u.in.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := u.entry(h); err != nil {
			if u.in.from.err != nil {
				return u.in.from.err
			}
			return at(h.Name, err)
		}
	}
}

func (u *unpacker) entry(h *tar.Header) error {
	parts, err := split(h.Name)
	if err != nil {
		return err
	}
	if sparse(h) {
		return errSparse
	}
	if h.Typeflag == tar.TypeDir {
		return u.directory(h, parts)
	}
	if len(parts) == 0 {
		return invalid("the tree itself is not a directory")
	}
	base := parts[len(parts)-1]
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeSymlink, tar.TypeLink:
		if err := u.enter(parts[:len(parts)-1]); err != nil {
			return err
		}
	default:
		u.report.skip(h.Name, 1)
		return nil
	}
	switch u.report.Files++; h.Typeflag {
	case tar.TypeSymlink:
		return u.symlink(h, base)
	case tar.TypeLink:
		return u.hardlink(h, parts)
	}
	return u.file(h, base)
}

func (u *unpacker) top() *level { return u.levels[len(u.levels)-1] }

func (u *unpacker) directory(h *tar.Header, parts []string) error {
	if err := u.enter(parts); err != nil {
		return err
	}
	u.report.Directories++
	l := u.top()
	l.mode, l.time = h.FileInfo().Mode().Perm(), h.ModTime
	return nil
}

// enter goes to a directory, and makes what is missing on the way.
func (u *unpacker) enter(parts []string) error {
	same := 0
	for same < len(parts) && same+1 < len(u.levels) && u.levels[same+1].name == parts[same] {
		same++
	}
	for len(u.levels) > same+1 {
		if err := u.leave(); err != nil {
			return err
		}
	}
	for _, name := range parts[same:] {
		if err := u.descend(name); err != nil {
			return err
		}
	}
	return nil
}

func (u *unpacker) descend(name string) error {
	dir := u.top().dir
	info, err := dir.Lstat(name)
	l := &level{name: name, mode: 0o755}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		l.made = true
		err = dir.Mkdir(name, 0o700) // its own mode may forbid what is to come
	case err == nil && !info.IsDir():
		return conflict("%q is %s there, not a directory", name, describe(info.Mode()))
	}
	if err == nil {
		l.dir, err = dir.OpenRoot(name)
	}
	if err == nil {
		u.levels = append(u.levels, l)
	}
	return err
}

// leave is done with a directory.
func (u *unpacker) leave() error {
	l := u.top()
	u.levels = u.levels[:len(u.levels)-1]
	var err error
	if l.made {
		err = at(l.name, u.describe(l))
	}
	if len(u.levels) > 0 {
		err = errors.Join(err, l.dir.Close())
	}
	return err
}

func (u *unpacker) describe(l *level) error {
	f, err := l.dir.Open(".")
	if err != nil {
		return err
	}
	if !l.time.IsZero() {
		err = setTime(l.dir, ".", l.time) // before its mode may forbid to come here
	}
	return errors.Join(err, f.Chmod(l.mode&^u.Mask), f.Close())
}

// free says under which temporary name an entry can be made, and whether it will
// replace something.
func free(dir *os.Root, base string) (temp string, replaces bool, err error) {
	info, err := dir.Lstat(base)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return TempNew + rand.Text(), false, nil
	case err != nil:
		return "", false, err
	case info.IsDir():
		return "", false, conflict("a directory is in its place there")
	}
	return TempReplace + rand.Text(), true, nil
}

func (u *unpacker) file(h *tar.Header, base string) (err error) {
	dir := u.top().dir
	temp, _, err := free(dir, base)
	if err != nil {
		return err
	}
	f, err := dir.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()        // the first error says more
			_ = dir.Remove(temp) // likewise
		}
	}()
	if err := u.fill(f, h.Size); err != nil {
		return err
	}
	if err := f.Chmod(h.FileInfo().Mode().Perm() &^ u.Mask); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := setTime(dir, temp, h.ModTime); err != nil {
		return err
	}
	return dir.Rename(temp, base)
}

func (u *unpacker) fill(f *os.File, size int64) error {
	n, err := zeros.CopyBuffer(f, io.TeeReader(u.in, u.Progress), u.buf)
	u.report.Bytes += n
	switch {
	case err != nil && !errors.Is(err, io.ErrUnexpectedEOF):
		return err
	case n != size:
		return u.in.broken(io.ErrUnexpectedEOF)
	}
	return nil
}

func (u *unpacker) symlink(h *tar.Header, base string) error {
	return u.publish(base, h.ModTime, func(name string) error { return u.top().dir.Symlink(h.Linkname, name) })
}

// hardlink gives a file of the tree another name. It is found without following
// links, as everything else.
func (u *unpacker) hardlink(h *tar.Header, parts []string) error {
	to, err := split(h.Linkname)
	if err != nil {
		return invalid("as a link to %.300q: %w", h.Linkname, err)
	}
	root := u.levels[0].dir
	for i := range to {
		info, err := root.Lstat(strings.Join(to[:i+1], "/"))
		if errors.Is(err, fs.ErrNotExist) {
			return invalid("as a link to %.300q, which is not there", h.Linkname)
		}
		if err != nil {
			return err
		}
		if last := i == len(to)-1; !last && !info.IsDir() || last && !info.Mode().IsRegular() {
			return conflict("as a link to %.300q: %q is %s there", h.Linkname, to[i], describe(info.Mode()))
		}
	}
	if len(to) == 0 {
		return invalid("it is a link to the tree itself")
	}
	above := parts[:len(parts)-1]
	return u.publish(parts[len(parts)-1], time.Time{}, func(name string) error {
		return root.Link(strings.Join(to, "/"), strings.Join(append(above[:len(above):len(above)], name), "/"))
	})
}

// publish makes a link, which is there at once, or replaces what is in its place.
func (u *unpacker) publish(base string, when time.Time, link func(name string) error) error {
	dir := u.top().dir
	temp, replaces, err := free(dir, base)
	if err != nil {
		return err
	}
	name := base
	if replaces {
		name = temp
	}
	if err := link(name); err != nil {
		return err
	}
	if !when.IsZero() {
		err = linkTime(dir, name, when)
	}
	if !replaces {
		return err
	}
	if err == nil {
		err = dir.Rename(temp, base)
	}
	// rename(2) leaves both where they are already one file.
	if gone := dir.Remove(temp); gone != nil && !errors.Is(gone, fs.ErrNotExist) {
		err = errors.Join(err, gone)
	}
	return err
}

func setTime(dir *os.Root, name string, when time.Time) error {
	when = sane(when)
	return dir.Chtimes(name, when, when)
}

func linkTime(dir *os.Root, name string, when time.Time) error {
	f, err := dir.Open(".")
	if err != nil {
		return err
	}
	ts := unix.NsecToTimespec(sane(when).UnixNano())
	err = unix.UtimesNanoAt(int(f.Fd()), name, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	return errors.Join(err, f.Close())
}

// sane keeps a time within what nanoseconds in 64 bits can say; file systems keep
// it within what they can.
func sane(when time.Time) time.Time {
	first, last := time.Unix(0, 0), time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)
	switch {
	case when.Before(first):
		return first
	case when.After(last):
		return last
	}
	return when
}
