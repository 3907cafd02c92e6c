package dm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

func requireLoops(t *testing.T) {
	t.Helper()
	testkit.Root(t)
	why := ""
	if err := kernel.Loop(); err != nil {
		why = err.Error()
	}
	testkit.Require(t, "loop", why == "", why)
}

// TestLoops asks a real kernel: a loop device knows its file and its tag, is read-only
// where it should be, goes with its last user, and keeps the lock of its file.
func TestLoops(t *testing.T) {
	requireLoops(t)
	tag := "dm" + randomInstance() + "-test"
	path := filepath.Join(t.TempDir(), "file")
	content := pattern(5, 1)
	must(t, os.WriteFile(path, content, 0o600))
	for _, readOnly := range []bool{true, false} {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		must(t, err, unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB))
		h, err := loops{}.Attach(f, tag, readOnly)
		must(t, err, f.Close())
		l, err := loops{}.LoopAt(h.dev)
		if err != nil || l.tag != tag || l.path != path || l.dev != h.dev || !l.sameFile(path) || l.sameFile("/dev/null") {
			t.Errorf("%+v, %v", l, err)
		}
		if all, err := (loops{}).Loops(tag); err != nil || len(all) != 1 || all[0] != l {
			t.Errorf("%+v, %v; want %+v", all, err, l)
		}
		node := fmt.Sprintf("/dev/loop%d", unix.Minor(h.dev))
		if got, err := os.ReadFile(node); err != nil || string(got) != string(content) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		w, err := os.OpenFile(node, os.O_RDWR, 0)
		if err == nil {
			_, err = w.Write(content[:sector])
			err = errors.Join(err, w.Sync(), w.Close())
		}
		if (err != nil) != readOnly {
			t.Errorf("read-only %v, and writing: %v", readOnly, err)
		}
		if locked(t, path) != true {
			t.Error("the lock has gone with the descriptor, though the loop device keeps the file")
		}
		must(t, h.close())
		testkit.Eventually(t, 5*time.Second, "cleared", func() bool {
			_, err := loops{}.LoopAt(h.dev)
			return errors.Is(err, fs.ErrNotExist)
		})
		if locked(t, path) {
			t.Error("the lock has outlived the loop device")
		}
		if all, err := (loops{}).Loops(tag); err != nil || len(all) != 0 {
			t.Errorf("%+v, %v", all, err)
		}
	}
}

func locked(t *testing.T, path string) bool {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer func() { _ = f.Close() }() // read only
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK)
}

func TestLoopsThatCannotBe(t *testing.T) {
	requireLoops(t)
	f, err := os.CreateTemp(t.TempDir(), "")
	must(t, err)
	defer func() { _ = f.Close() }() // empty
	if h, err := (loops{}).Attach(f, strings.Repeat("x", maxTag+1), true); err == nil {
		t.Errorf("a tag that would be cut: %+v", h)
	}
	if l, err := (loops{}).LoopAt(unix.Mkdev(loopMajor, 1<<19)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a device that is not there: %+v, %v", l, err)
	}
	if l, err := (loops{}).LoopAt(unix.Mkdev(1, 3)); err == nil {
		t.Errorf("/dev/null is the loop device %+v", l)
	}
	if err := (loops{}).Clear(unix.Mkdev(loopMajor, 1<<19)); err == nil {
		t.Error("a device that is not there was cleared")
	}
}

// TestClearWaitsForTheLastUser: what a sweep clears stays until it is closed.
func TestClearWaitsForTheLastUser(t *testing.T) {
	requireLoops(t)
	tag := "dm" + randomInstance() + "-test"
	f, err := os.CreateTemp(t.TempDir(), "")
	must(t, err, f.Truncate(blockBytes))
	h, err := loops{}.Attach(f, tag, true)
	must(t, err, f.Close(), loops{}.Clear(h.dev))
	if l, err := (loops{}).LoopAt(h.dev); err != nil || l.tag != tag {
		t.Errorf("while it is open: %+v, %v", l, err)
	}
	must(t, h.close())
	testkit.Eventually(t, 5*time.Second, "cleared", func() bool {
		all, err := loops{}.Loops(tag)
		return err == nil && len(all) == 0
	})
	must(t, loops{}.Clear(h.dev)) // what is clear already
}

func TestNodes(t *testing.T) {
	testkit.Root(t)
	defer unix.Umask(unix.Umask(0o077)) // a service may have a narrow one
	dir := filepath.Join(t.TempDir(), "nodes")
	n := nodes{dir}
	if got, err := n.Nodes("a"); err != nil || len(got) != 0 {
		t.Errorf("no folder yet: %v, %v", got, err)
	}
	must(t, n.MakeNode("a-1", unix.Mkdev(7, 300), 65533, 65532), n.MakeNode("b-1", unix.Mkdev(1, 3), 0, 0))
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o711 {
		t.Errorf("the folder has mode %v, %v: VMMs of other users pass through it", info.Mode(), err)
	}
	var st unix.Stat_t
	look := func() {
		t.Helper()
		must(t, unix.Lstat(filepath.Join(dir, "a-1"), &st))
		if st.Mode != unix.S_IFBLK|0o600 || st.Uid != 65533 || st.Gid != 65532 || st.Rdev != unix.Mkdev(7, 300) {
			t.Errorf("mode %o, %d:%d, device %x", st.Mode, st.Uid, st.Gid, st.Rdev)
		}
		if uid, gid, err := n.NodeOwner("a-1"); err != nil || uid != 65533 || gid != 65532 {
			t.Errorf("of %d:%d, %v", uid, gid, err)
		}
	}
	look()
	first := st.Ino
	must(t, n.MakeNode("a-1", unix.Mkdev(7, 300), 65533, 65532))
	if look(); st.Ino != first {
		t.Error("a node that is right was made again")
	}
	for name, spoil := range map[string]func(path string) error{
		"another device": func(path string) error { return errors.Join(os.Remove(path), unix.Mknod(path, unix.S_IFBLK|0o600, 1)) },
		"another owner":  func(path string) error { return os.Chown(path, 1, 1) },
		"another mode":   func(path string) error { return os.Chmod(path, 0o666) },
		"a file":         func(path string) error { return errors.Join(os.Remove(path), os.WriteFile(path, nil, 0o600)) },
		"a link":         func(path string) error { return errors.Join(os.Remove(path), os.Symlink("/dev/null", path)) },
		"half of it":     func(string) error { return os.WriteFile(filepath.Join(dir, ".tmp-a-1"), nil, 0o600) },
		"nothing":        os.Remove,
	} {
		must(t, spoil(filepath.Join(dir, "a-1")))
		if err := n.MakeNode("a-1", unix.Mkdev(7, 300), 65533, 65532); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		look()
	}
	must(t, n.RemoveNode(".tmp-a-1"), os.WriteFile(filepath.Join(dir, ".tmp-a-2"), nil, 0o600)) // somebody died
	if got, err := n.Nodes("a-"); err != nil || !slices.Equal(got, []string{".tmp-a-2", "a-1"}) {
		t.Errorf("%v, %v", got, err)
	}
	for range 2 {
		must(t, n.RemoveNode("a-1"), n.RemoveNode(".tmp-a-2"))
	}
	if _, _, err := n.NodeOwner("a-1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of a node that is not there: %v", err)
	}
}

// TestOpenersAreNamed finds another process that has a device open, and this one.
func TestOpenersAreNamed(t *testing.T) {
	requireLoops(t)
	f, err := os.CreateTemp(t.TempDir(), "")
	must(t, err, f.Truncate(blockBytes))
	h, err := loops{}.Attach(f, "dm"+randomInstance()+"-test", true)
	must(t, err, f.Close())
	defer func() { must(t, h.close()) }()
	node, err := os.Open(fmt.Sprintf("/dev/loop%d", unix.Minor(h.dev)))
	must(t, err)
	cmd := exec.Command("sleep", "60")
	cmd.Stdin = node
	must(t, cmd.Start(), node.Close())
	found := nodes{}.Openers(h.dev)
	_ = cmd.Process.Kill() // it runs
	_ = cmd.Wait()
	want := []string{fmt.Sprintf("process %d (sleep)", cmd.Process.Pid), fmt.Sprintf("process %d (%s)", os.Getpid(), "dm.test")}
	slices.Sort(found)
	slices.Sort(want)
	if !slices.Equal(found, want) {
		t.Errorf("%v, want %v", found, want)
	}
}
