package qemu

import (
	"fmt"
	"regexp"
	"strings"
	"syscall"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// evidence is what is known about the end of a QEMU process.
type evidence struct {
	restored bool          // its memory is a mapped file
	killed   bool          // we did it, because somebody asked
	fault    string        // we did it, because QEMU reported this
	status   kernel.Status // unknown for an adopted process: only its parent learns it
	shutdown string        // reason in QMP's SHUTDOWN event, if one came
	console  string        // the end of the guest's console
	log      string        // the end of QEMU's own output
}

// judge tells guest and VMM apart. The console is the guest's word, so it only
// refines a verdict that the guest ended itself.
func judge(e evidence) (sandbox.Cause, string) {
	switch {
	case e.byGuest():
		return guestEnd(e)
	case e.killed:
		return sandbox.CauseUser, "qemu: killed on request"
	case e.unread():
		return sandbox.CausePagerFault, "qemu: a page of the guest's saved memory could not be read"
	case e.fault != "":
		return sandbox.CauseVMMCrash, "qemu: " + e.fault
	case e.status.Known && e.status.Signal == 0 && e.status.Code == 0 && e.shutdown == "":
		return guestEnd(e) // the event was lost; QEMU ends with 0 only when told to
	}
	return sandbox.CauseVMMCrash, crashDetail(e)
}

func (e evidence) byGuest() bool { return strings.HasPrefix(e.shutdown, "guest-") }

// reset is for vmm.Exit.
func (e evidence) reset() bool { return e.byGuest() && e.shutdown != switchedOff }

// switchedOff is the reason of a guest that has powered off.
const switchedOff = "guest-shutdown"

// unread reports whether a page of a restored guest's memory could not be read:
// QEMU is then sent a signal, or, if it was the guest that wanted the page under
// KVM, is told by the kernel in so many words, and stops the VM.
func (e evidence) unread() bool {
	return e.restored && (e.status.Signal == syscall.SIGBUS || e.fault != "" && strings.Contains(e.log, badAddress))
}

const badAddress = "kvm run failed Bad address"

// DetailReset is said of a guest that rebooted and had printed no panic.
const DetailReset = "the guest rebooted, which ends it"

func guestEnd(e evidence) (sandbox.Cause, string) {
	if e.shutdown == switchedOff {
		return sandbox.CauseGuestExit, "the guest powered off"
	}
	line := panicLine(e.console)
	switch {
	case line == "" && e.shutdown == "":
		return sandbox.CauseGuestExit, "the guest ended, without saying how"
	case line == "":
		return sandbox.CauseGuestExit, DetailReset
	case outOfMemory.MatchString(line):
		return sandbox.CauseOOMGuest, "the guest ran out of memory: kernel panic: " + line
	}
	return sandbox.CauseGuestExit, "kernel panic: " + line
}

var (
	panicPattern = regexp.MustCompile(`Kernel panic - not syncing: ([^\r\n]*)`)
	outOfMemory  = regexp.MustCompile(`(?i)out of memory|deadlocked on memory`)
)

// panicLine is the message of the last kernel panic on a console.
func panicLine(console string) string {
	all := panicPattern.FindAllStringSubmatch(console, -1)
	if all == nil {
		return ""
	}
	return strings.TrimSpace(all[len(all)-1][1])
}

func crashDetail(e evidence) string {
	detail := "qemu: " + e.status.String()
	if !e.status.Known {
		detail = "qemu: ended, exit status unknown (another process had started it)"
	}
	if e.shutdown != "" {
		detail += fmt.Sprintf(", after a shutdown for %q", e.shutdown)
	}
	if line := lastLine(e.log); line != "" {
		detail += ": " + line
	}
	return detail
}

// lastLine is the last thing QEMU said, cut to a sensible length.
func lastLine(log string) string {
	const most = 300
	lines := strings.Split(strings.TrimSpace(log), "\n")
	line := strings.TrimSpace(lines[len(lines)-1])
	return strings.ToValidUTF8(line[max(0, len(line)-most):], "?")
}
