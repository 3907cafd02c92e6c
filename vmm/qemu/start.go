package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

const (
	keepLog = 64 << 10 // of QEMU's own output, in bytes
	// maxSocketPath is what fits into sun_path, with its final zero.
	maxSocketPath = 107
)

// Start boots or restores a VM. It returns when QEMU has built the machine and the
// guest runs, which may still be booting; or when it is what it was when it was
// saved, and frozen. On error nothing of it is left.
func (d *Driver) Start(ctx context.Context, spec vmm.Spec) (_ vmm.Machine, err error) {
	if err := check(spec); err != nil {
		return nil, err
	}
	saved, err := d.checkRestore(spec)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, d.config.StartLimit)
	defer cancel()
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start qemu: %w", err), u.Run(ctx))
		}
	}()
	m := d.newMachine(vmm.Record{ID: spec.ID, Driver: Name, Dir: spec.Dir}, &u)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := m.launch(spec, &u); err != nil {
		return nil, err
	}
	if m.restored = spec.Restore != nil; !m.restored {
		m.bootedAt = time.Now()
	}
	if err := m.identify(); err != nil {
		return nil, err
	}
	if err := m.connect(ctx, &u); err != nil {
		return nil, m.explain(ctx, err)
	}
	if spec.Restore != nil {
		if err := m.load(ctx, saved); err != nil {
			return nil, m.explain(ctx, fmt.Errorf("restore: %w", err))
		}
	}
	m.begin()
	d.config.Log.Info("vm started", "sandbox", spec.ID, "pid", m.record.PID, "accelerator", d.config.Accelerator,
		"restored", m.restored)
	return m, nil
}

// check finds what QEMU would only say in its own words, or not at all.
func check(spec vmm.Spec) error {
	switch {
	case spec.VCPUs < 1 || spec.MemMiB < 1:
		return sandbox.Errorf(sandbox.KindInvalid, "start qemu: %d vCPUs and %d MiB are no machine", spec.VCPUs, spec.MemMiB)
	case spec.DiskPath != "" && spec.DiskFormat != "raw" && spec.DiskFormat != "qcow2":
		return sandbox.Errorf(sandbox.KindInvalid, "start qemu: disk format %q is neither raw nor qcow2", spec.DiskFormat)
	case len(filepath.Join(spec.Dir, socketName)) > maxSocketPath:
		return sandbox.Errorf(sandbox.KindInvalid, "start qemu: %s is too long for a socket's path, %d bytes at most",
			filepath.Join(spec.Dir, socketName), maxSocketPath)
	}
	if spec.Tap != nil {
		if _, err := net.ParseMAC(spec.MAC); err != nil {
			return sandbox.Errorf(sandbox.KindInvalid, "start qemu: %w", err)
		}
	}
	return nil
}

// launch makes the files of the VM and starts its process.
func (m *machine) launch(spec vmm.Spec, u *undo.Stack) error {
	var in inherit
	defer func() { _ = in.close() }() // the child has its own; ours were only opened to be passed on
	fd, output, err := m.open(spec, &in, u)
	if err != nil {
		return err
	}
	args, err := m.driver.args(spec, fd)
	if err != nil {
		return err
	}
	m.pid, err = spawn(process{
		binary: m.driver.binary, args: args, output: output, files: in.files,
		uid: spec.UID, gid: spec.GID, groups: m.driver.groups(), netns: spec.NetNS, cgroup: spec.Cgroup,
	})
	if err != nil {
		return err
	}
	u.Push("qemu process", m.destroy)
	return nil
}

// groups are the supplementary groups of a VMM: KVM's, where that opens /dev/kvm.
func (d *Driver) groups() []uint32 {
	if gid, ok := kernel.NodeGroup("/dev/kvm"); ok && d.config.Accelerator == KVM {
		return []uint32{uint32(gid)}
	}
	return nil
}

// open makes the log files and the control socket and opens what QEMU reads,
// all of it to be inherited.
func (m *machine) open(spec vmm.Spec, in *inherit, u *undo.Stack) (fds, *os.File, error) {
	var fd fds
	var said []byte
	if spec.Restore != nil {
		said = spec.Restore.Console
	}
	output, err := m.openLogs(spec.Dir, said, &fd, in, u)
	if err != nil {
		return fd, nil, err
	}
	listener, err := listen(filepath.Join(spec.Dir, socketName), u)
	if err != nil {
		return fd, nil, fmt.Errorf("make control socket: %w", err)
	}
	fd.control = in.add(listener)
	if err := openOrigin(spec, &fd, in); err != nil {
		return fd, nil, err
	}
	if spec.DiskPath != "" {
		if _, err := os.Stat(spec.DiskPath); err != nil {
			return fd, nil, fmt.Errorf("open disk: %w", err)
		}
	}
	if spec.Tap != nil {
		tap, err := kernel.Duplicate(spec.Tap)
		if err != nil {
			return fd, nil, fmt.Errorf("open tap: %w", err)
		}
		fd.tap = in.add(tap)
	}
	return fd, output, nil
}

// openOrigin opens what the guest begins as.
func openOrigin(spec vmm.Spec, fd *fds, in *inherit) error {
	if spec.Restore != nil {
		memory, err := kernel.Duplicate(spec.Restore.Memory)
		if err != nil {
			return fmt.Errorf("open memory: %w", err)
		}
		fd.memory = in.add(memory)
		return nil
	}
	for _, f := range []struct {
		what, path string
		fd         *int
	}{{"kernel", spec.Kernel, &fd.kernel}, {"initrd", spec.Initrd, &fd.initrd}} {
		if f.path == "" && f.fd == &fd.initrd {
			continue
		}
		file, err := openFor(f.path, spec.UID)
		if err != nil {
			return fmt.Errorf("open %s: %w", f.what, err)
		}
		*f.fd = in.add(file)
	}
	return nil
}

// openLogs makes both; that of the console begins with what the guest has said.
func (m *machine) openLogs(dir string, said []byte, fd *fds, in *inherit, u *undo.Stack) (*os.File, error) {
	var writers [2]*os.File
	for i, l := range []struct {
		name string
		keep int64
		log  **logFile
	}{{consoleName, m.driver.config.ConsoleLimit, &m.console}, {logName, keepLog, &m.log}} {
		log, writer, err := createLog(dir, l.name, l.keep)
		if err != nil {
			return nil, fmt.Errorf("make %s: %w", l.name, err)
		}
		*l.log, writers[i] = log, writer
		u.PushClose(l.name, log.Close)
		u.PushClose(l.name, remover(filepath.Join(dir, l.name)))
		in.add(writer)
	}
	fd.console = firstFD // added first
	if _, err := writers[0].Write(said); err != nil {
		return nil, fmt.Errorf("begin %s: %w", consoleName, err)
	}
	return writers[1], nil
}

// openFor opens a file that a process of another uid opens again through
// /proc/self/fd, which asks for permission on the file itself.
func openFor(path string, uid int) (*os.File, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if uid != 0 && info.Mode().Perm()&0o004 == 0 {
		return nil, errors.Join(fmt.Errorf("%s has mode %v: it must be readable by everybody", path, info.Mode().Perm()), file.Close())
	}
	return file, nil
}

// listen makes the control socket here, so that QEMU needs no right to the
// directory and a connection can be made before QEMU gets round to accepting it.
func listen(path string, u *undo.Stack) (*os.File, error) {
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	listener.SetUnlinkOnClose(false)
	u.PushClose("control socket", remover(path))
	file, err := listener.File()
	err = errors.Join(err, os.Chmod(path, 0o600), listener.Close())
	if err != nil && file != nil {
		_ = file.Close() // the first error says what is wrong
	}
	return file, err
}

func remover(path string) func() error {
	return func() error {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
}

// explain turns an error of the control connection into what QEMU printed
// before it ended, if that is what happened.
func (m *machine) explain(ctx context.Context, err error) error {
	said := oneLine(m.log.tail(1 << 10))
	if ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(ctx, lastEvents) // it may be in the middle of dying
		defer cancel()
		if m.pid.Wait(ctx) == nil {
			if said = oneLine(m.log.tail(1 << 10)); said == "" {
				said = m.lastWord()
			}
			return fmt.Errorf("it ended at once: %s", said)
		}
	}
	if said == "" {
		return err
	}
	return fmt.Errorf("%w; it says: %s", err, said)
}

// lastWord is what the kernel knows about the end of a QEMU that said nothing.
func (m *machine) lastWord() string {
	status, err := m.pid.Reap()
	if err != nil || !status.Known {
		return "without a word"
	}
	if (evidence{restored: m.restored, status: status}).unread() {
		return "a page of the guest's saved memory could not be read"
	}
	return status.String()
}

// oneLine joins the lines that QEMU printed, without its name in front of each.
func oneLine(said string) string {
	var lines []string
	for line := range strings.Lines(strings.ToValidUTF8(said, "?")) {
		line = strings.TrimSpace(line)
		if name, rest, ok := strings.Cut(line, ": "); ok && strings.HasPrefix(name, "qemu") {
			line = rest
		}
		if line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "; ")
}
