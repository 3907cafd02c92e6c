package lab

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

// Names of files in Config.Dir.
const (
	consoleName = "console.log"
	logName     = "qemu.log"
	scratchName = "scratch.img"
	resultsName = "results.img"
)

// codeCacheMiB bounds the translated code; a lab runs a whole distribution.
const codeCacheMiB = 512

// portFD is the number that the port's socket has inside the QEMU process.
const portFD = 3

// args is QEMU's command line.
func (c Config) args(tscKHz int) ([]string, error) {
	args := []string{
		"-name", "dormouse-lab",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-M", "microvm,auto-kernel-cmdline=off,pcie=off,usb=off,rtc=on",
		// The three features make an emulated guest slower; see docs/decisions.md.
		"-cpu", "max,+svm,la57=off,erms=off,fsrm=off",
		"-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", codeCacheMiB),
		"-smp", strconv.Itoa(c.VCPUs), "-m", strconv.Itoa(c.MemMiB) + "M",
		"-global", "virtio-mmio.force-legacy=false",
		"-kernel", c.Kernel, "-initrd", c.Initrd, "-append", cmdline(tscKHz),
		"-chardev", "file,id=console,path=" + escape(filepath.Join(c.Dir, consoleName)), "-serial", "chardev:console",
		"-device", "virtio-serial-device",
		"-chardev", fmt.Sprintf("socket,id=port,fd=%d", portFD),
		"-device", "virtserialport,chardev=port,name=" + portName,
		"-device", "virtio-rng-device",
	}
	for _, d := range c.disks() {
		if strings.ContainsAny(d.Serial, ",=") || len(d.Serial) > maxSerial {
			return nil, fmt.Errorf("disk %q: its name must have no comma and at most %d bytes", d.Serial, maxSerial)
		}
		args = append(args,
			"-drive", "if=none,format=raw,id="+d.Serial+",file="+escape(d.File)+d.options(),
			"-device", "virtio-blk-device,drive="+d.Serial+",serial="+d.Serial)
	}
	return args, nil
}

// maxSerial is what virtio-blk has room for.
const maxSerial = 20

// cmdline is the kernel's command line; vmm/qemu has the same words with their
// reasons.
func cmdline(tscKHz int) string {
	return strings.Join([]string{
		"console=ttyS0", "panic=-1", "reboot=t", "loglevel=6", "cryptomgr.notests",
		fmt.Sprintf("tsc_early_khz=%d", tscKHz), "tsc=reliable", "mitigations=off",
		// A kernel that has gone wrong proves nothing any more: end, and be seen.
		"oops=panic",
	}, " ")
}

// escape doubles commas, as QEMU's option syntax wants it.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }

// check fills in what is not set.
func (c *Config) check() error {
	for name, value := range map[string]string{"Kernel": c.Kernel, "Initrd": c.Initrd, "Root": c.Root, "Dir": c.Dir} {
		if value == "" {
			return errors.New("lab: Config." + name + " is not set")
		}
	}
	if len(c.QEMU) == 0 {
		c.QEMU = []string{"qemu-system-x86_64"}
	}
	setDefault(&c.VCPUs, 2)
	setDefault(&c.MemMiB, 4096)
	setDefault(&c.ScratchMiB, 20<<10)
	setDefault(&c.ResultsMiB, 4<<10)
	setDefault(&c.Attempts, 4)
	if c.BootLimit == 0 {
		c.BootLimit = defaultBootLimit
	}
	if c.Say == nil {
		c.Say = func(string, ...any) {}
	}
	return nil
}

func setDefault(v *int, to int) {
	if *v == 0 {
		*v = to
	}
}
