// Package vmm is the seam to virtual machine monitors: one process that runs
// one VM.
//
// A Driver starts machines and takes running ones over again after the process
// that started them is gone: a machine never depends on the life of whoever
// holds its Machine. A frozen machine can be saved, and be started again from
// what was saved, any number of times: what its devices are (Save), and the
// pages of its memory that are not what it was started with (Changed,
// ReadMemory). Where these bytes are kept is somebody else's business.
//
// The suite in vmmtest says what every driver does.
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

	// DiskPath is seen by the guest as its first virtio block device. The driver
	// gives it a serial number that differs from start to start, and from one restore
	// to the next: by it, a guest tells whether it was restored.
	DiskPath   string
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
	// Cgroup is the control group (version 2) that the VMM process is born in;
	// empty means the caller's.
	Cgroup string

	// Restore starts the VM from what a frozen one was saved as, instead of
	// booting it: it is frozen when Start returns, and Thaw lets it run. The rest
	// of the Spec is what the saved VM's was; paths, descriptors, the UID and the
	// namespace may be others. What the disk holds must be what it held then.
	Restore *Restore
}

// Restore is what a VM was saved as.
type Restore struct {
	// Memory is the guest's memory as it was, MemMiB large: mapped privately, and
	// never written to. It stays as it is while the VM runs. The driver duplicates
	// the descriptor, the caller keeps its own.
	Memory *os.File
	// Devices is what Save gave.
	Devices []byte
	// Compat is the Capabilities.Compat of the driver that saved it. A driver with
	// another one refuses, as a conflict, with both values.
	Compat string
	// Console is what the guest had printed, or the end of that: the console log
	// begins with it.
	Console []byte
}

// PageSize is the unit in which memory is compared and kept, in bytes.
const PageSize = 4096

// PageRun is a run of neighbouring pages of guest memory.
type PageRun struct{ Start, Pages int64 }

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
	// Reset says that the guest ended itself by a reboot or a panic, and did not
	// switch its machine off.
	Reset bool
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
	// Freeze stops the virtual CPUs and returns when none runs and no disk
	// request is under way. Freezing a frozen VM is success; an adopted VM is as
	// frozen as it was.
	Freeze(ctx context.Context) error
	// Thaw lets them run on; for a VM that runs it is success.
	Thaw(ctx context.Context) error
	// Save returns the state of the devices of a frozen VM, which stays frozen
	// and can run on. Like the four after it, it refuses a VM that runs (conflict).
	Save(ctx context.Context) ([]byte, error)
	// Changed lists, in ascending order and without neighbours, the pages of a
	// frozen VM that may differ from what it was started with: Restore.Memory, or
	// zeros if it was booted. Never too few; a page that the guest made zero is
	// one of them.
	Changed(ctx context.Context) ([]PageRun, error)
	// ReadMemory reads the memory of a frozen VM: the guest-physical address
	// space without its holes, as Restore.Memory has it. It reads all of p or
	// fails, also past the end.
	ReadMemory(p []byte, off int64) error
	// ReadPages reads all pages of these runs of a frozen VM into p, one after the
	// other: p is as large as they are together. It costs one question to the VMM,
	// as each ReadMemory does, however many runs there are.
	ReadPages(ctx context.Context, p []byte, runs []PageRun) error
	// SwitchDisk makes a frozen VM write to another overlay from now on, an
	// existing qcow2 file whose backing file is what the VM has written to so far;
	// that is only read from then on, and may be looked at by others. For drivers
	// of raw devices, which switch below the VMM, it is not called.
	SwitchDisk(ctx context.Context, path string) error
	// Kill ends the VMM process and returns when it is gone; also of a frozen VM.
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
	// Compat is everything that a saved VM needs to find again: "qemu 7.2.22,
	// tcg, max". Equal means that it can be restored.
	Compat string
}

// Driver makes machines.
type Driver interface {
	Capabilities() Capabilities
	// Start boots a VM and returns once its VMM process runs; the guest may
	// still be booting; or restores one (Spec.Restore), which is frozen then. On
	// error nothing of it is left.
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
