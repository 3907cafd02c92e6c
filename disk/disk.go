// Package disk is the seam to root disks: something a VMM can open, made from
// an immutable base and a private copy-on-write overlay, or, after snapshots of a
// running VM, a line of them.
//
// The suite in disktest says what every driver does.
package disk

import (
	"context"
	"fmt"
)

// Config says what a disk is made from. It is plain data, stored by the host so
// that Restore finds the same disk again.
type Config struct {
	// Dir is a private, existing directory for the overlay.
	Dir string `json:"dir"`
	// Base is the immutable image, a raw file. Where a VMM opens it, its user may.
	Base string `json:"base"`
	// Layout is instead of Base, for drivers that put a base together from
	// several layers: the path of an immutable description (see dm.WriteLayout).
	Layout string `json:"layout,omitempty"`
	// SizeBytes is what the guest sees; at least the size of the base.
	SizeBytes int64 `json:"size_bytes"`
	// UID and GID own the overlay: the VMM process of this one sandbox.
	UID int `json:"uid"`
	GID int `json:"gid"`
}

// Disk is one sandbox's root disk.
type Disk interface {
	// Path and Format are what a VMM opens. The path is another one after Next, for
	// the next VMM.
	Path() string
	Format() string
	// Allocated is what the overlays take on the host, in bytes of allocated
	// blocks.
	Allocated() (int64, error)
	// Changed says what the overlays hold. Nothing may write to the disk until the
	// Changes are closed: the VM is frozen, with its requests finished, or gone.
	Changed(ctx context.Context) (Changes, error)
	// Prepare makes ready what Next needs, so that a VM stands still for as short
	// as can be. Next does it too. Where Next would refuse it does nothing.
	Prepare(ctx context.Context) error
	// Next moves the disk of a frozen VM on: what is written from now on goes into
	// a fresh overlay, and what was written before is Changes that stay as they are
	// until they are closed, whatever the VM does. No block is copied. Changed tells
	// of all overlays as before.
	//
	// Where the VMM has to open the new overlay itself, and stop writing to the one
	// before, switchTo is called with its path; else it is not. After an error the
	// disk is whole, and the VM may go on; whether it has moved is not known.
	// A disk of MaxOverlays overlays is a conflict: a pause makes them one again.
	Next(ctx context.Context, switchTo func(ctx context.Context, path string) error) (Changes, error)
	// Close detaches and keeps the data: Restore finds it again. What a VMM has
	// open stays attached.
	Close(ctx context.Context) error
	// Remove deletes the overlay. Removing what is gone already is success.
	Remove(ctx context.Context) error
}

// Driver makes disks.
type Driver interface {
	// Name is the driver's, for people and records: "dm", "qcow".
	Name() string
	// Create makes a new overlay. On error nothing of it is left.
	Create(ctx context.Context, config Config) (Disk, error)
	// Restore attaches an overlay that Create made, after a restart of the
	// process or of the machine. A missing one is a not_found error.
	Restore(ctx context.Context, config Config) (Disk, error)
	// Discard is Remove for what Restore cannot attach, because its base is gone
	// or damaged, or its config is not known: whatever disk is in dir.
	Discard(ctx context.Context, dir string) error
	// Sweep takes away what a crash left outside of the disks' directories and
	// that belongs to no disk in one of keep.
	Sweep(ctx context.Context, keep []string) error
	// Check says what has come to light of damage since the start. It costs
	// little while there is none.
	Check(ctx context.Context) (Report, error)
}

// Report is what Check found. Empty is good.
type Report struct {
	Damage []Damage // of what disks lie on
	Broken []Broken // disks that are lost
}

// Damage is a block of an immutable file that is not what it was.
type Damage struct {
	File  string
	Block int64 // of BlockBytes, counted from 0
	Cause string
}

// BlockBytes is the unit of Damage.
const BlockBytes = 4096

func (d Damage) String() string {
	return fmt.Sprintf("%s: block %d of 4 KiB (at byte %d) %s", d.File, d.Block, d.Block*BlockBytes, d.Cause)
}

// Broken is a disk whose overlay has failed: its guest gets errors from now on.
type Broken struct {
	Dir   string // of its Config
	Cause string
}
