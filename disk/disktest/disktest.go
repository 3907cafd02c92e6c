// Package disktest is the conformance suite of disk drivers: what a host may
// rely on, whichever driver it uses.
package disktest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"testing"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Harness is what a driver's test gives to the suite.
type Harness struct {
	Driver disk.Driver
	// Write changes bytes of a disk as a guest would, and Read reads them back.
	Write func(t *testing.T, d disk.Disk, offset int64, data []byte)
	Read  func(t *testing.T, d disk.Disk, offset int64, length int) []byte
}

const (
	mib      = 1 << 20
	baseSize = 4 * mib
	diskSize = 16 * mib
)

// Run runs the suite; fresh makes a harness for each test.
func Run(t *testing.T, fresh func(t *testing.T) Harness) {
	for _, tt := range []struct {
		name string
		test func(t *testing.T, h Harness)
	}{
		{"a new disk reads as its base, then zeros", readsAsBase},
		{"writes stay in the overlay and survive Close and Restore", writesSurvive},
		{"two disks over one base do not see each other", separate},
		{"an overlay costs what was written", costsWhatWasWritten},
		{"many creates at once", concurrent},
		{"bad configs are refused and leave nothing", refused},
		{"a second Create in the same place is refused and harms nothing", twice},
		{"Restore finds no disk where none is", restoreMissing},
		{"Restore refuses a disk of another shape", restoreOther},
		{"Remove twice, and after the directory is gone", removeTwice},
		{"a cancelled Create leaves nothing", cancelled},
		{"the overlay belongs to the VMM's user", owned},
		{"a driver has a name", named},
		{"Discard takes a disk away whose base is gone", discardWithoutBase},
		{"Discard of nothing, and of a place that cannot be", discardNothing},
		{"Sweep spares what it is told to keep, and the data of all disks", sweepSpares},
		{"Check finds nothing where nothing is wrong", checkFindsNothing},
		{"a new disk has not changed", nothingChanged},
		{"Changed has every block that was written, zeros too", changedHasAll},
		{"Changed after Close and Restore", changedSurvives},
		{"a disk moves on, and what it was before stays", movesOn},
		{"a disk that was not written to stays where it is", staysWhereItIs},
		{"a prepared move is one move", preparedMove},
		{"a move that fails leaves a whole disk", failedMove},
		{"a disk moves on so often, and then says so", movesAreBounded},
		{"writes, moves and restarts at random", atRandom},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, fresh(t)) })
	}
}

// Base makes a base image of baseSize bytes with a recognizable start and end.
func Base(t *testing.T) string {
	t.Helper()
	// Under /tmp itself: t.TempDir is inside a directory that only we may pass.
	dir, err := os.MkdirTemp("", "disktest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a temporary file may stay
	path := filepath.Join(dir, "base.img")
	data := make([]byte, baseSize)
	copy(data, "start of base")
	copy(data[baseSize-mib:], "end of base")
	if err := os.WriteFile(path, data, 0o444); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func configOver(t *testing.T, base string) disk.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "disktest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a temporary file may stay
	return disk.Config{Dir: dir, Base: base, SizeBytes: diskSize}
}

func create(t *testing.T, h Harness, config disk.Config) disk.Disk {
	t.Helper()
	d, err := h.Driver.Create(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Remove(context.Background()); err != nil {
			t.Errorf("remove: %v", err)
		}
	})
	return d
}

func expect(t *testing.T, h Harness, d disk.Disk, offset int64, want string) {
	t.Helper()
	if got := h.Read(t, d, offset, len(want)); string(got) != want {
		t.Errorf("at %d: %q, want %q", offset, got, want)
	}
}

// empty fails when a directory holds anything.
func empty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, e := range entries {
		t.Errorf("left behind: %s", e.Name())
	}
}

func readsAsBase(t *testing.T, h Harness) {
	d := create(t, h, configOver(t, Base(t)))
	expect(t, h, d, 0, "start of base")
	expect(t, h, d, baseSize-mib, "end of base")
	expect(t, h, d, baseSize, "\x00\x00\x00\x00")
	expect(t, h, d, diskSize-4, "\x00\x00\x00\x00")
}

func writesSurvive(t *testing.T, h Harness) {
	base := Base(t)
	before, err := os.ReadFile(base)
	if err != nil {
		t.Fatal(err)
	}
	config := configOver(t, base)
	d := create(t, h, config)
	h.Write(t, d, 0, []byte("changed"))
	h.Write(t, d, diskSize-mib, []byte("beyond the base"))
	if err := d.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	again, err := h.Driver.Restore(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, h, again, 0, "changed")
	expect(t, h, again, diskSize-mib, "beyond the base")
	expect(t, h, again, baseSize-mib, "end of base")
	if after, err := os.ReadFile(base); err != nil || string(after) != string(before) {
		t.Errorf("the base has changed (%v)", err)
	}
}

func separate(t *testing.T, h Harness) {
	base := Base(t)
	a, b := create(t, h, configOver(t, base)), create(t, h, configOver(t, base))
	h.Write(t, a, 4096, []byte("only in a"))
	expect(t, h, a, 4096, "only in a")
	expect(t, h, b, 4096, "\x00\x00\x00\x00")
}

func costsWhatWasWritten(t *testing.T, h Harness) {
	d := create(t, h, configOver(t, Base(t)))
	before, err := d.Allocated()
	if err != nil {
		t.Fatal(err)
	}
	if before > mib {
		t.Errorf("an empty overlay takes %d bytes", before)
	}
	h.Write(t, d, 8*mib, make2(2*mib))
	after, err := d.Allocated()
	if err != nil {
		t.Fatal(err)
	}
	if grew := after - before; grew < 2*mib || grew > 3*mib {
		t.Errorf("2 MiB written, the overlay grew by %d bytes", grew)
	}
}

// make2 is n bytes that are not zero.
func make2(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i%251) + 1
	}
	return b
}

func concurrent(t *testing.T, h Harness) {
	const n = 8
	base := Base(t)
	var configs [n]disk.Config
	for i := range configs {
		configs[i] = configOver(t, base)
	}
	var wg sync.WaitGroup
	var disks [n]disk.Disk
	var errs [n]error
	for i := range n {
		wg.Go(func() { disks[i], errs[i] = h.Driver.Create(t.Context(), configs[i]) })
	}
	wg.Wait()
	for i := range n {
		if errs[i] != nil {
			t.Errorf("disk %d: %v", i, errs[i])
			continue
		}
		h.Write(t, disks[i], 0, fmt.Appendf(nil, "disk %d", i))
	}
	for i, d := range disks {
		if d == nil {
			continue
		}
		expect(t, h, d, 0, fmt.Sprintf("disk %d", i))
		if err := d.Remove(t.Context()); err != nil {
			t.Error(err)
		}
		empty(t, configs[i].Dir)
	}
}

func refused(t *testing.T, h Harness) {
	base := Base(t)
	for _, tt := range []struct {
		name   string
		change func(c *disk.Config)
		kind   sandbox.Kind
	}{
		{"no base", func(c *disk.Config) { c.Base += ".missing" }, sandbox.KindNotFound},
		{"a base that is a directory", func(c *disk.Config) { c.Base = filepath.Dir(c.Base) }, sandbox.KindInvalid},
		{"a base by relative path", func(c *disk.Config) { c.Base = "base.img" }, sandbox.KindInvalid},
		{"smaller than its base", func(c *disk.Config) { c.SizeBytes = baseSize - 4096 }, sandbox.KindInvalid},
		{"no size", func(c *disk.Config) { c.SizeBytes = 0 }, sandbox.KindInvalid},
		{"negative size", func(c *disk.Config) { c.SizeBytes = -4096 }, sandbox.KindInvalid},
	} {
		config := configOver(t, base)
		tt.change(&config)
		d, err := h.Driver.Create(t.Context(), config)
		if !sandbox.Is(err, tt.kind) {
			t.Errorf("%s: error %v, want kind %s", tt.name, err, tt.kind)
		}
		if d != nil {
			t.Errorf("%s: a disk came with the error", tt.name)
		}
		empty(t, config.Dir)
	}
}

func twice(t *testing.T, h Harness) {
	config := configOver(t, Base(t))
	d := create(t, h, config)
	h.Write(t, d, 0, []byte("precious"))
	if _, err := h.Driver.Create(t.Context(), config); !sandbox.Is(err, sandbox.KindExists) {
		t.Errorf("second Create: %v", err)
	}
	expect(t, h, d, 0, "precious")
}

func restoreMissing(t *testing.T, h Harness) {
	config := configOver(t, Base(t))
	if _, err := h.Driver.Restore(t.Context(), config); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("Restore of nothing: %v", err)
	}
	d := create(t, h, config)
	if err := d.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Driver.Restore(t.Context(), config); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("Restore of what was removed: %v", err)
	}
	empty(t, config.Dir)
}

func restoreOther(t *testing.T, h Harness) {
	config := configOver(t, Base(t))
	d := create(t, h, config)
	h.Write(t, d, 0, []byte("mine"))
	for name, change := range map[string]func(c *disk.Config){
		"another size": func(c *disk.Config) { c.SizeBytes *= 2 },
		"another base": func(c *disk.Config) { c.Base = Base(t) },
	} {
		other := config
		change(&other)
		if _, err := h.Driver.Restore(t.Context(), other); !sandbox.Is(err, sandbox.KindConflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
	expect(t, h, d, 0, "mine")
}

func removeTwice(t *testing.T, h Harness) {
	config := configOver(t, Base(t))
	d := create(t, h, config)
	for range 2 {
		if err := d.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
	empty(t, config.Dir)
	if err := os.RemoveAll(config.Dir); err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(t.Context()); err != nil {
		t.Errorf("after the directory is gone: %v", err)
	}
}

func cancelled(t *testing.T, h Harness) {
	config := configOver(t, Base(t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.Driver.Create(ctx, config); err == nil {
		t.Error("Create on a cancelled context succeeded")
	}
	empty(t, config.Dir)
}

func owned(t *testing.T, h Harness) {
	if os.Geteuid() != 0 {
		t.Log("not root: only our own uid can be tried")
	}
	config := configOver(t, Base(t))
	config.UID, config.GID = os.Geteuid(), os.Getegid()
	if config.UID == 0 {
		config.UID, config.GID = 65533, 65532
	}
	d := create(t, h, config)
	info, err := os.Stat(d.Path())
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	if int(st.Uid) != config.UID || int(st.Gid) != config.GID || info.Mode().Perm()&0o077 != 0 {
		t.Errorf("uid %d, gid %d, mode %v", st.Uid, st.Gid, info.Mode())
	}
}

func named(t *testing.T, h Harness) {
	if !regexp.MustCompile(`^[a-z]{2,16}$`).MatchString(h.Driver.Name()) {
		t.Errorf("the driver is called %q, which is no word for a record", h.Driver.Name())
	}
}

func discardWithoutBase(t *testing.T, h Harness) {
	kept := create(t, h, configOver(t, Base(t)))
	h.Write(t, kept, 0, []byte("kept"))
	config := configOver(t, Base(t))
	d := create(t, h, config)
	h.Write(t, d, 0, []byte("lost"))
	if err := d.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(config.Base); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Driver.Restore(t.Context(), config); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("Restore over nothing: %v", err)
	}
	for range 2 { // what is gone already is success
		if err := h.Driver.Discard(t.Context(), config.Dir); err != nil {
			t.Fatal(err)
		}
	}
	empty(t, config.Dir)
	expect(t, h, kept, 0, "kept")
}

func discardNothing(t *testing.T, h Harness) {
	config := configOver(t, Base(t))
	for _, dir := range []string{config.Dir, filepath.Join(config.Dir, "missing")} {
		if err := h.Driver.Discard(t.Context(), dir); err != nil {
			t.Errorf("%s: %v", dir, err)
		}
	}
	for _, dir := range []string{"", ".", "relative/dir"} {
		if err := h.Driver.Discard(t.Context(), dir); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("directory %q: %v, want kind %s", dir, err, sandbox.KindInvalid)
		}
	}
}

func sweepSpares(t *testing.T, h Harness) {
	base := Base(t)
	configs := []disk.Config{configOver(t, base), configOver(t, base)}
	a, b := create(t, h, configs[0]), create(t, h, configs[1])
	h.Write(t, a, 0, []byte("of a"))
	h.Write(t, b, 0, []byte("of b"))
	if err := h.Driver.Sweep(t.Context(), []string{configs[0].Dir}); err != nil {
		t.Fatal(err)
	}
	expect(t, h, a, 0, "of a")
	// What it takes from the host it leaves in the directory.
	b, err := h.Driver.Restore(t.Context(), configs[1])
	if err != nil {
		t.Fatal(err)
	}
	expect(t, h, b, 0, "of b")
	if err := h.Driver.Sweep(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"of a", "of b"} {
		d, err := h.Driver.Restore(t.Context(), configs[i])
		if err != nil {
			t.Fatal(err)
		}
		expect(t, h, d, 0, want)
	}
}

func checkFindsNothing(t *testing.T, h Harness) {
	check := func(when string) {
		report, err := h.Driver.Check(t.Context())
		if err != nil || len(report.Damage)+len(report.Broken) > 0 {
			t.Errorf("%s: %+v, %v", when, report, err)
		}
	}
	check("without a disk")
	config := configOver(t, Base(t))
	d := create(t, h, config)
	check("with a new disk")
	h.Write(t, d, mib, make2(mib))
	expect(t, h, d, 0, "start of base")
	check("with a disk in use")
	if err := d.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	check("with a closed disk")
	if err := h.Driver.Discard(t.Context(), config.Dir); err != nil {
		t.Fatal(err)
	}
	check("without a disk again")
}
