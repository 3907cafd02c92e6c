package pager_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/pager"
	"github.com/dormouse-sandbox/dormouse/pager/fuse"
)

// source has images of numbers: image n is n times the byte n.
type source struct{ opened, closed atomic.Int64 }

type image struct {
	*bytes.Reader
	all *source
}

// bad is the image that cannot be read from its second page on.
const bad = 199

func (i image) Bytes() int64 { return i.Size() }

func (i image) ReadAt(p []byte, off int64) (int, error) {
	if i.Size() == bad*10_000 && off+int64(len(p)) > 4096 {
		return 0, errors.New("a bit has flipped")
	}
	return i.Reader.ReadAt(p, off)
}

func (i image) Close() error { i.all.closed.Add(1); return nil }

func (s *source) Open(name string) (pager.Image, error) {
	n, err := strconv.Atoi(name)
	if err != nil || n < 1 || n > 200 {
		return nil, fs.ErrNotExist
	}
	s.opened.Add(1)
	return image{bytes.NewReader(bytes.Repeat([]byte{byte(n)}, n*10_000)), s}, nil
}

func (s *source) Names() ([]string, error) {
	var names []string
	for n := 1; n <= 200; n++ {
		names = append(names, strconv.Itoa(n))
	}
	return names, nil
}

// TestServerInAChild is the page server of the other tests.
func TestServerInAChild(t *testing.T) {
	if os.Getenv("PAGER_CHILD") == "" {
		return // it is another test's process
	}
	files := pager.NewFiles(&source{}, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err := fuse.Serve(os.NewFile(pager.DeviceFD, "fuse"), os.NewFile(pager.SlotsFD, "slots"), files); err != nil {
		t.Fatal(err)
	}
}

func config(t *testing.T) pager.Config {
	t.Helper()
	testkit.Root(t)
	if err := kernel.FUSE(); err != nil {
		testkit.Require(t, "fuse", false, err.Error())
	}
	t.Setenv("PAGER_CHILD", "1")
	cfg := pager.Config{
		Dir: filepath.Join(t.TempDir(), "p"), Command: []string{os.Args[0], "-test.run=^TestServerInAChild$"},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	t.Cleanup(func() {
		if err := pager.Sweep(t.Context(), cfg.Dir); err != nil {
			t.Error(err)
		}
		if left := testkit.Mounts(t, cfg.Dir); len(left) > 0 {
			t.Errorf("still mounted: %q", left)
		}
	})
	return cfg
}

func open(t *testing.T, cfg pager.Config) *pager.Pager {
	t.Helper()
	p, err := pager.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// pid is the server's, as it is written down.
func pid(t *testing.T, cfg pager.Config) int {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(cfg.Dir, "pager.json"))
	if err != nil {
		t.Fatal(err)
	}
	rest, _ := strings.CutPrefix(string(data), `{"pid":`)
	n, err := strconv.Atoi(rest[:strings.IndexByte(rest, ',')])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// right reads a whole image past the page cache.
func right(t *testing.T, p *pager.Pager, n int) {
	t.Helper()
	f, err := p.File(strconv.Itoa(n))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // nothing was written
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, n*10_000)
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{byte(n)}, len(got))) {
		t.Errorf("image %d: %v", n, err)
	}
}

func TestKilledServerIsReplaced(t *testing.T) {
	cfg := config(t)
	p := open(t, cfg)
	held, err := p.File("7") // the kernel keeps what it knows of it
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = held.Close() }() // nothing was written
	for range 5 {
		before := pid(t, cfg)
		right(t, p, 7)
		right(t, p, 100)
		if err := unix.Kill(before, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		right(t, p, 7) // whoever asks meanwhile waits for the next
		testkit.Eventually(t, 10*time.Second, "another server", func() bool { return pid(t, cfg) != before })
	}
	if err := p.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestServerOutlivesItsHolder: the next one takes it over, and replaces it when it
// dies.
func TestServerOutlivesItsHolder(t *testing.T) {
	cfg := config(t)
	p := open(t, cfg)
	right(t, p, 3)
	before := pid(t, cfg)
	for range 2 {
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	p = open(t, cfg)
	if after := pid(t, cfg); after != before {
		t.Errorf("server %d became %d", before, after)
	}
	right(t, p, 3)
	if err := unix.Kill(before, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	right(t, p, 4)
	if err := p.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"pager.json", "images/3"} {
		if _, err := os.Stat(filepath.Join(cfg.Dir, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after Stop there is %s (%v)", name, err)
		}
	}
}

// TestBothAreGone: a new server on a new mount.
func TestBothAreGone(t *testing.T) {
	cfg := config(t)
	p := open(t, cfg)
	before := pid(t, cfg)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(before, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, 10*time.Second, "it is gone", func() bool {
		stat, err := kernel.StatProc(before)
		return err != nil || stat.State == 'Z'
	})
	p = open(t, cfg)
	right(t, p, 5)
	if err := p.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestKeeperInAChild is the keeper of another test.
func TestKeeperInAChild(t *testing.T) {
	if os.Getenv("PAGER_CHILD") == "" {
		return // it is another test's process
	}
	time.Sleep(time.Hour)
}

// keeperOf is who keeps, as it is written down.
func keeperOf(t *testing.T, cfg pager.Config) int {
	t.Helper()
	var state struct {
		Keeper struct {
			PID int `json:"pid"`
		} `json:"keeper"`
	}
	data, err := os.ReadFile(filepath.Join(cfg.Dir, "pager.json"))
	if err == nil {
		err = json.Unmarshal(data, &state)
	}
	if err != nil || state.Keeper.PID == 0 {
		t.Fatalf("%s: %v", data, err)
	}
	return state.Keeper.PID
}

func gone(t *testing.T, process int) {
	t.Helper()
	testkit.Eventually(t, 10*time.Second, "it is gone", func() bool {
		stat, err := kernel.StatProc(process)
		return err != nil || stat.State == 'Z'
	})
}

// TestAnyTwoOfThreeMayDie: who had a file open reads on from it.
func TestAnyTwoOfThreeMayDie(t *testing.T) {
	cfg := config(t)
	cfg.Keeper = []string{os.Args[0], "-test.run=^TestKeeperInAChild$"}
	p := open(t, cfg)
	held, err := p.File("150")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = held.Close() }() // nothing was written
	reads := func() {
		t.Helper()
		if err := unix.Fadvise(int(held.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1_500_000)
		if _, err := held.ReadAt(buf, 0); err != nil || bytes.Count(buf, []byte{150}) != len(buf) {
			t.Fatalf("reading on: %v", err)
		}
	}
	kill := func(who int) {
		t.Helper()
		if err := unix.Kill(who, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	reads()
	for range 2 { // the holder and the server
		server := pid(t, cfg)
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		kill(server)
		gone(t, server)
		p = open(t, cfg)
		reads()
	}
	server, keeper := pid(t, cfg), keeperOf(t, cfg)
	kill(keeper)
	kill(server)
	reads()
	testkit.Eventually(t, 10*time.Second, "another keeper", func() bool { return keeperOf(t, cfg) != keeper })
	keeper = keeperOf(t, cfg)
	if err := p.Close(); err != nil { // the holder and the keeper
		t.Fatal(err)
	}
	kill(keeper)
	gone(t, keeper)
	p = open(t, cfg)
	reads()
	server, keeper = pid(t, cfg), keeperOf(t, cfg)
	if err := p.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	gone(t, server)
	gone(t, keeper)
}

// TestProgramInAHome: its user may not come to where the program lies, and needs not.
func TestProgramInAHome(t *testing.T) {
	cfg := config(t)
	program := filepath.Join(t.TempDir(), "home", "program")
	data, err := os.ReadFile(os.Args[0])
	if err == nil {
		err = os.Mkdir(filepath.Dir(program), 0o700)
	}
	if err == nil {
		err = os.WriteFile(program, data, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	cfg.Command[0], cfg.Keeper = program, []string{program, "-test.run=^TestKeeperInAChild$"}
	cfg.UID, cfg.GID = 65533, 65533
	p := open(t, cfg)
	right(t, p, 3)
	if keeperOf(t, cfg) == 0 {
		t.Error("there is no keeper")
	}
	if err := p.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(program, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := pager.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), program+" has mode -rwx------") {
		t.Errorf("a program that nobody else may execute: %v", err)
	}
}

// TestServesWithoutItsKeeper: one that cannot be started is tried again and again,
// and nobody waits for it.
func TestServesWithoutItsKeeper(t *testing.T) {
	cfg := config(t)
	cfg.Keeper = []string{filepath.Join(t.TempDir(), "keeper")}
	p := open(t, cfg)
	right(t, p, 3)
	self, err := os.Executable()
	if err == nil {
		err = os.Symlink(self, cfg.Keeper[0])
	}
	if err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, 10*time.Second, "a keeper", func() bool {
		data, err := os.ReadFile(filepath.Join(cfg.Dir, "pager.json"))
		return err == nil && strings.Contains(string(data), "keeper")
	})
	if err := p.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestOpenFailsAt: who they are cannot be written down. Nothing is left of a server
// that was not; a keeper that was not is another's work.
func TestOpenFailsAt(t *testing.T) {
	for _, step := range []string{"create", "write", "fsync", "rename", "fsync-dir"} {
		for nth, of := range []string{"the server", "the keeper"} {
			t.Run(of+"/"+step, func(t *testing.T) {
				cfg := config(t)
				cfg.Keeper = []string{os.Args[0], "-test.run=^TestKeeperInAChild$"}
				defer fault.Set("osfs/pager-state/"+step, fault.Nth(nth+1, fault.Fail))()
				p, err := pager.Open(t.Context(), cfg)
				if nth == 0 {
					if !errors.Is(err, fault.ErrInjected) {
						t.Fatalf("it is %v", err)
					}
					if left := testkit.Mounts(t, cfg.Dir); len(left) > 0 {
						t.Errorf("still mounted: %q", left)
					}
					p = open(t, cfg)
				} else if err != nil {
					t.Fatal(err)
				}
				right(t, p, 5)
				testkit.Eventually(t, 10*time.Second, "a keeper", func() bool {
					data, err := os.ReadFile(filepath.Join(cfg.Dir, "pager.json"))
					return err == nil && strings.Contains(string(data), "keeper")
				})
				server, keeper := pid(t, cfg), keeperOf(t, cfg)
				if err := p.Stop(t.Context()); err != nil {
					t.Error(err)
				}
				gone(t, server)
				gone(t, keeper)
			})
		}
	}
}

func TestDamageIsTold(t *testing.T) {
	cfg := config(t)
	p := open(t, cfg)
	defer func() { _ = p.Close() }() // the server is swept
	name := strconv.Itoa(bad)
	f, err := p.File(name)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // read only
	right(t, p, 7)
	if p.Damaged(name) || p.Damaged("7") || p.Damaged("none") {
		t.Error("damage is told before it was met")
	}
	if _, err := f.ReadAt(make([]byte, 4096), 1<<20); !errors.Is(err, unix.EIO) {
		t.Errorf("reading what cannot be read: %v", err)
	}
	if !p.Damaged(name) || p.Damaged("7") {
		t.Errorf("damage is told of the one: %v, of another: %v", p.Damaged(name), p.Damaged("7"))
	}
}

func TestFilesAreClosedWhenForgotten(t *testing.T) {
	s := &source{}
	f := pager.NewFiles(s, slog.New(slog.DiscardHandler))
	node, size, err := f.Resolve("9")
	if err != nil || size != 90_000 {
		t.Fatal(size, err)
	}
	buf := make([]byte, 100)
	if err := f.ReadAt(node, buf, 50); err != nil || buf[0] != 9 {
		t.Errorf("%v, %v", buf[0], err)
	}
	f.Forget(node)
	if s.opened.Load() != 1 || s.closed.Load() != 1 {
		t.Errorf("opened %d, closed %d", s.opened.Load(), s.closed.Load())
	}
	if err := f.ReadAt(node, buf, 89_900); err != nil { // a read that had been on its way
		t.Error(err)
	}
	if err := f.ReadAt(node, buf, 89_901); err == nil {
		t.Error("a read behind the end: no error")
	}
	if _, _, err := f.Resolve("nothing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a name that is none: %v", err)
	}
	// Another server knows the node by its name alone.
	other := pager.NewFiles(s, slog.New(slog.DiscardHandler))
	if got, err := other.Size(node); err != nil || got != size {
		t.Errorf("%d, %v", got, err)
	}
	if _, err := other.Size(1 << 62); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a node that is none: %v", err)
	}
	if err := errors.Join(f.Close(), other.Close()); err != nil || s.opened.Load() != s.closed.Load() {
		t.Errorf("opened %d, closed %d, %v", s.opened.Load(), s.closed.Load(), err)
	}
}
