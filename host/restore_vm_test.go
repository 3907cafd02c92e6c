package host_test

import (
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/pager"
	"github.com/dormouse-sandbox/dormouse/pager/fuse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
	"github.com/dormouse-sandbox/dormouse/vmm"
	"github.com/dormouse-sandbox/dormouse/vmm/qemu"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmtest"
)

// These tests put three mechanisms together that know nothing of one another: a VM
// is saved into snapshots, which a page server composes, from which it is restored.

const (
	storeOfChild = "RESTORE_TEST_STORE"
	restoreUser  = 65533 // the VMs' own
)

// published serves the images of a store by their digests.
type published struct{ reader *snapshot.Reader }

type publishedImage struct{ *snapshot.Image }

func (i publishedImage) Bytes() int64 { return i.Manifest().Bytes() }

func (p published) Open(name string) (pager.Image, error) {
	digest, err := snapshot.ParseDigest(name)
	if err != nil {
		return nil, fs.ErrNotExist
	}
	image, err := p.reader.Image(digest)
	if err != nil {
		return nil, err
	}
	return publishedImage{image}, nil
}

func (p published) Names() ([]string, error) {
	digests, err := p.reader.Manifests()
	var names []string
	for _, d := range digests {
		names = append(names, d.String())
	}
	return names, err
}

// TestPagerInAChild is the page server of the tests below.
func TestPagerInAChild(t *testing.T) {
	dir := os.Getenv(storeOfChild)
	if dir == "" {
		return // it is another test's process
	}
	files := pager.NewFiles(published{snapshot.NewReader(dir)}, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err := fuse.Serve(os.NewFile(pager.DeviceFD, "fuse"), os.NewFile(pager.SlotsFD, "slots"), files); err != nil {
		t.Fatal(err)
	}
}

// keeper saves memories into snapshots.
type keeper struct {
	dir    string
	store  *snapshot.Store
	pager  *pager.Pager
	newest *snapshot.Pin
}

func newKeeper(t *testing.T) *keeper {
	t.Helper()
	testkit.Root(t)
	testkit.Tool(t, "qemu-system-x86_64")
	if err := kernel.FUSE(); err != nil {
		testkit.Require(t, "fuse", false, err.Error())
	}
	k := &keeper{dir: t.TempDir()}
	var err error
	if k.store, err = snapshot.Open(snapshot.Config{Dir: k.dir}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.store.Close() }) // a temporary one
	t.Setenv(storeOfChild, k.dir)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cfg := pager.Config{
		Dir: filepath.Join(t.TempDir(), "p"), Command: []string{self, "-test.run=^TestPagerInAChild$"},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	if k.pager, err = pager.Open(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.pager.Close(); err != nil {
			t.Error(err)
		}
		if err := pager.Sweep(t.Context(), cfg.Dir); err != nil {
			t.Error(err)
		}
	})
	return k
}

// keep publishes what a flat file has where it differs from the newest image, and
// opens it where the page server composes it.
func (k *keeper) keep(t *testing.T, flat string, runs []vmm.PageRun) *os.File {
	t.Helper()
	f, err := os.Open(flat)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // read only
	b, done := k.builder(t, f)
	defer done()
	for _, r := range runs {
		data := make([]byte, r.Pages*vmm.PageSize)
		if _, err := f.ReadAt(data, r.Start*vmm.PageSize); err != nil {
			t.Fatal(err)
		}
		if err := b.Put(t.Context(), r.Start, data); err != nil {
			t.Fatal(err)
		}
	}
	pin, err := b.Publish(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", b.Stats())
	k.newest = pin
	served, err := k.pager.File(pin.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = served.Close() }) // read only
	return served
}

// builder begins the next generation.
func (k *keeper) builder(t *testing.T, flat *os.File) (*snapshot.Builder, func()) {
	t.Helper()
	if k.newest == nil {
		info, err := flat.Stat()
		if err != nil {
			t.Fatal(err)
		}
		b, err := k.store.First(snapshot.Memory, info.Size()/snapshot.BlockBytes)
		if err != nil {
			t.Fatal(err)
		}
		return b, func() {}
	}
	parent, err := k.store.Image(k.newest.Digest)
	if err != nil {
		t.Fatal(err)
	}
	return k.store.Next(parent), func() { _ = parent.Close() } // read only
}

// restoreGuest is an initramfs with the guest that knows what is in its memory.
func restoreGuest(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "init")
	if err := testkit.Program("../vmm/qemu/testdata/init", program); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := cpio.NewWriter(&out)
	err = w.WriteHeader(&cpio.Header{Name: "init", Mode: cpio.TypeReg | 0o755, Size: int64(len(data))})
	if _, err2 := w.Write(data); errors.Join(err, err2, w.Close()) != nil {
		t.Fatal(err, err2)
	}
	path := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func restoreHarness(t *testing.T, k *keeper) vmmtest.Harness {
	t.Helper()
	kernelImage, initrd := testkit.Asset(t, "vmlinuz"), restoreGuest(t)
	return vmmtest.Harness{
		Driver: func(t *testing.T) vmm.Driver {
			d, err := qemu.New(qemu.Config{Accelerator: testkit.Accelerator(), Reason: "the test says so"})
			if err != nil {
				t.Fatal(err)
			}
			return d
		},
		Spec: func(t *testing.T, g vmmtest.Guest) vmm.Spec {
			dir, err := os.MkdirTemp("", "vm-")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a temporary file may stay
			return vmm.Spec{
				ID: sandbox.NewID(), VCPUs: 1, MemMiB: 128, Kernel: kernelImage, Initrd: initrd, Dir: dir,
				Cmdline: "test.do=" + string(g), UID: restoreUser, GID: restoreUser,
			}
		},
		BootLimit: time.Minute, Generations: 8, Memory: k.keep,
		Alive: func(_ *testing.T, r vmm.Record) bool {
			p, err := kernel.StatProc(r.PID)
			return err == nil && p.StartTime == r.StartTime && p.State != 'Z'
		},
		KillOutside: func(t *testing.T, m vmm.Machine) {
			if err := syscall.Kill(m.Record().PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		},
	}
}

// TestMemoryIsTrueThroughSnapshots: every page, in every generation, from inside
// and from outside.
func TestMemoryIsTrueThroughSnapshots(t *testing.T) {
	notInALab(t) // where the conformance suite goes through generations
	k := newKeeper(t)
	h := restoreHarness(t, k)
	if testkit.Accelerator() != "tcg" { // a lab
		h.Generations = 3
	}
	vmmtest.Generations(t, h)
}

// TestADamagedPageEndsTheVM, and no other byte is given for it.
func TestADamagedPageEndsTheVM(t *testing.T) {
	notInALab(t)
	k := newKeeper(t)
	h := restoreHarness(t, k)
	d, spec := h.Driver(t), h.Spec(t, vmmtest.Remember)
	vm, err := d.Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = errors.Join(vm.Kill(t.Context()), vm.Release()) }() // it has served
	waitFor(t, vm, vmmtest.Remembers)
	if err := vm.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	flat := filepath.Join(t.TempDir(), "flat")
	all := make([]byte, spec.MemMiB<<20)
	if err := vm.ReadMemory(all, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(flat, all, 0o600); err != nil {
		t.Fatal(err)
	}
	devices, err := vm.Save(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	memory := k.keep(t, flat, []vmm.PageRun{{Pages: int64(spec.MemMiB) << 8}})
	k.damage(t)
	spec.ID, spec.Dir = sandbox.NewID(), h.Spec(t, vmmtest.Remember).Dir
	spec.Restore = &vmm.Restore{Memory: memory, Devices: devices, Compat: d.Capabilities().Compat}
	restored, err := d.Start(t.Context(), spec)
	if err != nil {
		if !strings.Contains(err.Error(), "a page of the guest's saved memory could not be read") {
			t.Errorf("the start failed otherwise: %v", err)
		}
		return
	}
	defer func() { _ = errors.Join(restored.Kill(t.Context()), restored.Release()) }() // it ends by itself
	if err := restored.Thaw(t.Context()); err != nil {
		t.Logf("thaw: %v", err) // it may be gone by then
	}
	if testkit.Accelerator() != "tcg" {
		standsStill(t, restored)
		return
	}
	select {
	case <-restored.Done():
	case <-time.After(time.Minute):
		t.Fatal("it still runs")
	}
	if exit := restored.Exit(); exit.Cause != sandbox.CausePagerFault {
		t.Errorf("exit: %+v", exit)
	}
}

// standsStill is what KVM makes of a page that cannot be read: it lets the virtual
// processor halt, and starts to read anew, for ever. QEMU does not learn of it.
func standsStill(t *testing.T, vm vmm.Machine) {
	t.Helper()
	var before, after []byte
	testkit.Eventually(t, time.Minute, "standing still", func() bool {
		before, _, _ = vm.Console(0, 1<<20) // it may be gone, which is better
		time.Sleep(3 * time.Second)         // that nothing happens has no condition to wait for
		after, _, _ = vm.Console(0, 1<<20)
		return len(before) == len(after)
	})
	if bytes.Contains(after, []byte(vmmtest.Forgot)) {
		t.Errorf("the guest was given other bytes: %.200q", after)
	}
}

// damage flips bits all over every layer.
func (k *keeper) damage(t *testing.T) {
	t.Helper()
	reader := snapshot.NewReader(k.dir)
	image, err := reader.Image(k.newest.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = image.Close() }() // read only
	for _, l := range image.Manifest().Layers {
		path := reader.LayerPath(l.Digest)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for at := len(data) / 4; at < len(data)*3/4; at += 10_000 {
			data[at] ^= 4
		}
		if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, data, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
}

func waitFor(t *testing.T, vm vmm.Machine, want string) {
	t.Helper()
	testkit.Eventually(t, time.Minute, "on the console: "+want, func() bool {
		data, _, err := vm.Console(0, 1<<20)
		return err == nil && bytes.Contains(data, []byte(want))
	})
}
