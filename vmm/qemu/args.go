package qemu

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
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

// rootNode is the disk.
const rootNode = "root"

// fds are the numbers that descriptors have inside the QEMU process; 0 is none.
type fds struct {
	control int // the listening control socket
	console int
	kernel  int
	initrd  int
	tap     int
	memory  int
}

// args is QEMU's command line.
//
// RAM is an object named "mem" and the disk a node named rootNode, by which they
// are found when the VM is saved. werror=report: a full host disk is an I/O error in the
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
		// A saved state has its devices only, without a word on the machine (which compat has).
		"-M", "microvm,memory-backend=mem,suppress-vmdesc=on,auto-kernel-cmdline=off,pcie=off,usb=off",
		"-global", "migration.send-configuration=off",
		"-global", "virtio-mmio.force-legacy=false",
		"-smp", strconv.Itoa(spec.VCPUs),
		"-m", strconv.Itoa(spec.MemMiB) + "M",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", fd.control),
		"-mon", "chardev=qmp,mode=control",
		"-add-fd", fmt.Sprintf("fd=%d,set=1,opaque=%s", fd.console, tag(spec.Dir)),
		"-chardev", "file,id=console,path=/dev/fdset/1,append=on",
		"-serial", "chardev:console",
		"-device", "virtio-rng-device",
	}
	args = append(args, d.accelArgs()...)
	args = append(args, d.originArgs(spec, fd)...)
	if blockdev != "" {
		args = append(args, "-blockdev", blockdev,
			"-device", "virtio-blk-device,drive="+rootNode+",werror=report,rerror=report,serial="+newSerial())
	}
	if fd.tap != 0 {
		args = append(args, "-netdev", fmt.Sprintf("tap,id=net0,fd=%d,vhost=off", fd.tap),
			"-device", "virtio-net-device,netdev=net0,guest_announce=off,mac="+spec.MAC)
	}
	return args, nil
}

// originArgs say what the guest begins as. One that is restored has its kernel in
// its memory, which it gets as a private mapping: the file is never written to,
// though QEMU opens it for that. It waits for the state of its devices, and then
// to be told to run.
func (d *Driver) originArgs(spec vmm.Spec, fd fds) []string {
	if spec.Restore != nil {
		return []string{
			"-object", fmt.Sprintf("memory-backend-file,id=mem,size=%dM,share=off,mem-path=%s", spec.MemMiB, selfFD(fd.memory)),
			"-incoming", "defer", "-S",
		}
	}
	args := []string{
		"-object", fmt.Sprintf("memory-backend-ram,id=mem,size=%dM", spec.MemMiB),
		"-kernel", selfFD(fd.kernel), "-append", d.cmdline(spec.Cmdline),
	}
	if fd.initrd != 0 {
		args = append(args, "-initrd", selfFD(fd.initrd))
	}
	return args
}

// newSerial is the disk's serial number, another one in each process: a guest tells
// by it whether it was restored. A virtio disk shows 20 characters of it.
func newSerial() string { return strings.ToLower(rand.Text())[:20] }

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
// A block device is opened past the host's page cache: what a frozen VM has
// written is in its overlay then, and nothing waits in memory for space.
func blockdevOf(spec vmm.Spec) (string, error) {
	if spec.DiskPath == "" {
		return "", nil
	}
	file := map[string]any{"driver": "file", "filename": spec.DiskPath, "discard": "unmap"}
	if info, err := os.Stat(spec.DiskPath); err == nil && info.Mode()&os.ModeDevice != 0 {
		file["driver"], file["cache"] = "host_device", map[string]any{"direct": true}
	}
	b, err := json.Marshal(map[string]any{
		"driver": spec.DiskFormat, "node-name": rootNode, "discard": "unmap", "file": file,
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
	} else {
		// Under KVM this machine type has no real-time clock (kvm-clock tells the
		// time), and the kernel would wait a second for one to answer.
		words = append(words, "initcall_blacklist=cmos_init")
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
