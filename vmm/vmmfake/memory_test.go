package vmmfake_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmfake"
)

// scribe is a guest that writes "life N" at the start of its second page, N
// being how often it was restored, and then waits.
func scribe(ctx context.Context, m vmmfake.Inside) error {
	life := byte('0')
	if m.Restored {
		var before [6]byte
		if _, err := m.Memory.ReadAt(before[:], vmm.PageSize); err != nil {
			return err
		}
		life = before[5] + 1
	}
	if _, err := m.Memory.WriteAt([]byte("life "+string(life)), vmm.PageSize); err != nil {
		return err
	}
	_, _ = fmt.Fprintf(m.Console, "life %c on %s\n", life, m.Disk())
	<-ctx.Done()
	return nil
}

func startFake(t *testing.T, d *vmmfake.Driver, s vmm.Spec) vmm.Machine {
	t.Helper()
	m, err := d.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Kill(context.Background()) }) // it may be gone
	return m
}

func says(t *testing.T, m vmm.Machine, want string) {
	t.Helper()
	testkit.Eventually(t, noHurry, "on the console: "+want, func() bool {
		data, _, err := m.Console(0, 1<<20)
		return err == nil && bytes.Contains(data, []byte(want))
	})
}

// saved freezes a machine and writes all its memory to a file.
func saved(t *testing.T, d *vmmfake.Driver, m vmm.Machine, s vmm.Spec) *vmm.Restore {
	t.Helper()
	if err := m.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	dev, err := m.Save(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	memory := make([]byte, s.MemMiB<<20)
	if err := m.ReadMemory(memory, 0); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "memory")
	if err := os.WriteFile(path, memory, 0o400); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // read only
	return &vmm.Restore{Memory: f, Devices: dev, Compat: d.Capabilities().Compat}
}

func TestAGuestFindsItsMemoryInEveryLife(t *testing.T) {
	d, s := vmmfake.New(scribe), spec(t, "")
	s.MemMiB = 1
	m := startFake(t, d, s)
	for life := range 3 {
		says(t, m, fmt.Sprintf("life %d on", life))
		from := saved(t, d, m, s)
		runs, err := m.Changed(t.Context())
		if err != nil || !slices.Equal(runs, []vmm.PageRun{{Start: 1, Pages: 1}}) {
			t.Errorf("changed: %v, %v", runs, err)
		}
		s.ID, s.Restore = sandbox.NewID(), from
		m = startFake(t, d, s)
		if data, _, _ := m.Console(0, 100); len(data) > 0 {
			t.Errorf("before its first Thaw it says %q", data)
		}
		if err := m.Thaw(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestATestPlaysTheGuest(t *testing.T) {
	d, s := vmmfake.New(nil), spec(t, "")
	m := startFake(t, d, s)
	memory, err := d.Memory(s.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := memory.WriteAt(bytes.Repeat([]byte{7}, 3*vmm.PageSize), 100); err != nil {
		t.Fatal(err)
	}
	if err := m.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	wrote := make(chan error)
	go func() {
		_, err := memory.WriteAt(make([]byte, vmm.PageSize), 100)
		wrote <- err
	}()
	runs, err := m.Changed(t.Context())
	if err != nil || !slices.Equal(runs, []vmm.PageRun{{Start: 0, Pages: 4}}) {
		t.Errorf("changed: %v, %v", runs, err)
	}
	got := make([]byte, 101)
	if err := m.ReadMemory(got, 0); err != nil || got[99] != 0 || got[100] != 7 {
		t.Errorf("a write went through a freeze, or none did: %v %v", got[98:], err)
	}
	if err := m.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	if _, err := memory.WriteAt([]byte{1}, int64(s.MemMiB)<<20); err == nil {
		t.Error("a write past the end went well")
	}
	if n, err := memory.ReadAt(got, memory.Size()-1); n != 1 || err == nil {
		t.Errorf("a read over the end: %d, %v", n, err)
	}
}

func TestAMemoryThatCannotBeReadEndsTheMachine(t *testing.T) {
	d, s := vmmfake.New(scribe), spec(t, "")
	s.MemMiB = 1
	s.Restore = saved(t, d, startFake(t, d, s), s)
	if err := os.Truncate(s.Restore.Memory.Name(), 1<<20); err != nil {
		t.Fatal(err)
	}
	s.ID = sandbox.NewID()
	m := startFake(t, d, s)
	if err := os.Truncate(s.Restore.Memory.Name(), 100); err != nil {
		t.Fatal(err)
	}
	if err := m.ReadMemory(make([]byte, 100), vmm.PageSize); err == nil {
		t.Error("ReadMemory of what is not there went well")
	}
	if err := m.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-m.Done()
	if m.Exit().Cause != sandbox.CausePagerFault {
		t.Errorf("exit: %+v", m.Exit())
	}
}

func TestAnUpgradedDriverRestoresNothing(t *testing.T) {
	d, s := vmmfake.New(nil), spec(t, "")
	s.Restore = saved(t, d, startFake(t, d, s), s)
	d.Upgrade("1")
	if _, err := d.Start(t.Context(), s); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("error %v", err)
	}
}

func TestTheDiskIsSwitched(t *testing.T) {
	d, s := vmmfake.New(nil), spec(t, "")
	s.DiskPath = filepath.Join(s.Dir, "first")
	next := filepath.Join(s.Dir, "second")
	for _, path := range []string{s.DiskPath, next} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m := startFake(t, d, s)
	if err := m.SwitchDisk(t.Context(), next); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("while it runs: %v", err)
	}
	if err := m.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := m.SwitchDisk(t.Context(), next+"x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("to nothing: %v", err)
	}
	if err := m.SwitchDisk(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	if path, err := d.Disk(s.ID); err != nil || path != next {
		t.Errorf("it writes to %s, %v", path, err)
	}
}
