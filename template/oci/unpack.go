package oci

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Report is what was unpacked, and what was not.
type Report struct {
	Entries int64
	Bytes   int64
	// Attributed is how many entries have extended attributes, which may need a
	// block each.
	Attributed int64
	// LeftOut are sentences about what the image holds and the tree does not:
	// devices and pipes, and attributes of kinds that are not kept. At most
	// maxLeftOut; LeftOutCount counts all.
	LeftOut      []string
	LeftOutCount int
}

const maxLeftOut = 100

func (r *Report) leftOut(format string, args ...any) {
	if r.LeftOutCount++; len(r.LeftOut) < maxLeftOut {
		r.LeftOut = append(r.LeftOut, fmt.Sprintf(format, args...))
	}
}

// unpacker puts the layers of one image on top of each other.
type unpacker struct {
	tree   *Tree
	budget *budget
	report Report

	// whiteouts says that names which begin with ".wh." remove things: so in
	// layers, but not in a plain tar file.
	whiteouts bool
	// own are the paths that this layer has put there, with all above them: what
	// its whiteouts do not touch.
	own map[string]bool
	// times are those of directories, set when nothing changes in them any more.
	times map[string]time.Time
}

func newUnpacker(tree *Tree, limits Limits, whiteouts bool) *unpacker {
	return &unpacker{tree: tree, budget: newBudget(limits), whiteouts: whiteouts}
}

// layer unpacks one tar stream over what is there.
func (u *unpacker) layer(r io.Reader) error {
	u.own, u.times = map[string]bool{}, map[string]time.Time{}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return u.setTimes()
		}
		if err != nil {
			return broken(err)
		}
		if err := u.entry(h, tr); err != nil {
			return in(h.Name, err)
		}
	}
}

// broken gives an error of the tar format its kind; others have theirs.
func broken(err error) error {
	if sandbox.KindOf(err) != sandbox.KindInternal {
		return err
	}
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrFieldTooLong) {
		return invalid("it is not a whole tar file: %w", err)
	}
	return err
}

func (u *unpacker) entry(h *tar.Header, data io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if err := u.budget.entry(h.Name, h.Linkname); err != nil {
		return err
	}
	u.report.Entries++
	name, err := clean(h.Name)
	if err != nil {
		return err
	}
	if base, ok := strings.CutPrefix(path.Base(name), whiteoutPrefix); ok && u.whiteouts {
		return u.whiteout(parent(name), base)
	}
	if name == "" {
		return nil // the root itself: the image's file system has its own
	}
	if err := checkOwner(h); err != nil {
		return err
	}
	dir, above, err := u.tree.folder(parent(name), u.made)
	if err != nil {
		return err
	}
	at := path.Join(above, path.Base(name))
	u.claim(at)
	if err := u.tree.clear(dir, path.Base(name), h.Typeflag == tar.TypeDir); err != nil {
		return err
	}
	return u.make(h, dir, at, data)
}

// made pays for a directory that no entry named.
func (u *unpacker) made(string) error { return u.budget.entry() }

// claim marks a path as this layer's.
func (u *unpacker) claim(at string) {
	for ; at != "." && !u.own[at]; at = path.Dir(at) {
		u.own[at] = true
	}
}

func checkOwner(h *tar.Header) error {
	const most = 1<<32 - 2 // the last one means "nobody" to chown(2)
	if h.Uid < 0 || h.Uid > most || h.Gid < 0 || h.Gid > most {
		return invalid("the owner %d:%d is not between 0 and %d", h.Uid, h.Gid, most)
	}
	return nil
}

// make makes what an entry describes, at a place that is free, or a directory.
func (u *unpacker) make(h *tar.Header, dir *os.Root, at string, data io.Reader) error {
	base := path.Base(at)
	switch h.Typeflag {
	case tar.TypeDir:
		return u.directory(h, dir, at)
	case tar.TypeReg, tar.TypeGNUSparse:
		return u.file(h, dir, base, data)
	case tar.TypeSymlink:
		return u.symlink(h, dir, base)
	case tar.TypeLink:
		return u.hardlink(h, at)
	case tar.TypeChar, tar.TypeBlock:
		u.report.leftOut("device /%s (%d:%d): a sandbox has its own devices", at, h.Devmajor, h.Devminor)
		return nil
	case tar.TypeFifo:
		u.report.leftOut("pipe /%s: make it when the sandbox runs", at)
		return nil
	}
	return invalid("it is of the unknown type %q", h.Typeflag)
}

func (u *unpacker) directory(h *tar.Header, dir *os.Root, at string) error {
	base := path.Base(at)
	if err := dir.Mkdir(base, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	f, err := dir.Open(base)
	if err != nil {
		return err
	}
	u.times[at] = h.ModTime
	return errors.Join(u.describe(f, h, at), f.Close())
}

func (u *unpacker) file(h *tar.Header, dir *os.Root, base string, data io.Reader) error {
	if err := u.budget.data(h.Size); err != nil {
		return err
	}
	f, err := dir.OpenFile(base, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	n, err := sparse.Copy(f, data)
	u.report.Bytes += n
	if err == nil && n != h.Size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return errors.Join(broken(err), f.Close())
	}
	return errors.Join(u.describe(f, h, h.Name), setTime(f, h.ModTime), f.Close())
}

// describe sets owner, mode and attributes, in this order: a change of the owner
// takes the setuid bit and the capabilities away.
func (u *unpacker) describe(f *os.File, h *tar.Header, name string) error {
	if err := f.Chown(h.Uid, h.Gid); err != nil {
		return err
	}
	if err := f.Chmod(h.FileInfo().Mode() & (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky)); err != nil {
		return err
	}
	return u.attributes(f, h, name)
}

const xattrRecord = "SCHILY.xattr."

func (u *unpacker) attributes(f *os.File, h *tar.Header, name string) error {
	total := 0
	for key, value := range h.PAXRecords {
		attr, ok := strings.CutPrefix(key, xattrRecord)
		if !ok {
			continue
		}
		if !keptAttribute(attr) {
			u.report.leftOut("attribute %.100q of /%s: only security.capability and user.* are kept", attr, name)
			continue
		}
		if total += len(attr) + len(value); total > maxAttributes {
			return invalid("its attributes have more than %d bytes", maxAttributes)
		}
		if err := unix.Fsetxattr(int(f.Fd()), attr, []byte(value), 0); err != nil {
			return fmt.Errorf("set attribute %.100q: %w", attr, err)
		}
	}
	if total > 0 {
		u.report.Attributed++
	}
	return nil
}

func keptAttribute(name string) bool {
	return name == "security.capability" || strings.HasPrefix(name, "user.")
}

func (u *unpacker) symlink(h *tar.Header, dir *os.Root, base string) error {
	if h.Linkname == "" || strings.ContainsRune(h.Linkname, 0) {
		return invalid("it is a link to nothing")
	}
	if err := dir.Symlink(h.Linkname, base); err != nil {
		return err
	}
	if err := dir.Lchown(base, h.Uid, h.Gid); err != nil {
		return err
	}
	return linkTime(dir, base, h.ModTime)
}

// hardlink gives a file of the image another name. What it links to is looked
// for in the tree; what lies under a link of that name is linked, not followed.
func (u *unpacker) hardlink(h *tar.Header, at string) error {
	target, err := clean(h.Linkname)
	if err != nil {
		return err
	}
	from, err := u.tree.Resolve(target, false)
	if err != nil {
		return err
	}
	info, err := u.tree.root.Lstat(from)
	if errors.Is(err, fs.ErrNotExist) {
		return invalid("it is a hard link to /%s, which is not there", from)
	}
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() && info.Mode()&fs.ModeSymlink == 0 {
		return invalid("it is a hard link to /%s, which is not a file", from)
	}
	return u.tree.root.Link(from, at)
}

// setTimes sets the times of directories, which every entry in them has changed.
func (u *unpacker) setTimes() error {
	for at, when := range u.times {
		info, err := u.tree.root.Lstat(at)
		if err != nil || !info.IsDir() {
			continue // removed or replaced by a later entry
		}
		when = sane(when)
		if err := u.tree.root.Chtimes(at, when, when); err != nil {
			return in(at, err)
		}
	}
	return nil
}

func setTime(f *os.File, when time.Time) error {
	when = sane(when)
	tv := unix.NsecToTimeval(when.UnixNano())
	return unix.Futimes(int(f.Fd()), []unix.Timeval{tv, tv})
}

func linkTime(dir *os.Root, base string, when time.Time) error {
	f, err := dir.Open(".")
	if err != nil {
		return err
	}
	ts := unix.NsecToTimespec(sane(when).UnixNano())
	err = unix.UtimesNanoAt(int(f.Fd()), base, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	return errors.Join(err, f.Close())
}

// sane keeps a time within what ext4 and nanoseconds in 64 bits can say.
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
