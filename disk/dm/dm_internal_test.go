package dm

import (
	"testing"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/disk/disktest"
)

func TestConformance(t *testing.T) {
	everywhere(t, func(t *testing.T, r *rig) {
		disktest.Run(t, func(t *testing.T) disktest.Harness {
			sub := *r
			sub.t = t
			return disktest.Harness{
				Driver: r.driver,
				Write:  func(_ *testing.T, d disk.Disk, at int64, data []byte) { sub.write(d, at, data) },
				Read:   func(_ *testing.T, d disk.Disk, at int64, n int) []byte { return sub.read(d, at, n) },
			}
		})
		r.nothingRemains("by the suite")
	})
}
