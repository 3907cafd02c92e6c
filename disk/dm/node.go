package dm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// nodes are the device nodes that VMMs open. Their folder is below /dev, which
// is empty again after a boot: no node ever names a device of another boot.
type nodes struct{ dir string }

// MakeNode makes a node for one user, or puts one right.
func (n nodes) MakeNode(name string, dev uint64, uid, gid int) error {
	err := os.Mkdir(n.dir, 0o711)
	if err == nil {
		err = os.Chmod(n.dir, 0o711) // whatever the umask: VMMs of other users pass through
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	path := filepath.Join(n.dir, name)
	if n.is(path, dev, uid, gid) {
		return nil
	}
	temp := filepath.Join(n.dir, ".tmp-"+name) // the node appears with its owner
	if err := removeAny(temp); err != nil {
		return err
	}
	if err := unix.Mknod(temp, unix.S_IFBLK|0o600, int(dev)); err != nil {
		return &fs.PathError{Op: "mknod", Path: temp, Err: err}
	}
	err = os.Lchown(temp, uid, gid)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return errors.Join(err, removeAny(temp))
	}
	return nil
}

func (nodes) is(path string, dev uint64, uid, gid int) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && st.Mode == unix.S_IFBLK|0o600 && st.Rdev == dev && int(st.Uid) == uid && int(st.Gid) == gid
}

// NodeOwner says whose a node is.
func (n nodes) NodeOwner(name string) (uid, gid int, err error) {
	path := filepath.Join(n.dir, name)
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, 0, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	return int(st.Uid), int(st.Gid), nil
}

// RemoveNode removes a node, if it is there.
func (n nodes) RemoveNode(name string) error { return removeAny(filepath.Join(n.dir, name)) }

// Nodes lists the nodes whose name starts with prefix, unfinished ones too.
func (n nodes) Nodes(prefix string) ([]string, error) {
	entries, err := os.ReadDir(n.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(strings.TrimPrefix(e.Name(), ".tmp-"), prefix) {
			names = append(names, e.Name())
		}
	}
	return names, err
}

// reader reads a disk past the page cache.
type reader interface {
	io.ReaderAt
	io.Closer
	Sync() error // writes out what others have cached of the device
}

// OpenNode opens a disk for aligned reads. With O_DIRECT the kernel first writes
// out what others have cached of the device: the bytes are those of now.
func (n nodes) OpenNode(name string) (reader, error) {
	return os.OpenFile(filepath.Join(n.dir, name), os.O_RDONLY|unix.O_DIRECT, 0)
}

// Holders counts the mapped devices whose tables use a device.
func (nodes) Holders(dev uint64) (int, error) {
	entries, err := os.ReadDir(filepath.Join(sysDevBlock, number(dev), "holders"))
	return len(entries), err
}

// openersLimit bounds a look at other processes' files: the stat of one on a FUSE
// file system whose server hangs does not come back.
const openersLimit = time.Second

// Openers names the processes that have a device open, as far as can be seen.
func (nodes) Openers(dev uint64) []string {
	dirs, _ := filepath.Glob("/proc/[0-9]*/fd") // the pattern is right; what cannot be read is not there
	names := make(chan string, len(dirs))
	for _, dir := range dirs {
		go func() { names <- opener(filepath.Dir(dir), dev) }()
	}
	limit := time.NewTimer(openersLimit)
	defer limit.Stop()
	var found []string
	for range dirs {
		select {
		case name := <-names:
			if name != "" {
				found = append(found, name)
			}
		case <-limit.C:
			return found
		}
	}
	return found
}

// opener is the name of a process if it has a device open.
func opener(proc string, dev uint64) string {
	links, _ := filepath.Glob(proc + "/fd/*") // as above
	for _, link := range links {
		var st unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, link, unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st); err != nil {
			continue
		}
		if st.Mode&unix.S_IFMT == unix.S_IFBLK && unix.Mkdev(st.Rdev_major, st.Rdev_minor) == dev {
			comm, _ := os.ReadFile(proc + "/comm") // empty if it ended just now
			return fmt.Sprintf("process %s (%s)", filepath.Base(proc), strings.Trim(strconv.QuoteToASCII(strings.TrimSpace(string(comm))), `"`))
		}
	}
	return ""
}

func removeAny(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
