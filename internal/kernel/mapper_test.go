package kernel_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// hasNode says whether a node is there and opens.
func hasNode(path string) bool {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return false
	}
	return f.Close() == nil
}

func TestDeviceMapperHasItsTargets(t *testing.T) {
	testkit.Root(t)
	err := kernel.DeviceMapper("linear", "zero", "snapshot", "verity")
	testkit.Require(t, "dm", err == nil, fmt.Sprint(err))
	if err := kernel.DeviceMapper(); err != nil {
		t.Errorf("without a target: %v", err)
	}
	err = kernel.DeviceMapper("linear", "no-such-thing")
	if err == nil || !strings.Contains(err.Error(), "no target no-such-thing: load the module dm-no-such-thing") {
		t.Errorf("a target that is not there: %v", err)
	}
	if err := kernel.Loop(); err != nil {
		t.Errorf("a machine with device-mapper is to have loop devices: %v", err)
	}
}

// TestWithoutDeviceMapperTheReasonIsSaid, with what to do, and not an errno.
func TestWithoutDeviceMapperTheReasonIsSaid(t *testing.T) {
	for _, tt := range []struct {
		node, cure string
		ask        func() error
	}{
		{"/dev/mapper/control", "load the module dm_mod", func() error { return kernel.DeviceMapper("linear") }},
		{"/dev/loop-control", "load the module loop", kernel.Loop},
	} {
		err := tt.ask()
		_, missing := os.Lstat(tt.node)
		switch {
		case hasNode(tt.node):
			if err != nil {
				t.Logf("%s opens, and it is not enough: %v", tt.node, err)
			}
		case errors.Is(missing, fs.ErrNotExist):
			if err == nil || !strings.Contains(err.Error(), tt.node+" does not exist: "+tt.cure) {
				t.Errorf("%v, want that %s does not exist and %q", err, tt.node, tt.cure)
			}
		case err == nil || !strings.Contains(err.Error(), tt.node+" exists, but"):
			t.Errorf("%v, want that %s exists, and why it does not open", err, tt.node)
		}
	}
}

// TestLoopTakesNoDevice: asking leaves every loop device as it was.
func TestLoopTakesNoDevice(t *testing.T) {
	testkit.Root(t)
	err := kernel.Loop()
	testkit.Require(t, "loop", err == nil, fmt.Sprint(err))
	before := boundLoops(t)
	for range 100 {
		if err := kernel.Loop(); err != nil {
			t.Fatal(err)
		}
	}
	if after := boundLoops(t); after > before+50 { // others may take some meanwhile, and not one for each call
		t.Errorf("from %d loop devices in use to %d", before, after)
	}
	fds := testkit.OpenFDs(t)
	if err := kernel.Loop(); err != nil || testkit.OpenFDs(t) != fds {
		t.Errorf("%v, from %d open files to %d", err, fds, testkit.OpenFDs(t))
	}
}

func boundLoops(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if _, err := os.Stat("/sys/block/" + e.Name() + "/loop/backing_file"); err == nil {
			n++
		}
	}
	return n
}
