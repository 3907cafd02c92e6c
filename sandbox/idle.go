package sandbox

import "time"

// Bounds of an idle policy. Zero means that a sandbox does not pause by itself.
const (
	MinAutoPause = time.Second
	MaxAutoPause = MaxTimeout
)

// CheckAutoPause checks after how long without activity a sandbox is paused.
func CheckAutoPause(d time.Duration) error {
	if d != 0 && (d < MinAutoPause || d > MaxAutoPause) {
		return Errorf(KindInvalid, "automatic pause is after %v, must be from %v to %v, or 0 for never", d, MinAutoPause, MaxAutoPause)
	}
	return nil
}
