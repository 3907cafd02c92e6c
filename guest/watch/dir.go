package watch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// moveWait is how long the second half of a move may come after its first.
// Both are queued by one system call.
const moveWait = 5 * time.Millisecond

// dir is one watched directory.
type dir struct {
	wd       int32
	name     string
	parent   *dir // nil for the root
	children map[string]*dir
	explored bool  // what is in it is told, or being told, under this name
	news     *news // until what was in it when it was armed is told
}

// path is relative to the root.
func (d *dir) path() string {
	if d.parent == nil {
		return ""
	}
	return filepath.Join(d.parent.path(), d.name)
}

// adopt watches what has appeared under a name, if it is still there, and tells what
// is in it, unless n is nil. A directory that has moved is watched already, but
// nobody knows yet of what is in it at its new place.
func (t *tree) adopt(ctx context.Context, parent *dir, name string, n *news) error {
	path := filepath.Join(t.cfg.Dir, parent.path(), name)
	wd, err := t.in.add(path, subMask)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return nil // gone, or replaced: that is told too
	case errors.Is(err, fs.ErrPermission):
		return nil // not ours to see
	case err != nil:
		return err
	}
	d := t.dirs[wd]
	if d == nil {
		d = &dir{wd: wd}
		t.dirs[wd] = d
	}
	t.place(d, parent, name)
	if d.explored {
		return nil
	}
	return t.explore(ctx, d, n)
}

// place puts a directory under a name. Who had it is replaced or gone.
func (t *tree) place(d, parent *dir, name string) {
	if d == t.root || d.parent == parent && d.name == name && parent.children[name] == d {
		return
	}
	for p := parent; p != nil; p = p.parent {
		if p == d {
			return // a bind mount of a directory in itself
		}
	}
	if d.parent != nil && d.parent.children[d.name] == d {
		delete(d.parent.children, d.name)
	}
	if old := parent.children[name]; old != nil {
		t.let(old)
	}
	d.parent, d.name = parent, name
	d.anew()
	if parent.children == nil {
		parent.children = map[string]*dir{}
	}
	parent.children[name] = d
}

// anew says of a directory and all below it that they have other names now.
func (d *dir) anew() {
	d.explored = false
	for _, child := range d.children {
		child.anew()
	}
}

// explore reads a directory that is armed, and watches what is in it.
func (t *tree) explore(ctx context.Context, d *dir, n *news) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	path := filepath.Join(t.cfg.Dir, d.path())
	kind, err := kindOf(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // gone again
	case err != nil:
		return err
	case kind == remote && !t.cfg.Network:
		return fmt.Errorf("%s: %w", path, ErrNetwork)
	case kind == madeUp && d != t.root:
		return nil
	}
	found, subdirs, err := t.readDir(path, n)
	if err != nil {
		return err
	}
	d.explored = true
	if n != nil {
		t.outdated(d)
		d.news = &news{read: time.Now(), since: n.since, found: found, known: map[string]bool{}}
		if d.news.mark, err = t.in.mark(); err != nil {
			return fmt.Errorf("inotify: %w", err)
		}
		t.fresh = append(t.fresh, d)
	}
	for _, name := range subdirs {
		if err := t.adopt(ctx, d, name, n); err != nil {
			return err
		}
	}
	return nil
}

// readDir finds what is in a directory, as far as n wants it, and which of it are
// directories.
func (t *tree) readDir(path string, n *news) (found map[string]*find, subdirs []string, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil, nil, nil // gone again, or not ours to see
	}
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = f.Close() }() // read only
	found = map[string]*find{}
	for err == nil {
		var entries []fs.DirEntry
		entries, err = f.ReadDir(1024)
		for _, e := range entries {
			if unfinished, _ := t.unfinished(e.Name()); unfinished {
				continue
			}
			if e.IsDir() {
				subdirs = append(subdirs, e.Name())
			}
			if n != nil {
				found[e.Name()] = findOf(e, n.since)
			}
		}
	}
	if err != io.EOF && !errors.Is(err, fs.ErrNotExist) { // it may be removed while we read
		return nil, nil, err
	}
	slices.Sort(subdirs)
	return found, subdirs, nil
}

// findOf finds out whether something was written to a file since then.
func findOf(e fs.DirEntry, since time.Time) *find {
	if !e.Type().IsRegular() {
		return &find{}
	}
	info, err := e.Info()
	if err != nil || info.Size() == 0 || info.ModTime().Before(since) {
		return &find{}
	}
	return &find{content: true, was: versionOf(info)}
}

// changeTime is when a directory got its name, if nothing else has changed it since.
func changeTime(path string) time.Time {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return time.Time{} // gone: there is nothing to find
	}
	return time.Unix(st.Ctim.Unix())
}

// depart follows a directory that is moved to its new place, or lets go of it when
// that is outside. The second half of the move is told at once: what happens in the
// directory from now on happens there.
func (t *tree) depart(d *dir, e raw) error {
	child := d.children[e.name]
	if child == nil {
		return t.emit(d, renamed, e.name)
	}
	to, found := t.in.find(time.Now().Add(moveWait), func(to raw) bool {
		return to.mask&unix.IN_MOVED_TO != 0 && to.cookie == e.cookie
	})
	parent := t.dirs[to.wd]
	if !found || parent == nil {
		t.let(child)
		return t.emit(d, renamed, e.name)
	}
	if err := t.emit(d, renamed, e.name); err != nil {
		return err
	}
	if _, err := t.before(parent, to.name, story{begins: true}); err != nil {
		return err
	}
	if err := t.emit(parent, created, to.name); err != nil {
		return err
	}
	t.place(child, parent, to.name)
	t.moved = e.cookie
	return t.appear(parent, to)
}

// let ends the watches of a directory and all below it.
func (t *tree) let(d *dir) {
	if d == nil || d == t.root {
		return
	}
	for _, child := range d.children {
		t.let(child)
	}
	t.in.remove(d.wd)
	t.forget(d)
}

// forget drops what we know of a directory whose watch has ended.
func (t *tree) forget(d *dir) {
	delete(t.dirs, d.wd)
	if d.parent != nil && d.parent.children[d.name] == d {
		delete(d.parent.children, d.name)
	}
	t.outdated(d)
}
