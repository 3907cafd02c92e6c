package doctor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/disk/dm"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/netns"
)

// Options says where the server would be.
type Options struct {
	Listen   string // host:port
	DataDir  string
	KVMCache string // where package qemu keeps what its probe found; may be missing
}

// tools are what `make deps` installs, and what runs it.
func tools() []Tool {
	return []Tool{
		{Name: "qemu-system-x86_64", Package: "qemu-system-x86", For: "it runs the VMs"},
		{Name: "qemu-img", Package: "qemu-utils", For: "it makes the disks of sandboxes"},
		{Name: "mmdebstrap", Package: "mmdebstrap", For: "it builds the base template"},
		{Name: "mke2fs", Package: "e2fsprogs", For: "it makes the file system of the base template"},
		{Name: "dpkg-deb", Package: "dpkg", For: "it unpacks the guest kernel"},
		{Name: "/usr/share/keyrings/debian-archive-keyring.gpg", Package: "debian-archive-keyring", For: "it checks the packages of the base template"},
	}
}

// Look asks the machine. What cannot be asked stays at its zero value, which
// Check takes for the worst that it can mean.
func Look(ctx context.Context, o Options) Facts {
	f := Facts{
		OS: runtime.GOOS, Arch: runtime.GOARCH, Kernel: release(), Root: os.Geteuid() == 0, Sudo: find("sudo"), Apt: find("apt-get") != "",
		FUSE: openDevice("/dev/fuse"), TUN: openDevice("/dev/net/tun"), KVM: lookKVM(o.KVMCache), Port: lookPort(ctx, o.Listen),
		DataDir: o.DataDir, CgroupV2: cgroupMount("/proc/self/mounts"),
	}
	for _, t := range tools() {
		t.Path = find(t.Name)
		f.Tools = append(f.Tools, t)
	}
	f.MemTotalMiB, f.MemAvailableMiB = lookMemory("/proc/meminfo")
	f.DiskFreeMiB = diskFree(o.DataDir)
	if f.Root {
		if err := dm.Available(); err != nil {
			f.NoMapper = err.Error()
		}
		for _, n := range netns.Check(ctx) {
			f.Network = append(f.Network, Network(n))
		}
	}
	return f
}

func release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// find looks for a program on PATH, and in the directories of the system's own
// that a user's PATH leaves out; or for a file.
func find(name string) string {
	if filepath.IsAbs(name) {
		if _, err := os.Stat(name); err != nil {
			return ""
		}
		return name
	}
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	return ""
}

func openDevice(path string) Device {
	d := Device{Path: path}
	_, err := os.Stat(path)
	if d.Present = err == nil; !d.Present {
		return d
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		d.OpenErr = err.Error()
		return d
	}
	_ = unix.Close(fd) // nothing was written
	return d
}

func lookKVM(cache string) KVM {
	k := KVM{Device: openDevice("/dev/kvm")}
	for _, m := range []string{"kvm", "kvm_intel", "kvm_amd", "kvm_pvm"} {
		if _, err := os.Stat("/sys/module/" + m); err == nil {
			k.Modules = append(k.Modules, m)
		}
	}
	k.Probed, k.Works, k.Reason = probed(cache)
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return k
	}
	for _, flag := range []string{"vmx", "svm"} {
		if strings.Contains(string(info), " "+flag+" ") {
			k.CPUFlag = flag
		}
	}
	return k
}

// probed reads what the last probe boot found. It counts until the machine is
// restarted; what else it depends on is looked at when the server starts.
func probed(cache string) (is, works bool, reason string) {
	const most = 64 << 10
	var answer struct {
		Basis struct {
			BootID string `json:"boot_id"`
		}
		Capabilities struct{ Accelerator, Reason string }
	}
	data, err := osfs.ReadFileLimit(cache, most)
	if err != nil || json.Unmarshal(data, &answer) != nil {
		return false, false, ""
	}
	boot, err := kernel.BootID()
	if err != nil || answer.Basis.BootID != boot {
		return false, false, ""
	}
	return true, answer.Capabilities.Accelerator == "kvm", answer.Capabilities.Reason
}

// lookPort tries to listen. The one who does already is asked whether it is a
// Dormouse, and looked up in /proc.
func lookPort(ctx context.Context, addr string) Port {
	p := Port{Addr: addr}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	if err == nil {
		_ = l.Close() // nobody has connected
		return p
	}
	p.Err = err.Error()
	var errno unix.Errno
	if errors.As(err, &errno) {
		p.Err = errno.Error()
	}
	p.Dormouse = isDormouse(ctx, addr)
	if _, port, err := net.SplitHostPort(addr); err == nil {
		p.PID, p.Program = portOwner(port)
	}
	return p
}

// isDormouse says whether a Dormouse server answers at addr.
func isDormouse(ctx context.Context, addr string) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/healthz", nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	defer func() { _ = resp.Body.Close() }() // read only
	var h struct{ Status, Version string }
	err = json.NewDecoder(http.MaxBytesReader(nil, resp.Body, 64<<10)).Decode(&h)
	return err == nil && resp.StatusCode == http.StatusOK && h.Status == "ok" && h.Version != ""
}

// portOwner finds who listens on a TCP port: the socket's inode from the
// kernel's table, and the process that has it open. Other users' processes
// show to root only.
func portOwner(port string) (pid int, program string) {
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return 0, ""
	}
	inodes := map[string]bool{}
	for _, path := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		file, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for _, inode := range listeners(string(file), uint16(n)) {
			inodes["socket:["+inode+"]"] = true
		}
	}
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil || len(inodes) == 0 {
		return 0, ""
	}
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && inodes[target] {
			parts := strings.Split(link, "/")
			pid, _ := strconv.Atoi(parts[2]) // the pattern has digits there
			comm, err := os.ReadFile("/proc/" + parts[2] + "/comm")
			if err != nil {
				comm = []byte("a process that has just ended")
			}
			return pid, strings.TrimSpace(string(comm))
		}
	}
	return 0, ""
}

// listeners reads /proc/net/tcp: the inodes of the sockets that listen on port.
func listeners(table string, port uint16) []string {
	const listening = "0A"
	var inodes []string
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 10 || f[3] != listening {
			continue
		}
		_, hex, ok := strings.Cut(f[1], ":")
		if n, err := strconv.ParseUint(hex, 16, 16); ok && err == nil && uint16(n) == port {
			inodes = append(inodes, f[9])
		}
	}
	return inodes
}

func lookMemory(path string) (total, available int) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0
	}
	defer func() { _ = f.Close() }() // read only
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) < 2 {
			continue
		}
		kib, err := strconv.Atoi(fields[1])
		if err != nil {
			continue
		}
		switch fields[0] {
		case "MemTotal:":
			total = kib >> 10
		case "MemAvailable:":
			available = kib >> 10
		}
	}
	return total, available
}

// diskFree is the space at dir, or where dir would be made.
func diskFree(dir string) int {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if err == nil {
			return int(st.Bavail * uint64(st.Bsize) >> 20)
		}
		parent := filepath.Dir(dir)
		if !errors.Is(err, fs.ErrNotExist) || parent == dir {
			return 0
		}
		dir = parent
	}
}

// cgroupMount is where cgroup v2 is mounted with controllers to use: a second,
// empty one beside version 1 bounds nothing.
func cgroupMount(mounts string) string {
	data, err := os.ReadFile(mounts)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 3 || f[2] != "cgroup2" {
			continue
		}
		controllers, err := os.ReadFile(filepath.Join(f[1], "cgroup.controllers"))
		if err == nil && strings.Contains(string(controllers), "memory") {
			return f[1]
		}
	}
	return ""
}
