package vmmtest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// memory is a guest's memory as one flat file, which is what saves are held
// against, and what restores get unless the Harness has something else.
type memory struct {
	t    *testing.T
	path string
	size int64
	runs []vmm.PageRun // what differs from the one before
}

// untouched is that of a guest that is to be booted.
func untouched(t *testing.T, s vmm.Spec) memory {
	t.Helper()
	m := memory{t: t, path: filepath.Join(t.TempDir(), "memory"), size: int64(s.MemMiB) << 20}
	f, err := os.Create(m.path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // it has no bytes yet
	if err := f.Truncate(m.size); err != nil {
		t.Fatal(err)
	}
	return m
}

// after is what a frozen VM that was started with m has now, by what it changed.
func (m memory) after(vm vmm.Machine) memory {
	m.t.Helper()
	next := memory{t: m.t, path: filepath.Join(m.t.TempDir(), "memory"), size: m.size}
	f, err := os.Create(next.path)
	if err != nil {
		m.t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // what it has is compared
	// The VM's user must be able to open it for writing, and may not write.
	if err := errors.Join(f.Chmod(0o666), f.Truncate(m.size)); err != nil {
		m.t.Fatal(err)
	}
	m.each(func(at int64, part []byte) { m.put(f, part, at) })
	next.runs = m.changed(vm)
	data := make([]byte, pagesIn(next.runs)*vmm.PageSize)
	if err := vm.ReadPages(m.t.Context(), data, next.runs); err != nil {
		m.t.Fatal(err)
	}
	before := int64(-1)
	for _, r := range next.runs {
		if r.Start <= before || r.Pages < 1 || (r.Start+r.Pages)*vmm.PageSize > m.size {
			m.t.Fatalf("run %+v comes after page %d", r, before)
		}
		before = r.Start + r.Pages
		if _, err := f.WriteAt(data[:r.Pages*vmm.PageSize], r.Start*vmm.PageSize); err != nil {
			m.t.Fatal(err)
		}
		data = data[r.Pages*vmm.PageSize:]
	}
	return next
}

func (m memory) changed(vm vmm.Machine) []vmm.PageRun {
	m.t.Helper()
	runs, err := vm.Changed(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	return runs
}

func pagesIn(runs []vmm.PageRun) (pages int64) {
	for _, r := range runs {
		pages += r.Pages
	}
	return pages
}

// put writes what is not zero, into a file of zeros.
func (m memory) put(f *os.File, p []byte, at int64) {
	m.t.Helper()
	if bytes.Count(p, []byte{0}) == len(p) {
		return
	}
	if _, err := f.WriteAt(p, at); err != nil {
		m.t.Fatal(err)
	}
}

// each goes through all of it.
func (m memory) each(do func(at int64, part []byte)) {
	m.t.Helper()
	f, err := os.Open(m.path)
	if err != nil {
		m.t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // read only
	buf := make([]byte, 1<<20)
	for at := int64(0); at < m.size; at += int64(len(buf)) {
		part := buf[:min(int64(len(buf)), m.size-at)]
		if _, err := f.ReadAt(part, at); err != nil {
			m.t.Fatal(err)
		}
		do(at, part)
	}
}

// is holds every page of a frozen VM against m.
func (m memory) is(vm vmm.Machine) { m.t.Helper(); m.compare(vm, 0) }

// isLoaded is the same for a VM that was restored and has not run yet. KVM writes
// the time of the guest's boot anew into its memory when it loads one.
func (m memory) isLoaded(h Harness, vm vmm.Machine) {
	m.t.Helper()
	const wallClock = 12 // struct pvclock_wall_clock
	if h.Driver(m.t).Capabilities().Accelerator == "kvm" {
		m.compare(vm, wallClock)
		return
	}
	m.compare(vm, 0)
}

// compare lets bytes be other than they were within one window of that size.
func (m memory) compare(vm vmm.Machine, window int64) {
	m.t.Helper()
	first, last, wrong := int64(-1), int64(-1), 0
	got := make([]byte, 1<<20)
	m.each(func(at int64, want []byte) {
		got := got[:len(want)]
		if err := vm.ReadMemory(got, at); err != nil {
			m.t.Fatal(err)
		}
		for page := 0; page < len(want); page += vmm.PageSize {
			if bytes.Equal(got[page:page+vmm.PageSize], want[page:page+vmm.PageSize]) {
				continue
			}
			for i := page; i < page+vmm.PageSize; i++ {
				if got[i] == want[i] {
					continue
				}
				if first < 0 {
					first = at + int64(i)
				}
				last = at + int64(i)
			}
			if last-first < window {
				continue
			}
			if wrong++; wrong < 5 {
				m.t.Errorf("page %d is not what it was", (at+int64(page))/vmm.PageSize)
			}
		}
	})
	if wrong > 0 {
		m.t.Fatalf("%d pages are not what they were", wrong)
	}
}

// gone frees its space. A VM may have it mapped.
func (m memory) gone() {
	m.t.Helper()
	if err := os.Remove(m.path); err != nil {
		m.t.Fatal(err)
	}
}

// saved is a frozen VM as Restore has it.
func saved(t *testing.T, h Harness, vm vmm.Machine, m memory) *vmm.Restore {
	t.Helper()
	devices, err := vm.Save(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	open := h.Memory
	if open == nil {
		open = func(t *testing.T, flat string, _ []vmm.PageRun) *os.File { return opened(t, flat) }
	}
	f := open(t, m.path, m.runs)
	return &vmm.Restore{Memory: f, Devices: devices, Compat: h.Driver(t).Capabilities().Compat}
}

// restored starts a VM from what another was saved as. It is frozen.
func restored(t *testing.T, h Harness, like vmm.Spec, from *vmm.Restore) vmm.Machine {
	t.Helper()
	s := h.Spec(t, Remember)
	like.ID, like.Dir, like.Restore = s.ID, s.Dir, from
	vm, err := h.Driver(t).Start(t.Context(), like)
	if err != nil {
		t.Fatal(err)
	}
	cleanUp(t, vm)
	return vm
}

func frozen(t *testing.T, vm vmm.Machine) {
	t.Helper()
	if err := vm.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func thawed(t *testing.T, vm vmm.Machine) {
	t.Helper()
	if err := vm.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// remembers waits until the guest has looked at all its memory some times more.
func remembers(t *testing.T, h Harness, vm vmm.Machine, times int) {
	t.Helper()
	want := strings.Count(console(t, vm), Remembers) + times
	testkit.Eventually(t, h.BootLimit, fmt.Sprintf("having looked at its memory %d times", want), func() bool {
		select {
		case <-vm.Done():
			t.Fatalf("it has ended: %+v; the end of its console:\n%s", vm.Exit(), consoleEnd(t, vm))
		default:
		}
		said := console(t, vm)
		if i := strings.Index(said, Forgot); i >= 0 {
			t.Fatalf("the guest says: %.200s", said[i:])
		}
		return strings.Count(said, Remembers) >= want
	})
}

// Generations runs one test of the suite: that a saved VM is restored as it was,
// generation after generation. It is for a Harness with a Memory of its own.
func Generations(t *testing.T, h Harness) { generations(t, h) }

// generations saves and restores a guest that looks at its own memory, again and
// again, at moments that it knows nothing of; every page is compared with a flat
// file from outside, too.
func generations(t *testing.T, h Harness) {
	if refusesToSave(t, h) {
		return
	}
	s := h.Spec(t, Remember)
	vm, err := h.Driver(t).Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	cleanUp(t, vm)
	truth := untouched(t, s)
	for generation := range h.Generations {
		remembers(t, h, vm, 2)
		frozen(t, vm)
		if generation%3 == 1 { // who saves need not be who started it
			vm = adoptAgain(t, h, release(t, h, vm))
		}
		started := truth
		truth = started.after(vm)
		truth.is(vm)
		from := saved(t, h, vm, truth)
		if generation%3 == 2 { // it runs on after it was saved, and is saved anew
			thawed(t, vm)
			remembers(t, h, vm, 1)
			frozen(t, vm)
			truth.gone()
			truth = started.after(vm)
			truth.is(vm)
			from = saved(t, h, vm, truth)
		}
		if err := vm.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		said := fmt.Sprintf("what it said in generation %d\n", generation)
		from.Console = []byte(said)
		vm = restored(t, h, s, from)
		started.gone()
		t.Logf("generation %d: %d pages in %d runs", generation, pagesIn(truth.runs), len(truth.runs))
		if generation == 0 {
			standsStill(t, vm)
		}
		truth.isLoaded(h, vm)
		if got := console(t, vm); got != said {
			t.Errorf("before it was thawed its console was %.200q, want %q", got, said)
		}
		thawed(t, vm)
	}
	remembers(t, h, vm, 2)
}

// forks starts two from one, which go ways of their own.
func forks(t *testing.T, h Harness) {
	if refusesToSave(t, h) {
		return
	}
	s := h.Spec(t, Remember)
	vm := start(t, h, h.Driver(t), Remember)
	for what, err := range map[string]error{
		"Save":       second(vm.Save(t.Context())),
		"Changed":    second(vm.Changed(t.Context())),
		"ReadMemory": vm.ReadMemory(make([]byte, vmm.PageSize), 0),
		"ReadPages":  vm.ReadPages(t.Context(), make([]byte, vmm.PageSize), []vmm.PageRun{{Start: 0, Pages: 1}}),
		"SwitchDisk": vm.SwitchDisk(t.Context(), os.DevNull),
	} {
		if !sandbox.Is(err, sandbox.KindConflict) {
			t.Errorf("%s of a VM that runs: %v", what, err)
		}
	}
	remembers(t, h, vm, 2)
	frozen(t, vm)
	truth := untouched(t, s).after(vm)
	from := saved(t, h, vm, truth)
	for _, off := range []int64{-1, truth.size - 1, truth.size, 1 << 60} {
		if err := vm.ReadMemory(make([]byte, 2), off); err == nil {
			t.Errorf("two bytes at %d were read", off)
		}
	}
	pages := truth.size / vmm.PageSize
	for what, runs := range map[string][]vmm.PageRun{
		"past the end": {{Start: 0, Pages: 1}, {Start: pages, Pages: 1}}, "before the start": {{Start: -1, Pages: 2}},
		"too few": {{Start: 0, Pages: 1}}, "too many": {{Start: 0, Pages: 3}}, "less than none": {{Start: 0, Pages: 3}, {Start: 3, Pages: -1}},
	} {
		if err := vm.ReadPages(t.Context(), make([]byte, 2*vmm.PageSize), runs); err == nil {
			t.Errorf("%s: two pages were read", what)
		}
	}
	if err := vm.ReadPages(t.Context(), nil, nil); err != nil {
		t.Errorf("no pages: %v", err)
	}
	first, other := restored(t, h, s, from), restored(t, h, s, from)
	thawed(t, first)
	thawed(t, vm)
	remembers(t, h, first, 3)
	remembers(t, h, vm, 3)
	truth.isLoaded(h, other)
	adopted := adoptAgain(t, h, release(t, h, other))
	truth.isLoaded(h, adopted)
	thawed(t, adopted)
	remembers(t, h, adopted, 2)
	refused(t, h, s, from)
	unserved(t, h, truth, map[vmm.Machine]sandbox.Cause{
		first: sandbox.CausePagerFault, adopted: sandbox.CausePagerFault, vm: "",
	})
}

// unserved takes the memory away that VMs were restored from.
func unserved(t *testing.T, h Harness, m memory, vms map[vmm.Machine]sandbox.Cause) {
	t.Helper()
	if err := os.Truncate(m.path, 0); err != nil {
		t.Fatal(err)
	}
	for vm, cause := range vms {
		if cause == "" {
			remembers(t, h, vm, 2)
			continue
		}
		if h.MayHang && hangs(t, vm, testkit.Patience(unservedLimit)) {
			t.Logf("%s stands still", vm.Record().ID)
			continue
		}
		exit := ended(t, vm, unservedLimit)
		if h.MayHang && exit.Cause == sandbox.CauseGuestExit && exit.Reset {
			t.Logf("%s has fallen over it: %s", vm.Record().ID, exit.Detail)
			continue
		}
		wantCause(t, exit, cause)
	}
}

// hangs reports whether a guest that prints all the time stops without ending.
func hangs(t *testing.T, vm vmm.Machine, within time.Duration) bool {
	t.Helper()
	before := int64(-1)
	for range 6 {
		select {
		case <-vm.Done():
			return false
		case <-time.After(within / 2):
		}
		after := printed(t, vm)
		if after == before {
			return true
		}
		before = after
	}
	return false
}

// unservedLimit is until when a guest that does not idle has wanted a page that
// is not there.
const unservedLimit = 10 * time.Second

func second[T any](_ T, err error) error { return err }

// refused: a restore that cannot be leaves nothing, and says why.
func refused(t *testing.T, h Harness, like vmm.Spec, from *vmm.Restore) {
	t.Helper()
	for _, tt := range []struct {
		what   string
		change func(s *vmm.Spec, r *vmm.Restore)
		kind   sandbox.Kind // "" is any
		says   []string
	}{
		{
			"by another driver", func(_ *vmm.Spec, r *vmm.Restore) { r.Compat = "abacus 1" },
			sandbox.KindConflict,
			[]string{"abacus 1", from.Compat},
		},
		{"with another vCPU", func(s *vmm.Spec, _ *vmm.Restore) { s.VCPUs++ }, sandbox.KindInvalid, []string{
			fmt.Sprintf("%d vCPUs", like.VCPUs), fmt.Sprintf("%d vCPUs", like.VCPUs+1),
		}},
		{"with more memory", func(s *vmm.Spec, _ *vmm.Restore) { s.MemMiB++ }, sandbox.KindInvalid, []string{
			fmt.Sprintf("%d MiB", like.MemMiB), fmt.Sprintf("%d MiB", like.MemMiB+1),
		}},
		{"with a disk", func(s *vmm.Spec, _ *vmm.Restore) { s.DiskPath, s.DiskFormat = os.DevNull, "raw" }, sandbox.KindInvalid, []string{
			"no disk", "a disk",
		}},
		{"without memory", func(_ *vmm.Spec, r *vmm.Restore) { r.Memory = nil }, sandbox.KindInvalid, []string{"memory"}},
		{"with half a memory", func(_ *vmm.Spec, r *vmm.Restore) { r.Memory = half(t, like) }, sandbox.KindInvalid, []string{"memory"}},
		{"without devices", func(_ *vmm.Spec, r *vmm.Restore) { r.Devices = nil }, sandbox.KindInvalid, []string{"devices"}},
		{"with half the devices", func(_ *vmm.Spec, r *vmm.Restore) { r.Devices = r.Devices[:len(r.Devices)/2] }, "", nil},
		{"without the last of the devices", func(_ *vmm.Spec, r *vmm.Restore) { r.Devices = r.Devices[:len(r.Devices)-1] }, "", nil},
	} {
		s, r := h.Spec(t, Remember), *from
		s.Restore = &r
		tt.change(&s, &r)
		fds := testkit.OpenFDs(t)
		vm, err := h.Driver(t).Start(t.Context(), s)
		if err == nil {
			cleanUp(t, vm)
			t.Errorf("%s it was restored", tt.what)
			continue
		}
		if tt.kind != "" && !sandbox.Is(err, tt.kind) {
			t.Errorf("%s: %v; want the kind %v", tt.what, err, tt.kind)
		}
		for _, want := range tt.says {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q does not say %q", tt.what, err, want)
			}
		}
		leftovers(t, s, fds)
	}
}

func half(t *testing.T, s vmm.Spec) *os.File {
	t.Helper()
	return opened(t, untouched(t, vmm.Spec{MemMiB: s.MemMiB / 2}).path)
}

func opened(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // read only
	return f
}

// refusesToSave says whether a driver cannot save here, which it has to say before
// anything is lost: it names no Compat, and Save is unsupported.
func refusesToSave(t *testing.T, h Harness) bool {
	t.Helper()
	if h.Driver(t).Capabilities().Compat != "" {
		return false
	}
	vm := start(t, h, h.Driver(t), Hold)
	if err := vm.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := vm.Save(t.Context()); !sandbox.Is(err, sandbox.KindUnsupported) {
		t.Errorf("Save of a driver that names no Compat: %v", err)
	}
	return true
}
