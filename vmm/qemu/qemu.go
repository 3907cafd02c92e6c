// Package qemu runs VMs with QEMU's microvm machine, under KVM or under QEMU's
// software emulation (TCG).
//
// One process is one VM: in a session of its own, under the uid and in the
// network namespace of its Spec, with seccomp on and without the means to start
// another program. It does not depend on the process that started it: a handle
// can be dropped, and Adopt takes the VM over again by PID, start time and boot
// ID, over the same control socket.
//
// The process gets nothing of Spec.Dir but open descriptors (console log, error
// log, control socket, kernel, initrd): the directory stays with the caller, so
// a QEMU that was taken over cannot plant links for a privileged reader. What it
// must be able to open by path as its own uid is the disk and what the disk is
// backed by.
//
// Software emulation is no security boundary; its makers say so.
package qemu

import (
	"context"
	"fmt"
	"log/slog"
	"os/exec"
	"regexp"
	"sync"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// Name is what this driver calls itself in records.
const Name = "qemu"

// The accelerators.
const (
	KVM = "kvm"
	TCG = "tcg"
)

const (
	defaultBinary     = "qemu-system-x86_64"
	defaultConsole    = 1 << 20
	defaultStartLimit = 30 * time.Second
)

// Config says how VMs are run. Only Accelerator must be set.
type Config struct {
	// Binary is QEMU; the default is qemu-system-x86_64 on PATH.
	Binary string
	// Accelerator is KVM or TCG. Probe finds out which works here.
	Accelerator string
	// Reason says why this accelerator, in a sentence for people.
	Reason string
	// ConsoleLimit is how much of a console log is kept, in bytes; the default is 1 MiB.
	ConsoleLimit int64
	// StartLimit bounds Start, from the fork to a running VM; the default is 30 s.
	StartLimit time.Duration
	// Log gets one line per VM that starts or ends; nil drops them.
	Log *slog.Logger
}

// Driver starts VMs with one QEMU and one accelerator.
type Driver struct {
	config  Config
	binary  string // absolute
	version string
	tscKHz  int    // under TCG only
	cpu     string // under KVM only: the host's

	mu   sync.Mutex
	held map[string]int // directories of VMs that somebody holds, for Sweep
}

// New looks at QEMU and, for software emulation, measures the clock that guests
// will run by, which takes 200 ms once per process.
func New(config Config) (*Driver, error) {
	if config.Accelerator != KVM && config.Accelerator != TCG {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "accelerator %q is neither %s nor %s", config.Accelerator, KVM, TCG)
	}
	d := &Driver{config: withDefaults(config), held: map[string]int{}}
	var err error
	if d.binary, err = exec.LookPath(d.config.Binary); err != nil {
		return nil, sandbox.Errorf(sandbox.KindUnsupported, "find qemu: %w", err)
	}
	if d.version, err = version(d.binary); err != nil {
		return nil, err
	}
	if config.Accelerator == TCG {
		if d.tscKHz, err = kernel.TSCkHz(); err != nil {
			return nil, fmt.Errorf("measure the clock for software emulation: %w", err)
		}
	} else {
		d.cpu = kernel.CPUIdentity()
	}
	return d, nil
}

func withDefaults(c Config) Config {
	if c.Binary == "" {
		c.Binary = defaultBinary
	}
	if c.ConsoleLimit <= 0 {
		c.ConsoleLimit = defaultConsole
	}
	if c.StartLimit <= 0 {
		c.StartLimit = defaultStartLimit
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Capabilities says what this driver runs VMs with.
func (d *Driver) Capabilities() vmm.Capabilities {
	return vmm.Capabilities{
		Driver: Name, Version: d.version, Accelerator: d.config.Accelerator, Reason: d.config.Reason,
		OverheadMiB: d.overheadMiB(), Compat: d.compat(),
	}
}

var versionPattern = regexp.MustCompile(`version (\d+\.\d+\.\d+)`)

func version(binary string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return "", sandbox.Errorf(sandbox.KindUnsupported, "ask %s for its version: %w", binary, err)
	}
	m := versionPattern.FindSubmatch(out)
	if m == nil {
		return "", sandbox.Errorf(sandbox.KindUnsupported, "%s does not say its version: %.80q", binary, out)
	}
	return string(m[1]), nil
}
