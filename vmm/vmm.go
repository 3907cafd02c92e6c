// Package vmm is the seam to virtual machine monitors: one process that runs
// one VM.
//
// A Driver starts machines and takes running ones over again after the process
// that started them is gone: a machine never depends on the life of whoever
// holds its Machine. The suite in vmmtest says what every driver does.
package vmm

import (
	"context"
	"os"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Spec is everything a driver needs to start a VM. It is plain data: disk,
// network and images come from other packages as paths and descriptors.
type Spec struct {
	ID sandbox.ID

	VCPUs  int
	MemMiB int

	Kernel  string // a bzImage or ELF file
	Initrd  string
	Cmdline string // the driver adds what it needs itself (console, clock source)

	DiskPath   string // seen by the guest as its first virtio block device
	DiskFormat string // "raw" or "qcow2"

	Tap *os.File // an attached TAP queue; the driver duplicates it, the caller keeps its own
	MAC string

	// Dir is a private, existing directory for this VM's socket and console log.
	// The driver makes it accessible to UID. Its path is short (a Unix socket
	// lives in it).
	Dir string

	// UID and GID run the VMM process; 0 leaves it as the caller (tests only).
	UID, GID int
	// NetNS is the path of the network namespace the VMM process lives in;
	// empty means the caller's.
	NetNS string
}

// Record is what a host writes down to find a VM again. It is stored as JSON.
type Record struct {
	ID        sandbox.ID `json:"id"`
	Driver    string     `json:"driver"`
	PID       int        `json:"pid"`
	StartTime uint64     `json:"start_time"` // field 22 of /proc/PID/stat, against reused PIDs
	BootID    string     `json:"boot_id"`    // /proc/sys/kernel/random/boot_id
	Dir       string     `json:"dir"`
}

// Exit says how a VM ended.
type Exit struct {
	Cause  sandbox.Cause // CauseGuestExit, CauseOOMGuest or CauseVMMCrash; CauseUser after Kill
	Detail string        // a sentence: "qemu: killed by signal SIGKILL"
	At     time.Time
	// Retry says that the boot failed for a reason which another start of the
	// same VM need not have.
	Retry bool
}

// Machine is one running VM. Its methods may be called from any goroutine.
type Machine interface {
	// Record is what Adopt needs. It does not change.
	Record() Record
	// Done is closed when the VMM process is gone.
	Done() <-chan struct{}
	// Exit says how it ended; only after Done is closed.
	Exit() Exit
	// Console returns bytes of the guest's console from offset on, at most max,
	// and the offset after them. Offsets count from the VM's start; what is no
	// longer kept is skipped. A negative offset counts from the end.
	Console(offset int64, max int) (data []byte, next int64, err error)
	// Kill ends the VMM process and returns when it is gone.
	Kill(ctx context.Context) error
	// Release gives up the handle and leaves the VM running.
	Release() error
}

// Capabilities says what a driver can do on this machine.
type Capabilities struct {
	Driver      string // "qemu"
	Version     string
	Accelerator string // "kvm" or "tcg"
	Reason      string // why this accelerator, in a sentence
	// OverheadMiB is what one VM costs the host at the most besides its guest's
	// memory.
	OverheadMiB int
}

// Driver makes machines.
type Driver interface {
	Capabilities() Capabilities
	// Start boots a VM and returns once its VMM process runs; the guest may
	// still be booting. On error nothing of it is left.
	Start(ctx context.Context, spec Spec) (Machine, error)
	// Adopt takes a running VM over. When it is gone the error's kind is
	// not_found, and nothing of its process is left.
	Adopt(ctx context.Context, record Record) (Machine, error)
	// Sweep kills every VMM process of this driver whose Spec.Dir lies below
	// root and that no unreleased Machine of this Driver value holds: what a
	// process left that died between starting a VM and writing its Record down.
	// It returns when they are gone.
	Sweep(ctx context.Context, root string) error
}
