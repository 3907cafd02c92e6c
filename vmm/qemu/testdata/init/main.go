// Command init is the /init of the guests that the tests of vmm/qemu boot. The kernel parameter
// test.do says what it does after its first line.
package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	var up unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &up)
	_ = os.Mkdir("/proc", 0o755)
	_ = syscall.Mount("proc", "/proc", "proc", 0, "")
	cmdline, err := os.ReadFile("/proc/cmdline")
	say("GUEST-UP uptime=%dms err=%v", up.Nano()/1e6, err)
	do := "hold"
	for _, word := range strings.Fields(string(cmdline)) {
		if value, ok := strings.CutPrefix(word, "test.do="); ok {
			do = value
		}
	}
	act(do)
	for {
		time.Sleep(time.Hour)
	}
}

func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

func act(do string) {
	switch do {
	case "poweroff":
		time.Sleep(3 * time.Second) // a test releases and adopts the VM first
		unix.Sync()
		say("poweroff: %v", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
	case "reboot":
		say("reboot: %v", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART))
	case "notimer": // what the kernel says when the host was too busy
		say("[    0.9] APIC frequency too slow, disabling apic timer")
	case "panic":
		os.Exit(3) // the death of PID 1
	case "oom":
		eat()
	case "count":
		for i := 0; ; i++ {
			say("line %d %s", i, strings.Repeat("x", 1000))
		}
	case "remember":
		remember(16)
	case "remember-much":
		remember(192)
	case "disk":
		writeDisk()
	case "devices":
		devices()
	case "clock":
		for i := range 10 {
			say("TICK %d", i)
			time.Sleep(time.Second)
		}
	}
	say("GUEST-DONE %s", do)
}

// eat takes all memory in PID 1, which the kernel never kills.
func eat() {
	var all [][]byte
	for {
		all = append(all, bytes.Repeat([]byte{1}, 1<<20))
	}
}

// loadModules loads what is in /modules in the order of the names.
func loadModules() {
	_ = os.Mkdir("/sys", 0o755)
	_ = syscall.Mount("sysfs", "/sys", "sysfs", 0, "")
	modules, _ := filepath.Glob("/modules/*.ko")
	for _, path := range modules {
		f, err := os.Open(path)
		if err != nil {
			say("open %s: %v", path, err)
			continue
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
			say("load %s: %v", path, err)
		}
		_ = f.Close()
	}
	_ = os.Mkdir("/dev", 0o755)
	_ = syscall.Mount("devtmpfs", "/dev", "devtmpfs", 0, "")
}

// devices tells which block and network devices appeared.
func devices() {
	loadModules()
	head := make([]byte, 16)
	for range 50 {
		if f, err := os.OpenFile("/dev/vda", os.O_RDWR, 0); err == nil {
			_, err = f.ReadAt(head, 0)
			say("vda: %q %v", bytes.Trim(head, "\x00"), err)
			_, err = f.WriteAt([]byte("written by guest"), 4096)
			say("vda write: %v %v", err, f.Sync())
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	for _, name := range []string{"block/vda/size", "class/net/eth0/address"} {
		data, err := os.ReadFile("/sys/" + name)
		say("%s: %s %v", name, strings.TrimSpace(string(data)), err)
	}
}
