package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/lab/wire"
)

const (
	newRoot = "/newroot"
	results = "/results"
	// self is where this program stays reachable, for the kernel to call it.
	self = "/run/lab/init"
)

type mount struct {
	kind, target string
	flags        uintptr
	data         string
}

func (m mount) do() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(m.kind, m.target, m.kind, m.flags, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s on %s: %w", m.kind, m.target, err)
	}
	return nil
}

const noExec = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

func mountEarly() error {
	for _, m := range []mount{
		{"proc", "/proc", noExec, ""},
		{"sysfs", "/sys", noExec, ""},
		{"devtmpfs", "/dev", unix.MS_NOSUID, "mode=0755"},
		{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
	} {
		if err := m.do(); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Dir(self), 0o755); err != nil {
		return err
	}
	program, err := os.ReadFile("/init")
	if err != nil {
		return err
	}
	return os.WriteFile(self, program, 0o755)
}

// loadModules loads dir/*.ko in lexical order, which is their order of
// dependency.
func loadModules(dir string) error {
	paths, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil {
		return err
	}
	slices.Sort(paths)
	var errs []error
	for _, path := range paths {
		errs = append(errs, loadModule(path))
	}
	return errors.Join(errs...)
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // read only
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", filepath.Base(path), err)
	}
	return nil
}

// connect opens the port to the outside and reads what this lab is to be.
func (h *host) connect() error {
	var name string
	err := await(10*time.Second, "virtio-serial port "+wire.Port, func() bool {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name") // the pattern is right
		for _, file := range names {
			data, err := os.ReadFile(file)
			if err == nil && strings.TrimSpace(string(data)) == wire.Port {
				name = filepath.Base(filepath.Dir(file))
				return true
			}
		}
		return false
	})
	if err != nil {
		return err
	}
	port, err := os.OpenFile("/dev/"+name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	h.conn = wire.New(port)
	t, payload, err := h.conn.Receive()
	if err != nil {
		return err
	}
	if t != wire.Hello {
		return fmt.Errorf("the first frame is a %q", t)
	}
	if err := json.Unmarshal(payload, &h.setup); err != nil {
		return err
	}
	now := unix.NsecToTimespec(h.setup.Time.UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &now)
}

func mountRoot() error {
	device, err := disk("root")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(newRoot, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(device, newRoot, "ext4", unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("mount %s: %w", device, err)
	}
	return nil
}

// disk finds a disk by the serial number that it was given outside.
func disk(serial string) (string, error) {
	var device string
	err := await(10*time.Second, "disk "+serial, func() bool {
		files, _ := filepath.Glob("/sys/block/vd*/serial") // the pattern is right
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err == nil && strings.TrimSpace(string(data)) == serial {
				device = "/dev/" + filepath.Base(filepath.Dir(file))
				return true
			}
		}
		return false
	})
	return device, err
}

func await(limit time.Duration, what string, there func() bool) error {
	deadline := time.Now().Add(limit)
	for pause := time.Millisecond; !there(); pause = min(2*pause, 50*time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("no %s after %v", what, limit)
		}
		time.Sleep(pause)
	}
	return nil
}

// switchRoot makes the disk the root. What the kernel unpacked of the initramfs
// is deleted: it is memory.
func switchRoot() error {
	for _, dir := range []string{"/dev", "/proc", "/sys", "/run"} {
		if err := unix.Mount(dir, newRoot+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	if err := errors.Join(os.Remove("/init"), os.RemoveAll("/modules"), os.Chdir(newRoot)); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the new root: %w", err)
	}
	return errors.Join(unix.Chroot("."), os.Chdir("/"))
}
