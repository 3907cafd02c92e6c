package qemu_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
	"github.com/dormouse-sandbox/dormouse/vmm/qemu"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmtest"
)

// memoryOf copies all of a frozen VM's memory to a file that its user can open as
// QEMU wants to.
func memoryOf(t *testing.T, m vmm.Machine, s vmm.Spec) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // it was read
	all := make([]byte, s.MemMiB<<20)
	if err := m.ReadMemory(all, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(all); err != nil {
		t.Fatal(err)
	}
	if err := f.Chmod(0o666); err != nil {
		t.Fatal(err)
	}
	return f
}

// saveAll saves a frozen VM.
func saveAll(t *testing.T, d *qemu.Driver, m vmm.Machine, s vmm.Spec) *vmm.Restore {
	t.Helper()
	devices, err := m.Save(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return &vmm.Restore{Memory: memoryOf(t, m, s), Devices: devices, Compat: d.Capabilities().Compat}
}

func again(t *testing.T, d *qemu.Driver, s vmm.Spec, from *vmm.Restore) vmm.Machine {
	t.Helper()
	s.ID, s.Dir, s.Restore = sandbox.NewID(), shortDir(t), from
	s.Kernel, s.Initrd = "/nowhere", "/nowhere" // they are in its memory
	m, err := d.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(m.Kill(t.Context()), m.Release()) }) // it may be adopted, or gone
	return m
}

func do(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// onward waits until the guest has written and read its disk some times more.
func onward(t *testing.T, m vmm.Machine) {
	t.Helper()
	count := func() int {
		data, _, err := m.Console(0, 1<<20)
		do(t, err)
		if i := bytes.Index(data, []byte("DISK-WRONG")); i >= 0 {
			t.Fatalf("the guest says: %.200s", data[i:])
		}
		return bytes.Count(data, []byte("DISK-RIGHT"))
	}
	want := count() + 2
	testkit.Eventually(t, time.Minute, "on with its disk", func() bool { return count() >= want })
}

// TestTheDiskIsSwitchedWhileTheGuestStandsStill: what was written before stays in
// the overlay that was written to, for others to read, and the guest, which looks
// at every block, notices nothing; nor when it is saved and restored on the new
// overlay, with a network, and when an agent that did not start it switches.
func TestTheDiskIsSwitchedWhileTheGuestStandsStill(t *testing.T) {
	if testkit.Accelerator() != "tcg" {
		testkit.Long(t, "half a minute where KVM is emulated")
	}
	testkit.Root(t)
	testkit.Tool(t, "ip")
	testkit.Tool(t, "qemu-img")
	d, s := driver(t), spec(t, "disk", virtioModules(t))
	s.UID, s.GID = vmUser, vmUser
	s.DiskPath, s.DiskFormat = overlay(t), "qcow2"
	s.NetNS = namespace(t)
	s.Tap, s.MAC = tapIn(t, s.NetNS), guestMAC
	m := boot(t, d, s, "DISK-RIGHT")
	do(t, m.Freeze(t.Context()))
	if err := m.SwitchDisk(t.Context(), s.DiskPath+"-missing"); err == nil {
		t.Error("it was switched to a file that is not there")
	}
	if err := m.SwitchDisk(t.Context(), s.DiskPath); err == nil {
		t.Error("it was switched to the overlay that it has")
	}
	do(t, m.Thaw(t.Context()))
	old := s.DiskPath
	for i := range 3 {
		onward(t, m)
		do(t, m.Freeze(t.Context()))
		if i == 1 {
			record := m.Record()
			do(t, m.Release())
			var err error
			m, err = d.Adopt(t.Context(), record)
			do(t, err)
		}
		next := over(t, old, i)
		do(t, m.SwitchDisk(t.Context(), next))
		before := readFile(t, old)
		if i == 2 {
			from := saveAll(t, d, m, s)
			do(t, m.Kill(t.Context()))
			do(t, m.Release())
			s.DiskPath = next
			m = again(t, d, s, from)
		}
		do(t, m.Thaw(t.Context()))
		onward(t, m)
		run(t, "qemu-img", "check", "-q", old) // takes the lock that a writer would hold
		if readFile(t, old) != before {
			t.Errorf("switch %d: the overlay from before was written to", i)
		}
		old = next
	}
	do(t, m.Kill(t.Context()))
	do(t, m.Release())
	out, err := exec.Command("qemu-img", "info", "--backing-chain", old).CombinedOutput()
	if err != nil || bytes.Count(out, []byte("\nfile format: qcow2")) != 4 {
		t.Errorf("%v: %s", err, out)
	}
}

// over is an empty overlay over another.
func over(t *testing.T, backing string, n int) string {
	t.Helper()
	path := filepath.Join(filepath.Dir(backing), "next-"+strconv.Itoa(n))
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=128k,extended_l2=on", "-F", "qcow2", "-b", backing, path)
	do(t, os.Chown(path, vmUser, vmUser))
	return path
}

// TestEveryStepOfASaveFailsOnce: the VM goes on, and is saved all the same later;
// a restore that fails leaves nothing, and can be tried again.
func TestEveryStepOfASaveFailsOnce(t *testing.T) {
	if !fault.Enabled {
		t.Skip("a release has no failpoints")
	}
	if testkit.Accelerator() != "tcg" {
		testkit.Long(t, "they fail in our part, whatever the accelerator is")
	}
	d, s := driver(t), spec(t, string(vmmtest.Remember), nil)
	m := boot(t, d, s, vmmtest.Remembers)
	do(t, m.Freeze(t.Context()))
	failing := func(point string, what func() error) {
		t.Helper()
		undo := fault.Set(point, fault.Fail)
		err := what()
		undo()
		if !errors.Is(err, fault.ErrInjected) {
			t.Errorf("with a fault at %s: %v", point, err)
		}
	}
	for _, point := range []string{"qemu/save", "qemu/save-to"} {
		failing(point, func() error { _, err := m.Save(t.Context()); return err })
	}
	failing("qemu/switch-disk", func() error { return m.SwitchDisk(t.Context(), "/nowhere") })
	from := saveAll(t, d, m, s)
	for range 5 {
		do(t, m.Thaw(t.Context()))
		do(t, m.Freeze(t.Context()))
		if _, err := m.Save(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	do(t, m.Thaw(t.Context()))
	if left := savedTo(t, m.Record().PID); left > 0 {
		t.Errorf("QEMU keeps %d descriptors that it was saved to", left)
	}
	for _, point := range []string{"qemu/load", "qemu/load-from"} {
		failing(point, func() error {
			fresh := s
			fresh.ID, fresh.Dir, fresh.Restore = sandbox.NewID(), shortDir(t), from
			_, err := d.Start(t.Context(), fresh)
			if entries, _ := os.ReadDir(fresh.Dir); len(entries) > 0 {
				t.Errorf("left behind: %v", entries)
			}
			return err
		})
	}
	broken := *from
	broken.Devices = cut(t, from.Devices)
	fresh := s
	fresh.ID, fresh.Dir, fresh.Restore = sandbox.NewID(), shortDir(t), &broken
	if _, err := d.Start(t.Context(), fresh); err == nil || !strings.Contains(err.Error(), "load of migration failed") {
		t.Errorf("what QEMU does not take: %v", err)
	}
	if entries, _ := os.ReadDir(fresh.Dir); len(entries) > 0 {
		t.Errorf("left behind: %v", entries)
	}
	restored := again(t, d, s, from)
	do(t, restored.Thaw(t.Context()))
	await(t, restored, vmmtest.Remembers)
}

// cut leaves half of QEMU's stream out of a saved state.
func cut(t *testing.T, devices []byte) []byte {
	t.Helper()
	at := bytes.IndexByte(devices, '}') + 2
	r, err := gzip.NewReader(bytes.NewReader(devices[at:]))
	do(t, err)
	stream, err := io.ReadAll(r)
	do(t, err)
	out := bytes.NewBuffer(bytes.Clone(devices[:at]))
	w := gzip.NewWriter(out)
	_, err = w.Write(stream[:len(stream)/2])
	do(t, errors.Join(err, w.Close()))
	return out.Bytes()
}

// savedTo counts the descriptors that a process has of memory files.
func savedTo(t *testing.T, pid int) (n int) {
	t.Helper()
	dir := "/proc/" + strconv.Itoa(pid) + "/fd/"
	entries, err := os.ReadDir(dir)
	do(t, err)
	for _, e := range entries {
		if target, err := os.Readlink(dir + e.Name()); err == nil && strings.HasPrefix(target, "/memfd:qemu-save") {
			n++
		}
	}
	return n
}

// TestMuchMemory has more than 3 GiB, which lie on both sides of a hole in the
// guest's address space.
func TestMuchMemory(t *testing.T) {
	testkit.Long(t, "3.2 GiB are compared page by page, several times")
	const hole = 3 << 30 / vmm.PageSize
	image, initrd := kernelImage(t), initramfs(t, nil)
	below, above := int64(0), int64(0)
	vmmtest.Generations(t, vmmtest.Harness{
		Driver: func(t *testing.T) vmm.Driver { return driver(t) },
		Spec: func(t *testing.T, _ vmmtest.Guest) vmm.Spec {
			return vmm.Spec{
				ID: sandbox.NewID(), VCPUs: 1, MemMiB: 3072 + 128, Kernel: image, Initrd: initrd, Dir: shortDir(t),
				Cmdline: "test.do=remember-much", UID: testUser(), GID: testUser(),
			}
		},
		BootLimit: 3 * time.Minute, Alive: alive, Generations: 3,
		Memory: func(t *testing.T, flat string, runs []vmm.PageRun) *os.File {
			for _, r := range runs {
				below += min(r.Start+r.Pages, hole) - min(r.Start, hole)
				above += max(r.Start+r.Pages, hole) - max(r.Start, hole)
			}
			f, err := os.Open(flat)
			do(t, err)
			t.Cleanup(func() { _ = f.Close() }) // read only
			return f
		},
	})
	if t.Logf("changed pages below the hole: %d, above: %d", below, above); below < 1000 || above < 1000 {
		t.Error("the guest did not use both sides of the hole")
	}
}
