package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/disk/qcow"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/pager"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// pagerUID runs the page server, vmmUID a VMM.
const pagerUID, vmmUID = 65533, 65531

// pages is a snapshot store with a page server over it, in a process of its own
// that has no rights but those of its group.
type pages struct {
	t      *testing.T
	dir    string
	store  *snapshot.Store
	server *pager.Pager
	digest snapshot.Digest
	want   []byte // the image's
}

const pageBlocks = 3000

func newPages(t *testing.T) *pages {
	t.Helper()
	testkit.Root(t)
	if err := kernel.FUSE(); err != nil {
		testkit.Require(t, "fuse", false, err.Error())
	}
	dir, err := os.MkdirTemp("", "pages-") // t.TempDir is inside a folder that only we may pass
	if err != nil {
		t.Fatal(err)
	}
	p := &pages{t: t, dir: dir}
	t.Cleanup(func() {
		if err := errors.Join(pager.Sweep(context.Background(), p.runDir()), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if p.store, err = snapshot.Open(snapshot.Config{Dir: filepath.Join(dir, "store"), Group: pagerUID}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.store.Close(); err != nil {
			t.Error(err)
		}
	})
	p.fill()
	p.start()
	return p
}

func (p *pages) runDir() string { return filepath.Join(p.dir, "run") }

// fill publishes an image of two generations, zeros among it.
func (p *pages) fill() {
	p.t.Helper()
	p.want = make([]byte, pageBlocks*snapshot.BlockBytes)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(p.want) // it never fails
	clear(p.want[100*snapshot.BlockBytes : 900*snapshot.BlockBytes])
	b, err := p.store.First(snapshot.Memory, pageBlocks)
	p.must(err, b.Put(p.t.Context(), 0, p.want))
	first, err := b.Publish(p.t.Context())
	p.must(err)
	image, err := p.store.Image(first.Digest)
	p.must(err)
	clear(p.want[2000*snapshot.BlockBytes : 2001*snapshot.BlockBytes])
	_, _ = rng.Read(p.want[500*snapshot.BlockBytes : 510*snapshot.BlockBytes])
	b = p.store.Next(image)
	p.must(b.Put(p.t.Context(), 0, p.want))
	next, err := b.Publish(p.t.Context())
	p.must(err, image.Close())
	p.digest = next.Digest
}

func (p *pages) start() {
	p.t.Helper()
	p.t.Setenv(asCommand, "1")
	server, err := pager.Open(p.t.Context(), pager.Config{
		Dir: p.runDir(), UID: pagerUID, GID: pagerUID,
		// The test's program is in a folder of root's.
		Command: []string{"/proc/self/exe", "pager", "--store", filepath.Join(p.dir, "store")},
		Log:     slog.New(slog.NewTextHandler(p.t.Output(), nil)),
	})
	p.must(err)
	p.server = server
	p.t.Cleanup(func() {
		if err := server.Stop(context.Background()); err != nil {
			p.t.Error(err)
		}
	})
}

func (p *pages) must(errs ...error) {
	p.t.Helper()
	if err := errors.Join(errs...); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pages) pid() int {
	p.t.Helper()
	data, err := os.ReadFile(filepath.Join(p.runDir(), "pager.json"))
	var state struct{ PID int }
	p.must(err, json.Unmarshal(data, &state))
	return state.PID
}

func (p *pages) log() string {
	data, err := os.ReadFile(filepath.Join(p.runDir(), "pager.log"))
	p.must(err)
	return string(data)
}

// read reads bytes of the image past the page cache.
func (p *pages) read(f *os.File, off int64, n int) ([]byte, error) {
	got := make([]byte, n)
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return nil, err
	}
	_, err := f.ReadAt(got, off)
	return got, err
}

func TestPagerServesImagesByDigest(t *testing.T) {
	p := newPages(t)
	f, err := p.server.File(p.digest.String())
	p.must(err)
	defer func() { _ = f.Close() }() // nothing was written
	info, err := f.Stat()
	p.must(err)
	got, err := p.read(f, 0, len(p.want))
	if err != nil || info.Size() != int64(len(p.want)) || !bytes.Equal(got, p.want) {
		t.Errorf("%d bytes that are not the image: %v", info.Size(), err)
	}
	for _, name := range []string{
		"nothing", "0", p.digest.String()[1:], p.digest.String() + "0", strings.ToUpper(p.digest.String()), p.digest.String() + "-4096",
		snapshot.DigestOf([]byte("nothing")).String(), "." + p.digest.String(), strings.Repeat("0", 64), strings.Repeat("a", 255),
	} {
		if f, err := os.Open(p.server.Path(name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v, %v", name, f, err)
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid()))
	p.must(err)
	for _, line := range []string{"Uid:\t65533\t65533\t65533\t65533", "Gid:\t65533\t65533\t65533\t65533", "CapEff:\t0000000000000000"} {
		if !strings.Contains(string(status), line) {
			t.Errorf("the server's status has no %q", line)
		}
	}
	if strings.Contains(p.log(), "not served") {
		t.Errorf("a wrong name is no failure: %s", p.log())
	}
}

// TestPagerLetsVMMsIn, which open the bases of their disks by path, and list nothing.
func TestPagerLetsVMMsIn(t *testing.T) {
	p := newPages(t)
	as := func(line ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), line[0], line[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: vmmUID, Gid: vmmUID}}
		cmd.Dir = "/"
		out, err := cmd.Output()
		return string(out), err
	}
	if out, err := as("cat", p.server.Path(p.digest.String())); err != nil || out != string(p.want) {
		t.Errorf("%d bytes, %v", len(out), err)
	}
	if out, err := as("ls", "-A", filepath.Dir(p.server.Path("x"))); err != nil || out != "" {
		t.Errorf("the folder lists %q, %v", out, err)
	}
	for _, path := range []string{p.runDir(), filepath.Join(p.runDir(), "pager.json"), filepath.Join(p.runDir(), "pager.log"), filepath.Join(p.dir, "store")} {
		if out, err := as("sh", "-c", `ls "$0" && cat "$0"`, path); err == nil {
			t.Errorf("%s: %q", path, out)
		}
	}
}

// TestKilledPagerIsReplaced while many read: every byte is right, and nobody sees
// an error.
func TestKilledPagerIsReplaced(t *testing.T) {
	p := newPages(t)
	var stop atomic.Bool
	var reads atomic.Int64
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			f, err := p.server.File(p.digest.String())
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = f.Close() }() // nothing was written
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for !stop.Load() {
				off, n := rng.Int64N(int64(len(p.want)-200_000)), 1+rng.IntN(200_000)
				got, err := p.read(f, off, n)
				if err != nil || !bytes.Equal(got, p.want[off:][:n]) {
					t.Errorf("%d bytes at %d: wrong (%v)", n, off, err)
					return
				}
				reads.Add(1)
			}
		})
	}
	for range 10 {
		before, victim := reads.Load(), p.pid()
		testkit.Eventually(t, 20*time.Second, "pages are read", func() bool { return reads.Load() > before+10 || t.Failed() })
		if err := unix.Kill(victim, unix.SIGKILL); err != nil {
			t.Error(err)
			break
		}
		testkit.Eventually(t, 20*time.Second, "another server", func() bool { return p.pid() != victim })
	}
	stop.Store(true)
	wg.Wait()
	if strings.Contains(p.log(), "not served") {
		t.Error(p.log())
	}
}

// TestFlippedBitIsAnError for who reads that chunk, with the file and the place in
// the log, and for nobody else.
func TestFlippedBitIsAnError(t *testing.T) {
	p := newPages(t)
	m, err := p.store.Manifest(p.digest)
	p.must(err)
	at := m.Find(1500)
	layer := p.store.LayerPath(m.Layers[at.Layer].Digest)
	place := (at.Offset + 1500 - at.Start) * snapshot.BlockBytes
	p.flip(layer, place+100)
	f, err := p.server.File(p.digest.String())
	p.must(err)
	defer func() { _ = f.Close() }() // nothing was written
	if _, err := p.read(f, 1500*snapshot.BlockBytes, 10); !errors.Is(err, syscall.EIO) {
		t.Errorf("the flipped bit: %v", err)
	}
	if got, err := p.read(f, 2500*snapshot.BlockBytes, 1000); err != nil || !bytes.Equal(got, p.want[2500*snapshot.BlockBytes:][:1000]) {
		t.Errorf("another chunk: %v", err)
	}
	chunk := place / (64 << 10) * (64 << 10)
	for _, want := range []string{"not served", "image=" + p.digest.String(), filepath.Base(layer), fmt.Sprintf("from byte %d on are not what was written", chunk)} {
		if !strings.Contains(p.log(), want) {
			t.Errorf("the log has no %q: %s", want, p.log())
		}
	}
}

func (p *pages) flip(path string, off int64) {
	p.t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	p.must(err)
	b := make([]byte, 1)
	_, err = f.ReadAt(b, off)
	p.must(err)
	b[0] ^= 4
	_, err = f.WriteAt(b, off)
	p.must(err, f.Close())
}

// TestDamagedImagesAreNotMissing: what is damaged is an I/O error with its cause in
// the log, and not a name that there never was.
func TestDamagedImagesAreNotMissing(t *testing.T) {
	for name, damage := range map[string]func(p *pages, m *snapshot.Manifest) (path string){
		"a missing layer": func(p *pages, m *snapshot.Manifest) string {
			path := p.store.LayerPath(m.Layers[0].Digest)
			p.must(os.Remove(path))
			return path
		},
		"a layer that is cut short": func(p *pages, m *snapshot.Manifest) string {
			path := p.store.LayerPath(m.Layers[1].Digest)
			p.must(os.Truncate(path, 5000))
			return path
		},
		"a damaged manifest": func(p *pages, _ *snapshot.Manifest) string {
			path := filepath.Join(p.dir, "store", "manifests", p.digest.String()+".manifest")
			p.flip(path, 100)
			return path
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPages(t)
			m, err := p.store.Manifest(p.digest)
			p.must(err)
			path := damage(p, m)
			if f, err := os.Open(p.server.Path(p.digest.String())); !errors.Is(err, syscall.EIO) {
				t.Errorf("%v, %v", f, err)
			}
			stem := strings.Split(filepath.Base(path), ".")[0]
			if log := p.log(); !strings.Contains(log, "not served") || !strings.Contains(log, stem) {
				t.Errorf("the log does not name %s: %s", path, log)
			}
		})
	}
}

// TestDisksLieOnImages: a qcow2 overlay over an image, larger than that, which a VMM
// opens as a user of its own; the server is killed meanwhile.
func TestDisksLieOnImages(t *testing.T) {
	testkit.Tool(t, "qemu-img")
	testkit.Tool(t, "qemu-io")
	p := newPages(t)
	driver, err := qcow.New(qcow.Config{})
	p.must(err)
	config := disk.Config{
		Dir: filepath.Join(p.dir, "disk"), Base: p.server.Path(p.digest.String()), SizeBytes: 64 << 20, UID: vmmUID, GID: vmmUID,
	}
	p.must(os.Mkdir(config.Dir, 0o700))
	d, err := driver.Create(t.Context(), config)
	p.must(err)
	vmm := func(command string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "qemu-io", "-f", d.Format(), "-c", command, d.Path())
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: vmmUID, Gid: vmmUID}}
		cmd.Dir = "/"
		if out, err := cmd.CombinedOutput(); err != nil || strings.Contains(string(out), "failed") {
			t.Errorf("qemu-io %s: %v: %s", command, err, out)
		}
	}
	want := append(bytes.Clone(p.want), make([]byte, config.SizeBytes-int64(len(p.want)))...)
	write := func(block, count int, value byte) {
		t.Helper()
		vmm(fmt.Sprintf("write -P %d %d %d", value, block*snapshot.BlockBytes, count*snapshot.BlockBytes))
		copy(want[block*snapshot.BlockBytes:], bytes.Repeat([]byte{value}, count*snapshot.BlockBytes))
	}
	check := func(c disk.Changes, want []byte, runs []disk.BlockRun) {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := c.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) || !slices.Equal(c.Runs(), runs) {
			t.Errorf("%v have changed, want %v (%v)", c.Runs(), runs, err)
		}
		p.must(c.Close())
	}
	write(1500, 3, 7)
	write(9000, 1, 8) // behind the image's end
	p.must(unix.Kill(p.pid(), unix.SIGKILL))
	vmm(fmt.Sprintf("read -P 8 %d 4096", 9000*snapshot.BlockBytes))
	then := bytes.Clone(want)
	before, err := d.Next(t.Context(), func(context.Context, string) error { return nil })
	p.must(err)
	write(1501, 1, 9)
	check(before, then, []disk.BlockRun{{Start: 1500, Blocks: 3}, {Start: 9000, Blocks: 1}})
	d, err = driver.Restore(t.Context(), config)
	p.must(err)
	now, err := d.Changed(t.Context())
	p.must(err)
	check(now, want, []disk.BlockRun{{Start: 1500, Blocks: 3}, {Start: 9000, Blocks: 1}})
	p.must(d.Remove(t.Context()))
}

func TestPagerIsNotStartedByHand(t *testing.T) {
	for want, line := range map[string][]string{
		"--store is missing":    {"pager"},
		"started by the server": {"pager", "--store", t.TempDir()},
	} {
		cmd := process(t, line...)
		out, err := cmd.CombinedOutput()
		if statusOf(t, err) == 0 || !strings.Contains(string(out), want) {
			t.Errorf("%v: %v, %q", line, err, out)
		}
	}
}
