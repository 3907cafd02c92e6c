package boot

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

type mount struct {
	kind, target string
	flags        uintptr
	data         string
	mode         os.FileMode // of the directory, when it has to be made
}

func (m mount) do() error {
	if err := os.MkdirAll(m.target, m.mode); err != nil {
		return err
	}
	if err := unix.Mount(m.kind, m.target, m.kind, m.flags, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s on %s: %w", m.kind, m.target, err)
	}
	return nil
}

const noExec = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// mountEarly makes the initramfs usable, and gives the agent its console: the
// kernel opens one only if the initramfs has the node.
func mountEarly() error {
	for _, m := range []mount{
		{"proc", "/proc", noExec, "", 0o555},
		{"sysfs", "/sys", noExec, "", 0o555},
		{"devtmpfs", "/dev", unix.MS_NOSUID, "mode=0755", 0o755},
	} {
		if err := m.do(); err != nil {
			return err
		}
	}
	openConsole()
	return nil
}

// openConsole makes /dev/console the standard streams. A machine without one
// stays silent.
func openConsole() {
	fd, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	for std := range 3 {
		_ = unix.Dup3(fd, std, 0) // cannot fail for open numbers
	}
	_ = unix.Close(fd)
}

// mountLate mounts the rest in the new root. /tmp stays on the disk: on a tmpfs
// it would take the memory that a small guest needs.
func (s *System) mountLate() error {
	for _, m := range []mount{
		{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666", 0o755},
		{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777", 0o1777},
		{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=755", 0o755},
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
	s.warn("make /run/lock", errors.Join(os.Mkdir("/run/lock", 0), os.Chmod("/run/lock", 0o1777|os.ModeSticky)))
	if info, err := os.Stat("/tmp"); err != nil || !info.IsDir() {
		s.warn("make /tmp", errors.Join(os.Mkdir("/tmp", 0), os.Chmod("/tmp", 0o777|os.ModeSticky)))
	}
	return nil
}
