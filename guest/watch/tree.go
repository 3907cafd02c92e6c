package watch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	filesystemv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
)

const (
	dirMask = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_MODIFY | unix.IN_ATTRIB |
		unix.IN_ONLYDIR | unix.IN_EXCL_UNLINK | unix.IN_MASK_ADD
	rootMask = dirMask | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	subMask  = dirMask | unix.IN_DONT_FOLLOW
)

const (
	created = filesystemv1.EventType_EVENT_TYPE_CREATE
	written = filesystemv1.EventType_EVENT_TYPE_WRITE
	removed = filesystemv1.EventType_EVENT_TYPE_REMOVE
	renamed = filesystemv1.EventType_EVENT_TYPE_RENAME
	changed = filesystemv1.EventType_EVENT_TYPE_CHMOD
)

// tree is the directories that are watched, and turns the kernel's events, which
// name a watch and a name in it, into ours. Its goroutine alone uses it.
type tree struct {
	cfg  Config
	in   *inotify
	tell func(kind filesystemv1.EventType, name string) bool

	root  *dir
	dirs  map[int32]*dir
	fresh []*dir // those with news to tell, the outer ones first
	late  []*dir // those whose news are told, and may come from the queue once more

	publishing uint32 // cookie of the renaming of an unfinished file, or 0
	replaces   bool   // whether that file replaces another
	moved      uint32 // cookie of a directory's move that is told already, or 0
}

// errNobody ends a tree that nobody reads.
var errNobody = errors.New("nobody reads")

func newTree(cfg Config, in *inotify, tell func(filesystemv1.EventType, string) bool) *tree {
	return &tree{cfg: cfg, in: in, tell: tell, root: &dir{name: "."}, dirs: map[int32]*dir{}}
}

// arm watches all there is.
func (t *tree) arm(ctx context.Context) error {
	kind, err := kindOf(t.cfg.Dir)
	if err != nil {
		return err
	}
	if kind == remote && !t.cfg.Network {
		return fmt.Errorf("%s: %w", t.cfg.Dir, ErrNetwork)
	}
	if t.root.wd, err = t.in.add(t.cfg.Dir, rootMask); err != nil {
		return err
	}
	t.dirs[t.root.wd] = t.root
	if !t.cfg.Recursive {
		return nil
	}
	return t.explore(ctx, t.root, nil)
}

// run handles events until there can be no more, and says why.
func (t *tree) run() error {
	for {
		again, err := t.settle()
		if err != nil {
			return err
		}
		e, err := t.in.next(again)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err != nil {
			return fmt.Errorf("inotify: %w", err)
		}
		if err := t.handle(e); err != nil {
			return err
		}
		t.in.handled(e)
	}
}

func (t *tree) handle(e raw) error {
	if e.mask&unix.IN_Q_OVERFLOW != 0 {
		return ErrLost
	}
	d := t.dirs[e.wd]
	switch {
	case d == nil:
		return nil // of a directory that we let go of
	case e.name == "":
		return t.itself(d, e.mask)
	}
	if unfinished, replaces := t.unfinished(e.name); unfinished {
		if e.mask&unix.IN_MOVED_FROM != 0 {
			t.publishing, t.replaces = e.cookie, replaces
		}
		return nil
	}
	if e.mask&unix.IN_MOVED_TO != 0 && e.cookie != 0 && e.cookie == t.publishing {
		t.publishing = 0
		return t.published(d, e.name)
	}
	return t.inside(d, e)
}

func (t *tree) unfinished(name string) (unfinished, replaces bool) {
	if t.cfg.Unfinished == nil {
		return false, false
	}
	return t.cfg.Unfinished(name)
}

// published tells of a file that was complete when it got its name.
func (t *tree) published(d *dir, name string) error {
	if _, err := t.before(d, name, story{begins: !t.replaces, wrote: true}); err != nil {
		return err
	}
	if !t.replaces {
		if err := t.emit(d, created, name); err != nil {
			return err
		}
	}
	return t.emit(d, written, name)
}

// itself handles what happens to a watched directory itself. Of all but the root
// the parent's events tell the same.
func (t *tree) itself(d *dir, mask uint32) error {
	if mask&unix.IN_IGNORED != 0 {
		t.forget(d)
	}
	if d != t.root {
		return nil
	}
	switch {
	case mask&unix.IN_ATTRIB != 0:
		return t.emit(nil, changed, ".")
	case mask&unix.IN_DELETE_SELF != 0: // and nobody has it open any more
		return errors.Join(t.emit(nil, removed, "."), ErrGone)
	case mask&unix.IN_MOVE_SELF != 0:
		return errors.Join(t.emit(nil, renamed, "."), ErrGone)
	case mask&(unix.IN_IGNORED|unix.IN_UNMOUNT) != 0:
		return ErrGone
	}
	return nil
}

// inside handles what happens to something in a watched directory.
func (t *tree) inside(d *dir, e raw) error {
	isDir := e.mask&unix.IN_ISDIR != 0 && t.cfg.Recursive
	if isDir && e.mask&unix.IN_MOVED_TO != 0 && e.cookie == t.moved {
		t.moved = 0
		return t.appear(d, e)
	}
	kind, ok := kindOfEvent(e.mask)
	if !ok {
		return nil
	}
	known, err := t.before(d, e.name, story{
		begins: kind == created, made: e.mask&unix.IN_CREATE != 0,
		wrote: kind == written, ends: kind == removed || kind == renamed,
	})
	if err != nil {
		return err
	}
	if isDir && kind == renamed {
		return t.depart(d, e)
	}
	if !known {
		if err := t.emit(d, kind, e.name); err != nil {
			return err
		}
	}
	switch {
	case isDir && kind == created:
		return t.appear(d, e)
	case isDir && kind == removed:
		t.let(d.children[e.name])
	}
	return nil
}

func kindOfEvent(mask uint32) (filesystemv1.EventType, bool) {
	switch {
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		return created, true
	case mask&unix.IN_MODIFY != 0:
		return written, true
	case mask&unix.IN_DELETE != 0:
		return removed, true
	case mask&unix.IN_MOVED_FROM != 0:
		return renamed, true
	case mask&unix.IN_ATTRIB != 0:
		return changed, true
	}
	return 0, false
}

// appear watches a directory that has got a name, with what is in it.
func (t *tree) appear(d *dir, e raw) error {
	n := &news{}
	if e.mask&unix.IN_MOVED_TO != 0 {
		n.since = changeTime(filepath.Join(t.cfg.Dir, d.path(), e.name))
	}
	return t.adopt(context.Background(), d, e.name, n) // Close ends it
}

// emit tells an event in a directory, and of that one first if nothing has told of
// it yet. A nil directory is where the root is.
func (t *tree) emit(d *dir, kind filesystemv1.EventType, name string) error {
	if d != nil {
		if err := t.introduce(d); err != nil {
			return err
		}
		name = filepath.Join(d.path(), name)
	}
	if !t.tell(kind, name) {
		return errNobody
	}
	return nil
}
