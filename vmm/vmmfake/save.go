package vmmfake

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// devices is what the fake has instead of devices: the shape of the machine.
type devices struct {
	Driver string `json:"driver"`
	VCPUs  int    `json:"vcpus"`
	MemMiB int    `json:"mem_mib"`
	Disk   bool   `json:"disk"`
	Net    bool   `json:"net"`
}

func devicesOf(spec vmm.Spec) devices {
	return devices{Name, spec.VCPUs, spec.MemMiB, spec.DiskPath != "", spec.Tap != nil}
}

func (d devices) String() string {
	has := map[bool]string{true: "a", false: "no"}
	return fmt.Sprintf("%d vCPUs, %d MiB, %s disk and %s network", d.VCPUs, d.MemMiB, has[d.Disk], has[d.Net])
}

// checkRestore refuses what a real driver refuses.
func (d *Driver) checkRestore(spec vmm.Spec) error {
	from := spec.Restore
	if from == nil {
		return nil
	}
	if mine := d.Capabilities().Compat; from.Compat != mine {
		return sandbox.Errorf(sandbox.KindConflict, "start fake VM: it was saved by %q, this is %q", from.Compat, mine)
	}
	var saved devices
	if err := json.Unmarshal(from.Devices, &saved); err != nil {
		return sandbox.Errorf(sandbox.KindInvalid, "start fake VM: read the state of its devices: %w", err)
	}
	if want := devicesOf(spec); saved != want {
		return sandbox.Errorf(sandbox.KindInvalid, "start fake VM: it was saved with %s, not with %s", saved, want)
	}
	return checkMemory(from.Memory, int64(spec.MemMiB)<<20)
}

func checkMemory(f *os.File, want int64) error {
	if f == nil {
		return sandbox.Errorf(sandbox.KindInvalid, "start fake VM: there is no memory to restore")
	}
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("start fake VM: open memory: %w", err)
	}
	if info.Size() != want {
		return sandbox.Errorf(sandbox.KindInvalid, "start fake VM: its memory has %d bytes, not %d", info.Size(), want)
	}
	return nil
}

// whileFrozen does something that only a frozen machine allows.
func (m *machine) whileFrozen(ctx context.Context, what string, do func() error) error {
	if err := errors.Join(ctx.Err(), fault.Point(ctx, "vmmfake/"+what)); err != nil {
		return fmt.Errorf("fake: %s: %w", what, err)
	}
	var err error
	gone := m.whileAlive(func() {
		if !m.gate.isShut() {
			err = sandbox.Errorf(sandbox.KindConflict, "fake: %s: the machine runs", what)
			return
		}
		err = do()
	})
	return errors.Join(gone, err)
}

// Save returns the shape of the machine.
func (m *machine) Save(ctx context.Context) (saved []byte, err error) {
	err = m.whileFrozen(ctx, "save", func() error {
		saved, err = json.Marshal(devicesOf(m.spec))
		return err
	})
	return saved, err
}

// Changed lists what was written, whatever was written.
func (m *machine) Changed(ctx context.Context) (runs []vmm.PageRun, err error) {
	err = m.whileFrozen(ctx, "changed", func() error {
		runs = m.memory.changed()
		return nil
	})
	return slices.Clip(runs), err
}

// ReadMemory reads what the guest would.
func (m *machine) ReadMemory(p []byte, off int64) error {
	return m.whileFrozen(context.Background(), "read-memory", func() error {
		_, err := m.memory.read(p, off)
		return err
	})
}

// ReadPages reads run by run.
func (m *machine) ReadPages(ctx context.Context, p []byte, runs []vmm.PageRun) error {
	return m.whileFrozen(ctx, "read-pages", func() error {
		for _, r := range runs {
			if r.Pages < 0 || r.Pages > int64(len(p))/vmm.PageSize {
				return fmt.Errorf("fake: read pages: there is no room for %d pages at page %d", r.Pages, r.Start)
			}
			if _, err := m.memory.read(p[:r.Pages*vmm.PageSize], r.Start*vmm.PageSize); err != nil {
				return err
			}
			p = p[r.Pages*vmm.PageSize:]
		}
		if len(p) > 0 {
			return fmt.Errorf("fake: read pages: the runs end %d bytes too early", len(p))
		}
		return nil
	})
}

// SwitchDisk remembers the path.
func (m *machine) SwitchDisk(ctx context.Context, path string) error {
	return m.whileFrozen(ctx, "switch-disk", func() error {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("fake: switch disk: %w", err)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		m.disk = path
		return nil
	})
}
