package host

import "time"

// SetSilence shortens how long a silent guest is waited for, and returns what
// undoes it.
func SetSilence(d time.Duration) (undo func()) {
	before := silenceKept
	silenceKept = d
	return func() { silenceKept = before }
}
