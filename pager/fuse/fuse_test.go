package fuse_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/pager/fuse"
)

// pattern is what file n has at an offset that is a multiple of 8.
func pattern(n uint64, off int64) uint64 { return n<<48 ^ uint64(off)*0x9e3779b97f4a7c15 }

const fileBytes = 16<<20 + 100 // its last page is short

// made are files whose bytes follow from their place. Names are numbers from 2.
type made struct {
	forgotten atomic.Int64
	fail      func(node uint64, off int64) error
	failed    atomic.Int64
}

func (m *made) Resolve(name string) (uint64, int64, error) {
	n, err := strconv.ParseUint(name, 10, 16)
	if err != nil || n < 2 {
		return 0, 0, fs.ErrNotExist
	}
	return n, fileBytes, nil
}

func (m *made) Size(uint64) (int64, error) { return fileBytes, nil }

func (m *made) ReadAt(node uint64, p []byte, off int64) error {
	if m.fail != nil {
		if err := m.fail(node, off); err != nil {
			return err
		}
	}
	fill(node, p, off)
	return nil
}

func (m *made) Forget(uint64)                    { m.forgotten.Add(1) }
func (m *made) Failed(uint64, int64, int, error) { m.failed.Add(1) }

func fill(node uint64, p []byte, off int64) {
	var word [8]byte
	for i := range p {
		at := off + int64(i)
		if i == 0 || at%8 == 0 {
			binary.LittleEndian.PutUint64(word[:], pattern(node, at/8*8))
		}
		p[i] = word[at%8]
	}
}

// mounted is a file system with a server that the test may kill.
type mounted struct {
	t          *testing.T
	dir        string
	dev, slots *os.File
	child      *exec.Cmd
}

func mount(t *testing.T) *mounted {
	t.Helper()
	testkit.Root(t)
	if err := kernel.FUSE(); err != nil {
		testkit.Require(t, "fuse", false, err.Error())
	}
	m := &mounted{t: t, dir: t.TempDir()}
	var err error
	if m.slots, err = fuse.NewSlots(); err != nil {
		t.Fatal(err)
	}
	if m.dev, err = fuse.Mount(m.dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.kill()
		if err := errors.Join(fuse.Unmount(m.dir), m.dev.Close(), m.slots.Close()); err != nil {
			t.Error(err)
		}
	})
	return m
}

// serve starts a server in another process.
func (m *mounted) serve(env ...string) {
	m.t.Helper()
	m.child = exec.Command(os.Args[0], "-test.run=^TestServerInAChild$")
	m.child.Env = append(append(os.Environ(), "FUSE_CHILD=1"), env...)
	m.child.ExtraFiles = []*os.File{m.dev, m.slots}
	m.child.Stderr = os.Stderr
	if err := m.child.Start(); err != nil {
		m.t.Fatal(err)
	}
}

func (m *mounted) kill() {
	if m.child != nil {
		_ = m.child.Process.Kill()
		_ = m.child.Wait() // it was killed
		m.child = nil
	}
}

// TestServerInAChild is the process that the other tests kill.
func TestServerInAChild(t *testing.T) {
	if os.Getenv("FUSE_CHILD") == "" {
		return // it is another test's process
	}
	files := &made{}
	if os.Getenv("FUSE_SLOW") != "" {
		files.fail = func(uint64, int64) error { time.Sleep(2 * time.Millisecond); return nil } // so that it dies with work in hand
	}
	if err := fuse.Serve(os.NewFile(3, "fuse"), os.NewFile(4, "slots"), files); err != nil {
		t.Fatal(err)
	}
}

func TestReads(t *testing.T) {
	m := mount(t)
	m.serve()
	got, err := os.ReadFile(filepath.Join(m.dir, "7"))
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, fileBytes)
	fill(7, want, 0)
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes that are not the right %d", len(got), len(want))
	}
	for name, err := range map[string]error{
		"a missing file":       second(os.Open(filepath.Join(m.dir, "nothing"))),
		"a file in a file":     second(os.Open(filepath.Join(m.dir, "7", "x"))),
		"a new file":           second(os.Create(filepath.Join(m.dir, "new"))),
		"a removal":            os.Remove(filepath.Join(m.dir, "7")),
		"a rename":             os.Rename(filepath.Join(m.dir, "7"), filepath.Join(m.dir, "8")),
		"a shorter file":       os.Truncate(filepath.Join(m.dir, "7"), 1),
		"a new folder":         os.Mkdir(filepath.Join(m.dir, "d"), 0o700),
		"a change of the mode": os.Chmod(filepath.Join(m.dir, "7"), 0o600),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	f, err := os.OpenFile(filepath.Join(m.dir, "7"), os.O_RDWR, 0) // as QEMU does
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // nothing was written
	if _, err := f.Write([]byte("x")); err == nil {
		t.Error("a write: no error")
	}
	if entries, err := os.ReadDir(m.dir); err != nil || len(entries) > 0 {
		t.Errorf("the folder lists %v, %v", entries, err)
	}
	if info, err := f.Stat(); err != nil || info.Size() != fileBytes || info.Mode() != 0o444 {
		t.Errorf("%v, %v", info, err)
	}
}

func second(f io.Closer, err error) error {
	if err == nil {
		_ = f.Close() // nothing was written
	}
	return err
}

// TestOneThatIsKilledIsReplaced lets another process read files through private
// mappings, as VMs do, while one server after the other is killed with requests
// in its hands. Every byte is right, and nobody waits for ever.
//
// The reader is a process of its own for a reason: a goroutine that waits for a
// page stops the whole Go runtime at the next garbage collection.
func TestOneThatIsKilledIsReplaced(t *testing.T) {
	m := mount(t)
	m.serve("FUSE_SLOW=1")
	reader := exec.Command(os.Args[0], "-test.run=^TestReaderInAChild$", "-test.v")
	reader.Env = append(os.Environ(), "FUSE_READER="+m.dir)
	reader.Stderr = os.Stderr
	out, err := reader.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := reader.Start(); err != nil {
		t.Fatal(err)
	}
	var rounds atomic.Int64
	ended := make(chan error, 1)
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			switch text := lines.Text(); {
			case text == "round":
				rounds.Add(1)
			case strings.HasPrefix(text, "wrong"):
				t.Error(text)
			}
		}
		ended <- reader.Wait()
	}()
	defer func() { _ = reader.Process.Kill() }() // it may have ended
	const kills = 25
	for range kills {
		before := rounds.Load()
		testkit.Eventually(t, 20*time.Second, "pages are served", func() bool { return rounds.Load() > before+5 })
		m.kill()
		m.serve("FUSE_SLOW=1")
	}
	if err := reader.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("a reader waits for ever")
	}
	t.Logf("%d rounds of 50 pages, %d servers killed", rounds.Load(), kills)
}

// TestReaderInAChild maps files and says so after every 50 pages, until SIGTERM.
func TestReaderInAChild(t *testing.T) {
	dir := os.Getenv("FUSE_READER")
	if dir == "" {
		return // it is another test's process
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	var done atomic.Bool
	go func() { <-stop; done.Store(true) }()
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for !done.Load() {
				if err := readMapped(filepath.Join(dir, strconv.Itoa(2+i)), uint64(2+i), rng, &done); err != nil {
					fmt.Println("wrong:", err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// readMapped maps a file privately, touches pages in a random order, and drops
// what the page cache has of it, so that the next one asks again.
func readMapped(path string, node uint64, rng *rand.Rand, done *atomic.Bool) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	mem, err := unix.Mmap(int(f.Fd()), 0, fileBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Munmap(mem), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)) }()
	for i := 0; i < 300 && !done.Load(); i++ {
		at := rng.Int64N(fileBytes/8) * 8
		if got, want := binary.LittleEndian.Uint64(mem[at:]), pattern(node, at); got != want {
			return fmt.Errorf("%s has %x at %d, want %x", path, got, at, want)
		}
		mem[at] ^= 0xff // the page is this mapping's own from now on
		if i%50 == 49 {
			fmt.Println("round")
		}
	}
	return nil
}

// TestErrorsAreErrors: what cannot be served is EIO for a read, and SIGBUS for who
// has it mapped; the rest of the file goes on.
func TestErrorsAreErrors(t *testing.T) {
	m := mount(t)
	const bad = 8 << 20
	files := &made{fail: func(_ uint64, off int64) error {
		if off >= bad {
			return errors.New("the disk is gone")
		}
		return nil
	}}
	served := make(chan error)
	go func() { served <- fuse.Serve(m.dev, m.slots, files) }()
	f, err := os.Open(filepath.Join(m.dir, "3"))
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	if _, err := f.ReadAt(buf, 0); err != nil {
		t.Error(err)
	}
	if _, err := f.ReadAt(buf, bad+1<<20); !errors.Is(err, syscall.EIO) {
		t.Errorf("a read of what cannot be served: %v", err)
	}
	if files.failed.Load() == 0 {
		t.Error("nobody was told")
	}
	if err := errors.Join(f.Close(), fuse.Unmount(m.dir)); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-served:
		if err != nil {
			t.Errorf("after the unmount: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the server does not end with the mount")
	}
}
