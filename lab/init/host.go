package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/lab/wire"
)

// mountLate mounts what a distribution's init would.
func mountLate() error {
	// Mounts spread into namespaces made later, as on any host with systemd.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make / shared: %w", err)
	}
	for _, m := range []mount{
		{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"},
		{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"cgroup2", "/sys/fs/cgroup", noExec, "nsdelegate"},
		{"bpf", "/sys/fs/bpf", noExec, "mode=700"},
	} {
		if err := m.do(); err != nil {
			return err
		}
	}
	for link, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return errors.Join(os.MkdirAll("/run/lock", 0o755), os.Chmod("/run/lock", 0o777|os.ModeSticky))
}

// scratch is the writable disk; what gets large lies on it.
const scratch = "/scratch"

var onScratch = []struct {
	path string
	perm os.FileMode
}{
	{"/tmp", 0o777 | os.ModeSticky},
	{"/var/tmp", 0o777 | os.ModeSticky},
	{"/var/lib/dormouse", 0o755},
	{"/var/cache/dormouse", 0o755},
}

// mountDisks mounts what the outside attached, scratch first.
func (h *host) mountDisks() error {
	for _, m := range h.setup.Mounts {
		if err := mountDisk(m); err != nil {
			return fmt.Errorf("disk %s: %w", m.Serial, err)
		}
		if m.Path != scratch {
			continue
		}
		for _, on := range onScratch {
			from := filepath.Join(scratch, on.path)
			err := errors.Join(os.MkdirAll(from, 0o755), os.Chmod(from, on.perm), os.MkdirAll(on.path, 0o755))
			if err == nil {
				err = unix.Mount(from, on.path, "", unix.MS_BIND, "")
			}
			if err != nil {
				return fmt.Errorf("put %s on scratch: %w", on.path, err)
			}
		}
	}
	return nil
}

func mountDisk(m wire.Mount) error {
	device, err := disk(m.Serial)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(m.Path, 0o755); err != nil {
		return err
	}
	if m.ReadOnly {
		return mountReadOnly(device, m)
	}
	// commit=1: of a machine that is killed, all but the last second is there.
	return unix.Mount(device, m.Path, "ext4", unix.MS_NOATIME, "commit=1,noinit_itable,discard")
}

func mountReadOnly(device string, m wire.Mount) error {
	lower := m.Path
	if m.Overlay {
		lower = "/run/lab/lower-" + m.Serial
		if err := os.MkdirAll(lower, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount(device, lower, "ext4", unix.MS_RDONLY|unix.MS_NOATIME, "noload"); err != nil || !m.Overlay {
		return err
	}
	upper, work := scratch+"/upper-"+m.Serial, scratch+"/work-"+m.Serial
	if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)); err != nil {
		return err
	}
	return unix.Mount("overlay", m.Path, "overlay", 0, "lowerdir="+lower+",upperdir="+upper+",workdir="+work)
}

// modules are what no program would load by itself, since it opens a node that
// appears with the module. dm targets, nf_tables and the like come when asked for.
var modules = []string{"kvm_amd", "dm_mod", "dm_snapshot", "dm_zero", "dm_verity", "dm_thin_pool", "loop", "tun", "fuse", "veth", "nf_tables"}

func (h *host) loadModules() error {
	out, err := exec.Command("/usr/sbin/modprobe", append([]string{"-a"}, modules...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("modprobe: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// nodes are devices with the owners and rights that udev gives them: a VMM with a
// user of its own opens /dev/kvm.
var nodes = []struct {
	path, group string
	perm        os.FileMode
}{
	{"/dev/kvm", "kvm", 0o660},
	{"/dev/net/tun", "root", 0o666},
	{"/dev/fuse", "root", 0o666},
}

func setNodes() error {
	for _, n := range nodes {
		g, err := user.LookupGroup(n.group)
		if err != nil {
			return err
		}
		gid, err := strconv.Atoi(g.Gid)
		if err != nil {
			return err
		}
		if err := errors.Join(os.Chown(n.path, 0, gid), os.Chmod(n.path, n.perm)); err != nil {
			return err
		}
	}
	return nil
}

// controllers are what cgroups below the root get.
var controllers = []string{"cpu", "cpuset", "io", "memory", "pids"}

// settle sets what is left: limits, names, the loopback interface.
func settle() error {
	if err := os.MkdirAll(cores, 0o755); err != nil {
		return err
	}
	for path, text := range map[string]string{
		"/proc/sys/kernel/core_pattern":         corePattern,
		"/proc/sys/kernel/core_pipe_limit":      "4", // waits until the core is saved
		"/proc/sys/kernel/hostname":             "lab",
		"/etc/hostname":                         "lab\n",
		"/etc/hosts":                            "127.0.0.1 localhost lab\n::1 localhost\n",
		"/sys/fs/cgroup/cgroup.subtree_control": "+" + strings.Join(controllers, " +"),
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return errors.Join(setNodes(), raiseLimits(), loopbackUp(), os.Setenv("PATH", searchPath))
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }() // nothing was sent
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING | unix.IFF_LOOPBACK)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// missing asks for everything that a lab is for.
func missing() []string {
	var out []string
	for _, node := range []string{"/dev/kvm", "/dev/mapper/control", "/dev/loop-control", "/dev/net/tun", "/dev/fuse"} {
		f, err := os.OpenFile(node, os.O_RDWR, 0)
		if err != nil {
			out = append(out, err.Error())
			continue
		}
		_ = f.Close() // nothing was written
	}
	for _, module := range modules {
		if _, err := os.Stat("/sys/module/" + module); err != nil {
			out = append(out, "module "+module)
		}
	}
	have, err := os.ReadFile("/sys/fs/cgroup/cgroup.subtree_control")
	if err != nil {
		return append(out, err.Error())
	}
	for _, name := range controllers {
		if !strings.Contains(" "+strings.TrimSpace(string(have))+" ", " "+name+" ") {
			out = append(out, "cgroup controller "+name)
		}
	}
	return out
}
