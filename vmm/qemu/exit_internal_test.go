package qemu

import (
	"strings"
	"syscall"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestJudge(t *testing.T) {
	const (
		paniced = "[ 1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300\r\n"
		oomed   = "[ 1.0] Kernel panic - not syncing: System is deadlocked on memory\r\n"
		oomed2  = "Kernel panic - not syncing: Out of memory: compulsory panic_on_oom is enabled\r\n"
	)
	const badPage = "error: kvm run failed Bad address\nRAX=0000000000000000\n"
	sigbus := kernel.Status{Known: true, Signal: syscall.SIGBUS}
	clean := kernel.Status{Known: true}
	sigkill := kernel.Status{Known: true, Signal: syscall.SIGKILL}
	for _, tt := range []struct {
		name   string
		e      evidence
		cause  sandbox.Cause
		detail string
	}{
		{"a power-off", evidence{status: clean, shutdown: "guest-shutdown"}, sandbox.CauseGuestExit, "powered off"},
		{"a power-off after an old panic line", evidence{status: clean, shutdown: "guest-shutdown", console: paniced}, sandbox.CauseGuestExit, "powered off"},
		{"a reboot", evidence{status: clean, shutdown: "guest-reset"}, sandbox.CauseGuestExit, "rebooted"},
		{"a panic", evidence{status: clean, shutdown: "guest-reset", console: paniced}, sandbox.CauseGuestExit, "kernel panic: Attempted to kill init!"},
		{"no memory left", evidence{status: clean, shutdown: "guest-reset", console: oomed}, sandbox.CauseOOMGuest, "deadlocked on memory"},
		{"panic on OOM", evidence{status: clean, shutdown: "guest-reset", console: oomed2}, sandbox.CauseOOMGuest, "out of memory"},
		{"a power-off seen by an adopter", evidence{shutdown: "guest-shutdown"}, sandbox.CauseGuestExit, "powered off"},
		{"a clean end whose event was lost", evidence{status: clean, console: paniced}, sandbox.CauseGuestExit, "kernel panic"},
		{"Kill", evidence{killed: true, status: sigkill}, sandbox.CauseUser, "on request"},
		{"Kill, too late", evidence{killed: true, status: clean, shutdown: "guest-shutdown"}, sandbox.CauseGuestExit, "powered off"},
		{"a signal from outside", evidence{status: sigkill, log: "a\nb\n"}, sandbox.CauseVMMCrash, "qemu: killed by signal SIGKILL: b"},
		{"a guest that claims a panic under a killed VMM", evidence{status: sigkill, console: oomed}, sandbox.CauseVMMCrash, "SIGKILL"},
		{"SIGTERM", evidence{status: clean, shutdown: "host-signal"}, sandbox.CauseVMMCrash, `after a shutdown for "host-signal"`},
		{"an error of QEMU", evidence{status: kernel.Status{Known: true, Code: 1}, log: "qemu: no"}, sandbox.CauseVMMCrash, "exit status 1: qemu: no"},
		{"an adopted VM that vanished", evidence{}, sandbox.CauseVMMCrash, "exit status unknown"},
		{"a VM that QEMU stopped", evidence{fault: "it stopped the VM: internal-error", status: sigkill}, sandbox.CauseVMMCrash, "internal-error"},
		{"a restored VM sent SIGBUS", evidence{restored: true, status: sigbus}, sandbox.CausePagerFault, "could not be read"},
		{"a booted VM sent SIGBUS", evidence{status: sigbus}, sandbox.CauseVMMCrash, "SIGBUS"},
		{"a restored VM that KVM stopped over a page", evidence{restored: true, fault: "it stopped the VM: internal-error", status: sigkill, log: badPage}, sandbox.CausePagerFault, "could not be read"},
		{"a booted VM that KVM stopped over a page", evidence{fault: "it stopped the VM: internal-error", status: sigkill, log: badPage}, sandbox.CauseVMMCrash, "internal-error"},
		{"a restored VM that says so and was killed", evidence{restored: true, killed: true, status: sigkill, log: badPage}, sandbox.CauseUser, "on request"},
	} {
		cause, detail := judge(tt.e)
		if cause != tt.cause || !strings.Contains(detail, tt.detail) {
			t.Errorf("%s: %s, %q; want %s, …%s…", tt.name, cause, detail, tt.cause, tt.detail)
		}
	}
}
