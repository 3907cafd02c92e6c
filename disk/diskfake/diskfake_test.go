package diskfake_test

import (
	"testing"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/disk/diskfake"
	"github.com/dormouse-sandbox/dormouse/disk/disktest"
)

func TestConformance(t *testing.T) {
	for name, below := range map[string]bool{"as device-mapper": true, "as a VMM's own": false} {
		t.Run(name, func(t *testing.T) {
			disktest.Run(t, func(*testing.T) disktest.Harness {
				return disktest.Harness{Driver: &diskfake.Driver{Below: below}, Write: write, Read: read}
			})
		})
	}
}

func write(t *testing.T, d disk.Disk, offset int64, data []byte) {
	t.Helper()
	if err := diskfake.Write(d, data, offset); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, d disk.Disk, offset int64, length int) []byte {
	t.Helper()
	c, err := d.Changed(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, length)
	if _, err := c.ReadAt(got, offset); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	return got
}
