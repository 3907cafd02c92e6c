package watch

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	// The kernel shows a file, and what is written to it, a moment before it queues
	// the event of that. So what reading a directory finds is told lateWait later,
	// unless its event comes, and an event of its making or writing that comes even
	// later, up to lateMost, is not told again.
	lateWait = 50 * time.Millisecond
	lateMost = 5 * time.Second
)

// news is what a new directory may hold that the kernel's queue knows nothing of:
// what was made before the watch was armed. Reading the directory finds it together
// with what was made after, whose events are on the way. Which is which shows at
// the mark, where all events before the reading have passed.
type news struct {
	mark  int64
	read  time.Time
	over  bool      // all that was found is told
	since time.Time // of a directory that was moved here: when. What is older was not written here
	found map[string]*find
	known map[string]bool // names whose story began in the queue
}

type find struct {
	content bool // a file with something in it that was written here
	was     version
	told    bool
	written bool // a writing was in the queue
	guessed bool // a writing was told that was not in the queue
}

// version tells what a file holds from what it holds after it was written to.
type version struct {
	size     int64
	modified time.Time
}

func versionOf(info fs.FileInfo) version { return version{info.Size(), info.ModTime()} }

// story is what an event says about its name: that it was there before or not,
// that something was written, that it is not there after.
type story struct{ begins, made, wrote, ends bool }

// before tells what an event in a new directory takes for granted: that its name is
// there. It reports whether the event itself is told already.
func (t *tree) before(d *dir, name string, s story) (known bool, err error) {
	n := d.news
	if n == nil {
		return false, nil
	}
	f := n.found[name]
	if s.begins {
		delete(n.found, name) // its whole story is in the queue
		n.known[name] = true
		return s.made && f != nil && f.told, nil // nothing can be made where something is
	}
	if s.wrote && f != nil && f.guessed && t.isStill(d, name, f.was) {
		return true, nil // it comes late, and is told
	}
	introduced := n.over || n.known[name] || f != nil && f.told
	if f != nil {
		f.told = true
		f.written = f.written || s.wrote
	} else {
		n.known[name] = true // it was gone when we looked
	}
	if s.ends {
		delete(n.found, name)
		n.known[name] = true
	}
	if introduced {
		return false, nil
	}
	return false, t.emit(d, created, name)
}

func (t *tree) isStill(d *dir, name string, was version) bool {
	info, err := os.Lstat(filepath.Join(t.cfg.Dir, d.path(), name))
	return err == nil && versionOf(info) == was
}

// settle tells the rest of what new directories held, and says when to look again.
func (t *tree) settle() (again time.Time, err error) {
	now := time.Now()
	for len(t.fresh) > 0 {
		d := t.fresh[0] // those behind it are not older
		if due := d.news.read.Add(lateWait); now.Before(due) {
			return due, nil
		}
		if !t.in.passed(d.news.mark) {
			return time.Time{}, nil // there are events
		}
		d.news.over = true
		t.fresh, t.late = t.fresh[1:], append(t.late, d)
		if err := t.tellRest(d); err != nil {
			return time.Time{}, err
		}
	}
	for len(t.late) > 0 {
		until := t.late[0].news.read.Add(lateMost)
		if now.Before(until) {
			return until, nil
		}
		t.late[0].news = nil
		t.late = t.late[1:]
	}
	return time.Time{}, nil
}

// outdated forgets the news of a directory.
func (t *tree) outdated(d *dir) {
	if d.news == nil {
		return
	}
	same := func(other *dir) bool { return other == d }
	t.fresh, t.late = slices.DeleteFunc(t.fresh, same), slices.DeleteFunc(t.late, same)
	d.news = nil
}

func (t *tree) tellRest(d *dir) error {
	for _, name := range sortedKeys(d.news.found) {
		f := d.news.found[name]
		if !f.told {
			f.told = true
			if err := t.emit(d, created, name); err != nil {
				return err
			}
		}
		if f.guessed = f.content && !f.written; f.guessed {
			if err := t.emit(d, written, name); err != nil {
				return err
			}
		}
	}
	return nil
}

func sortedKeys(found map[string]*find) []string {
	names := make([]string, 0, len(found))
	for name := range found {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (t *tree) introduce(d *dir) error {
	if d.parent == nil || d.parent.news == nil {
		return nil
	}
	f := d.parent.news.found[d.name]
	if f == nil || f.told {
		return nil
	}
	f.told = true
	return t.emit(d.parent, created, d.name)
}
