// Package disk is the seam to root disks: something a VMM can open, made from
// an immutable base and a private copy-on-write overlay.
//
// The suite in disktest says what every driver does.
package disk

import (
	"context"
)

// Config says what a disk is made from. It is plain data, stored by the host so
// that Restore finds the same disk again.
type Config struct {
	// Dir is a private, existing directory for the overlay.
	Dir string `json:"dir"`
	// Base is the immutable image, a raw file.
	Base string `json:"base"`
	// SizeBytes is what the guest sees; at least the size of the base.
	SizeBytes int64 `json:"size_bytes"`
	// UID and GID own the overlay: the VMM process of this one sandbox.
	UID int `json:"uid"`
	GID int `json:"gid"`
}

// Disk is one sandbox's root disk.
type Disk interface {
	// Path and Format are what a VMM opens.
	Path() string
	Format() string
	// Allocated is what the overlay takes on the host, in bytes of allocated
	// blocks.
	Allocated() (int64, error)
	// Close detaches and keeps the data: Restore finds it again.
	Close(ctx context.Context) error
	// Remove deletes the overlay. Removing what is gone already is success.
	Remove(ctx context.Context) error
}

// Driver makes disks.
type Driver interface {
	// Create makes a new overlay. On error nothing of it is left.
	Create(ctx context.Context, config Config) (Disk, error)
	// Restore attaches an overlay that Create made, after a restart of the
	// process or of the machine. A missing one is a not_found error.
	Restore(ctx context.Context, config Config) (Disk, error)
}
