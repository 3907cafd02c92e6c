// Package vmmtest is the conformance suite of VMM drivers: what a host may rely
// on, whichever driver it uses. The fake passes it too, so a test over the fake
// means something.
package vmmtest

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// Guest is what the guest of a Spec does after it has printed Marker.
type Guest string

// The guests.
const (
	Hold     Guest = "hold"     // nothing, for ever
	PowerOff Guest = "poweroff" // powers the machine off, seconds after it has booted
	Panic    Guest = "panic"    // panics the kernel
	OOM      Guest = "oom"      // takes all memory, until the kernel gives up
	Count    Guest = "count"    // prints "line N …" of a kilobyte, for ever
	// Remember writes and zeroes pages for ever, whose content it can tell, and
	// looks at all of them between: it prints Remembers each time they are right,
	// or Forgot.
	Remember Guest = "remember"
)

// What Remember prints.
const (
	Remembers = "GUEST-REMEMBERS"
	Forgot    = "GUEST-FORGOT"
)

// Marker is in the console of every guest that has booted.
const Marker = "GUEST-UP"

// Harness is what a driver's test gives to the suite.
type Harness struct {
	// Driver makes a driver as a restarted agent does: it must find the machines
	// of the ones before.
	Driver func(t *testing.T) vmm.Driver
	// Spec describes a small VM with such a guest and a directory of its own.
	Spec func(t *testing.T, guest Guest) vmm.Spec
	// KillOutside ends the VMM process behind the driver's back, as kill -9 does.
	KillOutside func(t *testing.T, m vmm.Machine)
	// Alive asks the system, not the driver, whether the VMM process exists.
	Alive func(t *testing.T, r vmm.Record) bool
	// BootLimit is how long a boot may take here.
	BootLimit time.Duration
	// ConsoleKeep is how many bytes of console the driver was told to keep, and
	// ConsoleDisk what the log takes on disk now; nil where there is no file.
	ConsoleKeep int
	ConsoleDisk func(t *testing.T, r vmm.Record) int64
	// Boots is how many boots in a row must all succeed.
	Boots int
	// Generations is how many times in a row a guest is saved and restored.
	Generations int
	// Memory gives the memory of a saved guest to its restore. It is in a flat file,
	// and the runs of it differ from what the guest was started with: what the last
	// call was about, or zeros. Nil gives the flat file.
	Memory func(t *testing.T, flat string, runs []vmm.PageRun) *os.File
	// MayHang says that a guest which wants a page that cannot be read may stand
	// still for ever, or reset its machine, instead of ending by it: KVM drops the
	// error, or makes a page fault of it (docs/decisions.md).
	MayHang bool
}

// noticed is how soon the end of a process must be known; it is far from what
// it takes, so that only a driver that does not notice is late.
const noticed = 20 * time.Second

// Run runs the suite; fresh makes a harness for each test.
func Run(t *testing.T, fresh func(t *testing.T) Harness) {
	for _, tt := range []struct {
		name string
		test func(t *testing.T, h Harness)
	}{
		{"a guest boots and outlives the call that started it", boots},
		{"a power-off is the guest's own end", powerOff},
		{"a panic is the guest's own end, with its message", panics},
		{"a guest out of memory has a cause of its own", outOfMemory},
		{"Kill ends it, and may be called twice", kill},
		{"a process that is killed from outside is noticed at once", killedOutside},
		{"Adopt takes over what Release left", adopt},
		{"an adopted VM that powers off says so", adoptedPowerOff},
		{"an adopted VM that is killed from outside is noticed", adoptedKilled},
		{"Adopt of a dead VM is not_found", adoptDead},
		{"Adopt touches nobody but the very process", adoptStranger},
		{"Sweep ends what nobody holds, and nothing else", sweep},
		{"a frozen VM stands still until it is thawed", freeze},
		{"a VM stays frozen while nobody holds it", adoptedFrozen},
		{"a frozen VM can be killed, and dies noticed", frozenEnds},
		{"a saved VM is restored as it was, generation after generation", generations},
		{"two are restored from one, and what cannot be restored is refused", forks},
		{"console offsets", consoleOffsets},
		{"a guest that prints for ever fills no disk", consoleBounded},
		{"a failed Start leaves nothing", failedStart},
		{"a cancelled Start leaves nothing", cancelledStart},
		{"many boots in a row", manyBoots},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, fresh(t)) })
	}
}

// start boots a guest, and kills it when the test ends.
func start(t *testing.T, h Harness, d vmm.Driver, guest Guest) vmm.Machine {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	m, err := d.Start(ctx, h.Spec(t, guest))
	cancel() // a VM must not die because the call's context ends
	if err != nil {
		t.Fatal(err)
	}
	cleanUp(t, m)
	return m
}

func cleanUp(t *testing.T, m vmm.Machine) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), noticed)
		defer cancel()
		_ = m.Kill(ctx) // an error if the test released the handle
		if err := m.Release(); err != nil {
			t.Errorf("release: %v", err)
		}
	})
}

// booted waits for the guest's marker.
func booted(t *testing.T, h Harness, m vmm.Machine) {
	t.Helper()
	shows(t, h, m, Marker)
}

func shows(t *testing.T, h Harness, m vmm.Machine, text string) {
	t.Helper()
	deadline := time.Now().Add(h.BootLimit)
	for !strings.Contains(console(t, m), text) {
		select {
		case <-m.Done():
			if strings.Contains(console(t, m), text) {
				return
			}
			t.Fatalf("the VM ended (%+v) before its console showed %q:\n%s", m.Exit(), text, consoleEnd(t, m))
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v the console does not show %q:\n%s", h.BootLimit, text, consoleEnd(t, m))
		}
	}
}

func console(t *testing.T, m vmm.Machine) string {
	t.Helper()
	data, _, err := m.Console(0, 4<<20)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// consoleEnd is as much of it as people read.
func consoleEnd(t *testing.T, m vmm.Machine) string {
	t.Helper()
	text := console(t, m)
	return text[max(0, len(text)-4000):]
}

func ended(t *testing.T, m vmm.Machine, within time.Duration) vmm.Exit {
	t.Helper()
	within = testkit.Patience(within)
	select {
	case <-m.Done():
	case <-time.After(within):
		select { // one with two ready cases takes either
		case <-m.Done():
		default:
			t.Fatalf("after %v it still runs; its console:\n%s", within, consoleEnd(t, m))
		}
	}
	exit := m.Exit()
	if exit.At.IsZero() || exit.Detail == "" {
		t.Errorf("an incomplete exit: %+v", exit)
	}
	return exit
}

func wantCause(t *testing.T, exit vmm.Exit, want sandbox.Cause) {
	t.Helper()
	if exit.Cause != want {
		t.Errorf("cause %s (%s), want %s", exit.Cause, exit.Detail, want)
	}
}

func boots(t *testing.T, h Harness) {
	d := h.Driver(t)
	m := start(t, h, d, Hold)
	booted(t, h, m)
	r := m.Record()
	if r.Driver != d.Capabilities().Driver || r.PID == 0 || r.StartTime == 0 || r.BootID == "" || r.Dir == "" || r.ID == "" {
		t.Errorf("an incomplete record: %+v", r)
	}
	if !h.Alive(t, r) {
		t.Errorf("no process %d", r.PID)
	}
	select {
	case <-m.Done():
		t.Errorf("it ended by itself: %+v", m.Exit())
	default:
	}
}

func powerOff(t *testing.T, h Harness) {
	m := start(t, h, h.Driver(t), PowerOff)
	exit := ended(t, m, h.BootLimit)
	wantCause(t, exit, sandbox.CauseGuestExit)
	if exit.Reset {
		t.Errorf("it switched itself off, and is said to have rebooted: %+v", exit)
	}
	if !strings.Contains(console(t, m), Marker) {
		t.Error("the console is not readable after the end")
	}
	if err := m.Kill(t.Context()); err != nil {
		t.Errorf("Kill after the end: %v", err)
	}
	wantCause(t, m.Exit(), sandbox.CauseGuestExit)
}

func panics(t *testing.T, h Harness) {
	exit := ended(t, start(t, h, h.Driver(t), Panic), h.BootLimit)
	wantCause(t, exit, sandbox.CauseGuestExit)
	if !strings.Contains(exit.Detail, "panic") || !strings.Contains(exit.Detail, "kill init") {
		t.Errorf("the detail %q does not tell of the panic", exit.Detail)
	}
	if !exit.Reset {
		t.Errorf("it rebooted after a panic: %+v", exit)
	}
}

func outOfMemory(t *testing.T, h Harness) {
	wantCause(t, ended(t, start(t, h, h.Driver(t), OOM), 2*h.BootLimit), sandbox.CauseOOMGuest)
}

func kill(t *testing.T, h Harness) {
	m := start(t, h, h.Driver(t), Hold)
	for range 2 {
		if err := m.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantCause(t, ended(t, m, 0), sandbox.CauseUser) // it is gone when Kill returns
	}
	if h.Alive(t, m.Record()) {
		t.Error("its process is there after Kill")
	}
}

func killedOutside(t *testing.T, h Harness) {
	m := start(t, h, h.Driver(t), Hold)
	h.KillOutside(t, m)
	exit := ended(t, m, noticed)
	wantCause(t, exit, sandbox.CauseVMMCrash)
	if !strings.Contains(exit.Detail, "SIGKILL") {
		t.Errorf("the detail %q does not name the signal", exit.Detail)
	}
}

func manyBoots(t *testing.T, h Harness) {
	d := h.Driver(t)
	for i := range h.Boots {
		started := time.Now()
		m := start(t, h, d, Hold)
		booted(t, h, m)
		t.Logf("boot %d of %d: first process after %v", i+1, h.Boots, time.Since(started).Round(time.Millisecond))
		if err := m.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
