package qemu

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/dormouse-sandbox/dormouse/vmm"
)

// Names of files in Spec.Dir.
const (
	socketName  = "qmp.sock"
	consoleName = "console.log"
	logName     = "qemu.log"
)

// fds are the numbers that descriptors have inside the QEMU process; 0 is none.
type fds struct {
	control int // the listening control socket
	console int
	kernel  int
	initrd  int
	tap     int
}

// args is QEMU's command line.
//
// RAM is an object named "mem" and the disk a node named "root", so that a later
// snapshot can name them. werror=report: a full host disk is an I/O error in the
// guest, where the default would stop the VM without a word to anybody.
func (d *Driver) args(spec vmm.Spec, fd fds) ([]string, error) {
	blockdev, err := blockdevOf(spec)
	if err != nil {
		return nil, err
	}
	args := []string{
		"-name", string(spec.ID),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-M", "microvm,memory-backend=mem,auto-kernel-cmdline=off,pcie=off,usb=off",
		"-global", "virtio-mmio.force-legacy=false",
		"-smp", strconv.Itoa(spec.VCPUs),
		"-m", strconv.Itoa(spec.MemMiB) + "M",
		"-object", fmt.Sprintf("memory-backend-ram,id=mem,size=%dM", spec.MemMiB),
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", fd.control),
		"-mon", "chardev=qmp,mode=control",
		"-add-fd", fmt.Sprintf("fd=%d,set=1,opaque=%s", fd.console, tag(spec.Dir)),
		"-chardev", "file,id=console,path=/dev/fdset/1,append=on",
		"-serial", "chardev:console",
		"-kernel", selfFD(fd.kernel),
		"-append", d.cmdline(spec.Cmdline),
		"-device", "virtio-rng-device",
	}
	args = append(args, d.accelArgs()...)
	if fd.initrd != 0 {
		args = append(args, "-initrd", selfFD(fd.initrd))
	}
	if blockdev != "" {
		args = append(args, "-blockdev", blockdev,
			"-device", "virtio-blk-device,drive=root,werror=report,rerror=report")
	}
	if fd.tap != 0 {
		args = append(args, "-netdev", fmt.Sprintf("tap,id=net0,fd=%d,vhost=off", fd.tap),
			"-device", "virtio-net-device,netdev=net0,mac="+spec.MAC)
	}
	return args, nil
}

// accelArgs: one host thread per vCPU under emulation, as under KVM. Three
// features of "max" make an emulated guest slower, and are off: la57, since
// five-level page tables make every TLB miss dearer; erms and fsrm, since they make
// kernel and libc copy with "rep movsb", which is emulated byte by byte (a copy of
// 64 KiB took 335 µs with them and 99 µs without).
func (d *Driver) accelArgs() []string {
	if d.config.Accelerator == KVM {
		return []string{"-accel", "kvm", "-cpu", "host"}
	}
	return []string{"-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", codeCacheMiB), "-cpu", "max,la57=off,erms=off,fsrm=off"}
}

// codeCacheMiB is how much translated code QEMU keeps per VM under emulation. Its
// own default is 1 GiB, which a busy guest fills: more than most guests have
// memory.
const codeCacheMiB = 128

// overheadMiB is what a VM costs the host besides its guest's memory, in MiB: QEMU
// itself, and the cache of translated code.
func (d *Driver) overheadMiB() int {
	const process = 64
	if d.config.Accelerator == TCG {
		return process + codeCacheMiB
	}
	return process
}

// selfFD names an inherited file by path. Opening it asks for permission on the
// file alone, not on the directories above it.
func selfFD(n int) string { return "/proc/self/fd/" + strconv.Itoa(n) }

// blockdevOf describes the disk in JSON, which needs no escaping rules for paths.
func blockdevOf(spec vmm.Spec) (string, error) {
	if spec.DiskPath == "" {
		return "", nil
	}
	b, err := json.Marshal(map[string]any{
		"driver": spec.DiskFormat, "node-name": "root", "discard": "unmap",
		"file": map[string]any{"driver": "file", "filename": spec.DiskPath, "discard": "unmap"},
	})
	if err != nil {
		return "", fmt.Errorf("describe disk: %w", err)
	}
	return string(b), nil
}

// cmdline is the guest kernel's command line: what every guest needs, what the
// accelerator needs, then the caller's words, which win where both set the same
// thing. What a word is worth is processor time up to the first process under
// emulation, where a boot with none of them takes 2.9 s (BenchmarkBoot).
func (d *Driver) cmdline(extra string) string {
	words := []string{
		"console=ttyS0", // the log that people read
		"panic=-1",      // a panic reboots at once…
		"reboot=t",      // …by a triple fault, which -no-reboot turns into the end of the process
		// Notices and worse: a boot that hangs still shows how far it came, and
		// the emulated serial port, slow under any accelerator, is spared the rest.
		"loglevel=6",
		"cryptomgr.notests", // self-tests of ciphers: 0.4 s
	}
	if d.config.Accelerator == TCG {
		words = append(words, emulationWords(d.tscKHz)...)
	}
	if extra != "" {
		words = append(words, extra)
	}
	return strings.Join(words, " ")
}

// emulationWords are for software emulation only.
func emulationWords(tscKHz int) []string {
	return []string{
		// Nothing on this machine type can calibrate the counter, and most boots
		// hang trying (35 of 44 measured); with the frequency given none did.
		fmt.Sprintf("tsc_early_khz=%d", tscKHz),
		// The kernel would compare the counter with its tick, which an emulator on
		// a busy host delivers late, call the counter unstable, and keep time by
		// the tick from then on: seconds would get lost (seen at load 8 on 2 cores).
		"tsc=reliable",
		// There is no speculation to mitigate in an emulated processor: 0.2 s.
		"mitigations=off",
	}
}
