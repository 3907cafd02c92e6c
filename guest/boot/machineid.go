package boot

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
)

// machineIDs are where a machine's ID is; the second is often a link to the first.
var machineIDs = []string{"/etc/machine-id", "/var/lib/dbus/machine-id"}

// NewMachineID gives the machine a new ID, in those of its files that the image
// has. An image without them, or with an empty one that it wants to be filled,
// gets what it is made for.
func (s *System) NewMachineID() error { return writeMachineID(machineIDs) }

// writeMachineID writes in place: programs map these files and mount things on
// them.
func writeMachineID(paths []string) error {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	// As systemd makes them: a random UUID, version 4.
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	text := hex.EncodeToString(id) + "\n"
	var errs []error
	for _, path := range paths {
		f, err := openRegular(path, os.O_WRONLY)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = errors.Join(overwrite(f, text), f.Close())
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
