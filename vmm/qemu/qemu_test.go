package qemu_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
	"github.com/dormouse-sandbox/dormouse/vmm/qemu"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmtest"
)

// consoleKeep is less in a lab, where a byte on a console is an exit out of two VMs.
var consoleKeep = func() int64 {
	if testkit.Accelerator() != "tcg" {
		return 16 << 10
	}
	return 64 << 10
}()

// vmUser runs the VMs of these tests: nobody's uid.
const vmUser = 65533

func TestConformance(t *testing.T) {
	image, initrd := kernelImage(t), initramfs(t, nil)
	boots, lives := 5, 8
	if testkit.Accelerator() != "tcg" { // a lab, where KVM is emulated
		boots, lives = 2, 3
	}
	if testkit.IsLong() {
		boots = 44 // as many as it takes to see a boot that hangs most of the time
	}
	vmmtest.Run(t, func(t *testing.T) vmmtest.Harness {
		return vmmtest.Harness{
			Driver: func(t *testing.T) vmm.Driver { return driver(t) },
			Spec: func(t *testing.T, g vmmtest.Guest) vmm.Spec {
				return vmm.Spec{
					ID: sandbox.NewID(), VCPUs: 1, MemMiB: 128, Kernel: image, Initrd: initrd, Dir: shortDir(t),
					Cmdline: "test.do=" + string(g), UID: testUser(), GID: testUser(),
				}
			},
			BootLimit:   time.Minute,
			ConsoleKeep: int(consoleKeep),
			ConsoleDisk: func(t *testing.T, r vmm.Record) int64 { return blocks(t, filepath.Join(r.Dir, "console.log")) },
			Boots:       boots,
			MayHang:     probed(t).Accelerator == qemu.KVM,
			Generations: lives,
			KillOutside: func(t *testing.T, m vmm.Machine) {
				if err := syscall.Kill(m.Record().PID, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			},
			Alive: alive,
		}
	})
}

func driver(t testing.TB) *qemu.Driver {
	t.Helper()
	caps := probed(t)
	d, err := qemu.New(qemu.Config{Accelerator: caps.Accelerator, Reason: caps.Reason, ConsoleLimit: consoleKeep})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

var probe struct {
	sync.Mutex
	caps vmm.Capabilities
}

// probed is what works on this machine, found out once: these tests run anywhere,
// under KVM where that is real.
func probed(t testing.TB) vmm.Capabilities {
	t.Helper()
	testkit.Tool(t, "qemu-system-x86_64")
	probe.Lock()
	defer probe.Unlock()
	if probe.caps.Accelerator == "" {
		caps, err := qemu.Probe(t.Context(), qemu.ProbeConfig{Kernel: kernelImage(t), UID: testUser(), GID: testUser()})
		if err != nil {
			t.Fatal(err)
		}
		probe.caps = caps
	}
	return probe.caps
}

// testUser is 0, the caller's own, where we may not change it.
func testUser() int {
	if os.Geteuid() != 0 {
		return 0
	}
	return vmUser
}

// shortDir is a directory whose name leaves room for a socket's path.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a temporary file may stay
	return dir
}

// alive asks the process table; a zombie has ended.
func alive(_ *testing.T, r vmm.Record) bool {
	p, err := kernel.StatProc(r.PID)
	return err == nil && p.StartTime == r.StartTime && p.State != 'Z'
}

func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// boot starts a guest and waits for its first line.
func boot(t *testing.T, d *qemu.Driver, spec vmm.Spec, want string) vmm.Machine {
	t.Helper()
	m, err := d.Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Kill(t.Context()); err != nil && t.Context().Err() == nil {
			t.Error(err)
		}
		if err := m.Release(); err != nil {
			t.Error(err)
		}
	})
	await(t, m, want)
	return m
}

func await(t *testing.T, m vmm.Machine, want string) string {
	t.Helper()
	var data []byte
	if !testkit.Poll(time.Minute, func() bool {
		var err error
		if data, _, err = m.Console(0, 1<<20); err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(data, []byte(want))
	}) {
		t.Fatalf("not on the console: %s; it ends with:\n%s", want, data[max(0, len(data)-4096):])
	}
	return string(data)
}

func spec(t *testing.T, do string, extra map[string][]byte) vmm.Spec {
	return vmm.Spec{
		ID: sandbox.NewID(), VCPUs: 1, MemMiB: 128, Kernel: kernelImage(t), Initrd: initramfs(t, extra),
		Dir: shortDir(t), Cmdline: "test.do=" + do,
	}
}

// TestTheProcessIsConfined looks at a running QEMU from outside.
func TestTheProcessIsConfined(t *testing.T) {
	testkit.Root(t)
	s := spec(t, "hold", nil)
	s.UID, s.GID = vmUser, vmUser
	m := boot(t, driver(t), s, vmmtest.Marker)
	proc := "/proc/" + strconv.Itoa(m.Record().PID)
	status := readFile(t, proc+"/status")
	groups := "Groups:\t \n"
	if gid, ok := kernel.NodeGroup("/dev/kvm"); ok && underKVM(t) { // the one way to it for a user of its own
		groups = fmt.Sprintf("Groups:\t%d \n", gid)
	}
	for _, want := range []string{
		"Uid:\t65533\t65533\t65533\t65533\n", "Gid:\t65533\t65533\t65533\t65533\n", groups,
		"NoNewPrivs:\t1\n", "Seccomp:\t2\n", "CapEff:\t0000000000000000\n", "CapPrm:\t0000000000000000\n",
	} {
		if !strings.Contains(status, want) {
			t.Errorf("no %q in its status:\n%s", want, status)
		}
	}
	if !ignores(t, status, syscall.SIGXFSZ) { // see limit.go
		t.Errorf("SIGXFSZ is not ignored:\n%s", status)
	}
	stat, err := kernel.StatProc(m.Record().PID)
	if err != nil || stat.Parent != os.Getpid() {
		t.Errorf("%+v, %v", stat, err)
	}
	if sid, _, _ := syscall.Syscall(syscall.SYS_GETSID, uintptr(m.Record().PID), 0, 0); int(sid) != m.Record().PID {
		t.Errorf("session %d, not its own", sid)
	}
	checkFDs(t, proc, m.Record().Dir)
	if info, err := os.Stat(s.Dir); err != nil || info.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("the directory is not ours any more: %v, %v", info, err)
	}
}

// ignores reads /proc/PID/status. Other signals may be ignored as well: that is
// inherited from whoever started the test.
func ignores(t *testing.T, status string, sig syscall.Signal) bool {
	t.Helper()
	_, rest, _ := strings.Cut(status, "SigIgn:\t")
	text, _, _ := strings.Cut(rest, "\n")
	mask, err := strconv.ParseUint(text, 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return mask&(1<<(sig-1)) != 0
}

func underKVM(t *testing.T) bool { return probed(t).Accelerator == qemu.KVM }

// checkFDs: every descriptor is one that was meant, none of ours leaked.
func checkFDs(t *testing.T, proc, dir string) {
	t.Helper()
	entries, err := os.ReadDir(proc + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		target, err := os.Readlink(proc + "/fd/" + e.Name())
		if err != nil {
			continue // closed meanwhile
		}
		switch {
		case strings.HasPrefix(target, "anon_inode:"), strings.HasPrefix(target, "socket:"), target == "/dev/null":
		case strings.HasPrefix(target, dir+"/"), strings.HasSuffix(target, "/vmlinuz"), strings.HasSuffix(target, "/initrd"):
		case strings.HasPrefix(target, "pipe:"), strings.HasPrefix(target, "/dev/zero"):
		case target == "/dev/kvm" && underKVM(t):
		default:
			t.Errorf("descriptor %s is %s", e.Name(), target)
		}
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestNobodyTrims: while no agent holds a VM, a guest that prints for ever fills
// no disk; the VM runs on, and so does its console once somebody is back.
func TestNobodyTrims(t *testing.T) {
	if testkit.Accelerator() != "tcg" { // a lab: every byte of its consoles is an exit out of two VMs
		testkit.Long(t, "minutes where KVM is emulated, and the limit is the kernel's, not the accelerator's")
	}
	spare := 4 * consoleKeep
	s := spec(t, string(vmmtest.Count), nil)
	m, err := driver(t).Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	record := m.Record()
	await(t, m, "line ")
	if err := m.Release(); err != nil {
		t.Fatal(err)
	}
	proc, path := "/proc/"+strconv.Itoa(record.PID), filepath.Join(s.Dir, "console.log")
	var full string
	testkit.Eventually(t, 3*time.Minute, "at the limit", func() bool {
		before := attempts(t, proc)
		size := apparent(t, path)
		full = strings.TrimSpace(lastOf(t, path))
		testkit.Eventually(t, time.Minute, "printing on", func() bool { return attempts(t, proc) > before+10_000 })
		return apparent(t, path) == size
	})
	if took := blocks(t, path); took > spare+2*consoleKeep {
		t.Errorf("it takes %d bytes", took)
	}
	if said := blocks(t, filepath.Join(s.Dir, "qemu.log")); said > spare {
		t.Errorf("QEMU's own log takes %d bytes", said)
	}
	again, err := driver(t).Adopt(t.Context(), record)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = again.Release() }() // it is killed
	testkit.Eventually(t, time.Minute, "printing into the log again", func() bool {
		data, _, err := again.Console(-consoleKeep, int(consoleKeep))
		return err == nil && !strings.Contains(string(data), full)
	})
	testkit.Eventually(t, time.Minute, "trimmed", func() bool { return blocks(t, path) < 2*consoleKeep })
	if err := again.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// attempts counts the system calls of a process that write, the failing ones too.
func attempts(t *testing.T, proc string) int {
	t.Helper()
	_, rest, _ := strings.Cut(readFile(t, proc+"/io"), "syscw: ")
	line, _, _ := strings.Cut(rest, "\n")
	n, err := strconv.Atoi(line)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func apparent(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// lastOf is the last whole line of a file.
func lastOf(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // read only
	buf := make([]byte, 4096)
	if _, err := f.ReadAt(buf, apparent(t, path)-int64(len(buf))); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(buf), "\n")
	return lines[len(lines)-2]
}

// TestStartSaysWhatQEMUSaid: an error of QEMU's own is in ours.
func TestStartSaysWhatQEMUSaid(t *testing.T) {
	s := spec(t, "hold", nil)
	broken := filepath.Join(s.Dir, "..", filepath.Base(s.Dir)+".img")
	if err := os.WriteFile(broken, []byte("not a qcow2 file"), 0o644); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.Remove(broken) }() // a temporary file may stay
	s.DiskPath, s.DiskFormat = broken, "qcow2"
	_, err := driver(t).Start(t.Context(), s)
	if err == nil || !strings.Contains(err.Error(), "not in qcow2 format") {
		t.Errorf("error %v", err)
	}
	if entries, _ := os.ReadDir(s.Dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestBadSpecsAreRefused(t *testing.T) {
	d := driver(t)
	for name, change := range map[string]func(s *vmm.Spec){
		"no CPU":              func(s *vmm.Spec) { s.VCPUs = 0 },
		"no memory":           func(s *vmm.Spec) { s.MemMiB = 0 },
		"a format to guess":   func(s *vmm.Spec) { s.DiskPath, s.DiskFormat = "/dev/null", "" },
		"a directory too far": func(s *vmm.Spec) { s.Dir = "/tmp/" + strings.Repeat("x", 120) },
		"a bad MAC":           func(s *vmm.Spec) { s.Tap, s.MAC = os.Stdin, "02:00,fd=9" },
	} {
		s := vmm.Spec{ID: sandbox.NewID(), VCPUs: 1, MemMiB: 128, Kernel: "/dev/null", Dir: shortDir(t)}
		change(&s)
		if _, err := d.Start(t.Context(), s); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNewSaysWhatIsMissing(t *testing.T) {
	if _, err := qemu.New(qemu.Config{Binary: "no-such-qemu", Accelerator: qemu.TCG}); !sandbox.Is(err, sandbox.KindUnsupported) {
		t.Errorf("no qemu: %v", err)
	}
	if _, err := qemu.New(qemu.Config{Accelerator: "magic"}); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("no such accelerator: %v", err)
	}
}

// TestTheGuestsClockIsTrue: ten ticks of a second take nine real seconds. A busy
// machine may show one late, but not the third, the sixth and the ninth.
func TestTheGuestsClockIsTrue(t *testing.T) {
	m := boot(t, driver(t), spec(t, "clock", nil), "TICK 0")
	start := time.Now()
	for to := 3; ; to += 3 {
		await(t, m, fmt.Sprint("TICK ", to))
		took := time.Since(start).Seconds()
		if ratio := took / float64(to); ratio > 0.9 && ratio < 1.17 {
			return
		}
		t.Logf("%d guest seconds took %.2f real ones", to, took)
		if to == 9 {
			t.Fatal("the guest's clock is wrong")
		}
	}
}

// TestAGuestWithoutTimerIsEnded: it would hang, and another start need not.
func TestAGuestWithoutTimerIsEnded(t *testing.T) {
	testkit.Require(t, "tcg", probed(t).Accelerator == qemu.TCG, "KVM gives every guest a timer")
	m, err := driver(t).Start(t.Context(), spec(t, "notimer", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Release() }() // it has ended
	select {
	case <-m.Done():
	case <-time.After(time.Minute):
		t.Fatal("it still runs")
	}
	if exit := m.Exit(); !exit.Retry || exit.Cause != sandbox.CauseVMMCrash || !strings.Contains(exit.Detail, "too busy") {
		t.Errorf("exit: %+v", exit)
	}
}
