package vmmtest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// leftovers fails when a Start that failed left a descriptor or a file.
func leftovers(t *testing.T, spec vmm.Spec, fds int) {
	t.Helper()
	testkit.Eventually(t, noticed, "as many descriptors as before", func() bool { return testkit.OpenFDs(t) <= fds })
	entries, err := os.ReadDir(spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		t.Errorf("left behind: %s", e.Name())
	}
}

func failedStart(t *testing.T, h Harness) {
	d := h.Driver(t)
	for what, change := range map[string]func(s *vmm.Spec){
		"kernel": func(s *vmm.Spec) { s.Kernel = filepath.Join(s.Dir, "missing") },
		"initrd": func(s *vmm.Spec) { s.Initrd = filepath.Join(s.Dir, "missing") },
		"disk":   func(s *vmm.Spec) { s.DiskPath, s.DiskFormat = filepath.Join(s.Dir, "missing"), "raw" },
	} {
		spec := h.Spec(t, Hold)
		change(&spec)
		fds := testkit.OpenFDs(t)
		m, err := d.Start(t.Context(), spec)
		if err == nil || m != nil {
			t.Errorf("a missing %s: %v, %v", what, m, err)
			continue
		}
		if !strings.Contains(err.Error(), what) {
			t.Errorf("a missing %s: the error %q does not name it", what, err)
		}
		leftovers(t, spec, fds)
	}
}

func cancelledStart(t *testing.T, h Harness) {
	d, spec := h.Driver(t), h.Spec(t, Hold)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	fds := testkit.OpenFDs(t)
	if m, err := d.Start(ctx, spec); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, %v", m, err)
	}
	leftovers(t, spec, fds)
}
