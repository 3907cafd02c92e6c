package qemu_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

const guestMAC = "02:64:6f:72:6d:01"

// TestDiskAndNetworkReachTheGuest boots, as another user and in another network
// namespace, with a qcow2 overlay that is larger than its base and with a TAP.
func TestDiskAndNetworkReachTheGuest(t *testing.T) {
	testkit.Root(t)
	testkit.Tool(t, "ip")
	testkit.Tool(t, "qemu-img")
	s := spec(t, "devices", virtioModules(t))
	s.UID, s.GID = vmUser, vmUser
	s.DiskPath, s.DiskFormat = overlay(t), "qcow2"
	s.NetNS = namespace(t)
	s.Tap, s.MAC = tapIn(t, s.NetNS), guestMAC
	m := boot(t, driver(t), s, "GUEST-DONE devices")
	console := await(t, m, "GUEST-DONE devices")
	for _, want := range []string{
		`vda: "hello, guest" <nil>`, "vda write: <nil> <nil>", "block/vda/size: 16384 <nil>",
		"class/net/eth0/address: " + guestMAC,
	} {
		if !strings.Contains(console, want) {
			t.Errorf("no %q on the console:\n%s", want, console)
		}
	}
	inside, err := os.Readlink("/proc/" + strconv.Itoa(m.Record().PID) + "/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if mine, _ := os.Readlink("/proc/self/ns/net"); inside == mine {
		t.Error("it runs in our network namespace")
	}
	if _, err := s.Tap.Stat(); err != nil {
		t.Errorf("our TAP descriptor is gone: %v", err)
	}
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "qemu-io", "-f", "qcow2", "-c", "read -v 4096 16", s.DiskPath).CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("written.by.guest")) {
		t.Errorf("what the guest wrote is not in the overlay: %v\n%s", err, out)
	}
}

// TestStartInAMissingNamespaceFails and leaves our own threads where they were.
func TestStartInAMissingNamespaceFails(t *testing.T) {
	testkit.Root(t)
	s := spec(t, "hold", nil)
	s.NetNS = filepath.Join(s.Dir, "missing")
	_, err := driver(t).Start(t.Context(), s)
	if err == nil || !strings.Contains(err.Error(), "network namespace") {
		t.Errorf("error %v", err)
	}
	if entries, _ := os.ReadDir(s.Dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
}

// TestNoThreadStaysBehind: after a start in another namespace, with privileges
// given up, no thread of ours is still there or without privileges.
func TestNoThreadStaysBehind(t *testing.T) {
	testkit.Root(t)
	testkit.Tool(t, "ip")
	ns := namespace(t)
	mine, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	d := driver(t)
	for range 5 {
		m, err := d.Start(t.Context(), vmm.Spec{
			ID: sandbox.NewID(), VCPUs: 1, MemMiB: 128, Kernel: kernelImage(t), Dir: shortDir(t), NetNS: ns,
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := m.Release(); err != nil {
			t.Fatal(err)
		}
	}
	testkit.Eventually(t, 3*time.Second, "every thread at home", func() bool {
		tasks, err := filepath.Glob("/proc/self/task/*")
		if err != nil || len(tasks) == 0 {
			t.Fatal(err)
		}
		for _, task := range tasks {
			at, err := os.Readlink(task + "/ns/net")
			status, statusErr := os.ReadFile(task + "/status")
			if err == nil && at != mine || statusErr == nil && bytes.Contains(status, []byte("NoNewPrivs:\t1")) {
				return false
			}
		}
		return true
	})
}

// overlay is 8 MiB over a base of 4 MiB, owned by the VM's user.
func overlay(t *testing.T) string {
	t.Helper()
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	base, path := filepath.Join(dir, "base.img"), filepath.Join(dir, "overlay.qcow2")
	data := make([]byte, 4<<20)
	copy(data, "hello, guest")
	if err := os.WriteFile(base, data, 0o444); err != nil {
		t.Fatal(err)
	}
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=128k,extended_l2=on", "-F", "raw", "-b", base, path, "8M")
	if err := os.Chown(path, vmUser, vmUser); err != nil {
		t.Fatal(err)
	}
	return path
}

// namespace is a network namespace of this test's own.
func namespace(t *testing.T) string {
	t.Helper()
	name := "dmtest-vmm-" + strconv.Itoa(os.Getpid())
	run(t, "ip", "netns", "add", name)
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "del", name).CombinedOutput(); err != nil {
			t.Errorf("remove namespace: %v: %s", err, out)
		}
	})
	return "/run/netns/" + name
}

// tapIn opens a TAP that lives in a namespace.
func tapIn(t *testing.T, ns string) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		testkit.Require(t, "tun", false, err.Error())
	}
	f := os.NewFile(uintptr(fd), "/dev/net/tun")
	t.Cleanup(func() { _ = f.Close() }) // the namespace goes too
	ifr, err := unix.NewIfreq("dmtest-tap")
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "link", "set", "dmtest-tap", "netns", filepath.Base(ns))
	run(t, "ip", "-n", filepath.Base(ns), "link", "set", "dmtest-tap", "up")
	return f
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}
