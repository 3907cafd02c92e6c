// Command init is PID 1 of a lab: it makes a Linux host of a booted kernel, in
// a second or two, and then runs what the program outside tells it to, as root.
// It is a lab's whole init system; see package lab.
package main

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/lab/wire"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "core" { // as the kernel calls it, see corePattern
		if err := saveCore(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "lab: save core:", err)
			os.Exit(1)
		}
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "lab: this is the init of a lab; it has nothing to do elsewhere")
		os.Exit(2)
	}
	err := serve()
	fmt.Fprintln(os.Stderr, "lab: ends:", err)
	powerOff()
}

// host is a lab that is coming up.
type host struct {
	conn  *wire.Conn
	setup wire.Setup
	at    time.Time
	says  wire.Inside
}

// serve returns when the machine has to go off.
func serve() error {
	h := &host{at: time.Now()}
	err := h.up()
	if err != nil && h.conn == nil {
		return err // the console is all there is
	}
	if err != nil {
		return fmt.Errorf("%w; told: %v", err, h.conn.Send(wire.Fatal, []byte(err.Error())))
	}
	return newRunner(h.conn).serve()
}

// up brings the machine up, and says so outside.
func (h *host) up() error {
	for _, phase := range []struct {
		name string
		run  func() error
	}{
		{"mount the kernel's file systems", mountEarly},
		{"load the disk's modules", func() error { return loadModules("/modules") }},
		{"connect", h.connect},
		{"mount the root disk", mountRoot},
		{"switch root", switchRoot},
		{"mount", mountLate},
		{"mount disks", h.mountDisks},
		{"load modules", h.loadModules},
		{"settle", settle},
	} {
		if err := phase.run(); err != nil {
			return fmt.Errorf("%s: %w", phase.name, err)
		}
		h.says.Phases = append(h.says.Phases, wire.Phase{Name: phase.name, Took: h.lap()})
	}
	h.says.Missing = missing()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return err
	}
	h.says.Boot = time.Duration(now.Nano())
	h.says.Release = release()
	return h.conn.SendJSON(wire.Ready, h.says)
}

func (h *host) lap() time.Duration {
	took := time.Since(h.at)
	h.at = time.Now()
	return took
}

func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil { // cannot fail with a buffer of its own
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// powerOff ends everything and writes it to the disks. What is below /results is
// what somebody reads afterwards.
func powerOff() {
	_ = unix.Kill(-1, unix.SIGKILL) // none may be left
	saveKernelLog()
	unix.Sync()
	_ = unix.Mount("", results, "", unix.MS_REMOUNT|unix.MS_RDONLY, "") // the sync above is what counts
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Fprintln(os.Stderr, "lab: power off:", err)
	}
}
