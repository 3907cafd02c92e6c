package watch_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/guest/watch"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// Of linux/fuse.h.
const (
	fuseForget  = 2
	fuseGetattr = 3
	fuseStatfs  = 17
	fuseInit    = 26
)

// mountFUSE mounts a file system of one empty directory, which is all that a watch
// asks of it.
func mountFUSE(t *testing.T, target string) {
	t.Helper()
	testkit.Root(t)
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	testkit.Require(t, "fuse", err == nil, fmt.Sprint("/dev/fuse: ", err))
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)
	err = unix.Mount("test", target, "fuse", 0, options)
	testkit.Require(t, "mount", err == nil, fmt.Sprint("mount: ", err))
	served := make(chan struct{})
	go func() { serveFUSE(fd); close(served) }()
	t.Cleanup(func() {
		if err := testkit.Unmount(target); err != nil {
			t.Error(err)
		}
		<-served // unmounting ends it
		if err := unix.Close(fd); err != nil {
			t.Error(err)
		}
	})
}

func serveFUSE(fd int) {
	buf := make([]byte, 1<<20)
	for {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n < 40 {
			return
		}
		opcode, unique := binary.NativeEndian.Uint32(buf[4:]), binary.NativeEndian.Uint64(buf[8:])
		if opcode == fuseForget {
			continue
		}
		body, failed := answerFUSE(opcode)
		out := binary.NativeEndian.AppendUint32(nil, uint32(16+len(body)))
		out = binary.NativeEndian.AppendUint32(out, uint32(failed))
		out = binary.NativeEndian.AppendUint64(out, unique)
		if _, err := unix.Write(fd, append(out, body...)); err != nil && !errors.Is(err, unix.ENOENT) { // interrupted
			return
		}
	}
}

func answerFUSE(opcode uint32) (body []byte, failed int32) {
	switch opcode {
	case fuseInit:
		body = make([]byte, 64)
		binary.NativeEndian.PutUint32(body, 7)
		binary.NativeEndian.PutUint32(body[4:], 31)
		binary.NativeEndian.PutUint32(body[20:], 4096) // max_write
	case fuseGetattr:
		body = make([]byte, 16+88)
		binary.NativeEndian.PutUint64(body[16:], 1)                     // inode
		binary.NativeEndian.PutUint32(body[16+60:], unix.S_IFDIR|0o755) // mode
		binary.NativeEndian.PutUint32(body[16+64:], 2)                  // links
	case fuseStatfs:
		body = make([]byte, 80)
	default:
		return nil, -int32(unix.ENOSYS)
	}
	return body, 0
}

func TestNetworkFileSystems(t *testing.T) {
	dir := t.TempDir()
	remote := dir + "/remote"
	must(t, os.Mkdir(remote, 0o755))
	mountFUSE(t, remote)
	for _, cfg := range []watch.Config{{Dir: remote}, {Dir: dir, Recursive: true}} {
		if _, err := watch.Open(t.Context(), cfg); !errors.Is(err, watch.ErrNetwork) {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
	open(t, watch.Config{Dir: dir}) // what is below is not its business
	w := open(t, watch.Config{Dir: remote, Network: true})
	must(t, w.Close())
}

// TestWhatTheKernelMakesUp has directories without end and no events.
func TestWhatTheKernelMakesUp(t *testing.T) {
	testkit.Root(t)
	dir := t.TempDir()
	must(t, os.Mkdir(dir+"/proc", 0o555))
	err := unix.Mount("proc", dir+"/proc", "proc", 0, "")
	testkit.Require(t, "mount", err == nil, fmt.Sprint("mount: ", err))
	defer func() { must(t, testkit.Unmount(dir+"/proc")) }()
	w := open(t, watch.Config{Dir: dir, Recursive: true})
	must(t, write(dir+"/f", ""))
	if got := collect(t, w, dir); len(got) != 1 || got[0] != "create f" {
		t.Errorf("got %q", got)
	}
	must(t, w.Close())
}
