package qemu_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
	"github.com/dormouse-sandbox/dormouse/vmm/qemu"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmtest"
)

// BenchmarkRestore measures what a restore and a save take, for two sizes of
// memory with the same guests in it: start is until the VM is restored, console
// from Thaw to the guest's first byte, changed is how long the pages took to find
// and read how long to copy them. One guest prints all the time, the other writes
// and looks at 16 MiB between two lines.
func BenchmarkRestore(b *testing.B) {
	for _, mib := range []int{512, 4096} {
		for guest, says := range map[vmmtest.Guest]string{vmmtest.Count: "line ", vmmtest.Remember: vmmtest.Remembers} {
			b.Run(fmt.Sprintf("%dMiB/%s", mib, guest), func(b *testing.B) { benchRestore(b, mib, guest, says) })
		}
	}
}

func benchRestore(b *testing.B, mib int, guest vmmtest.Guest, says string) {
	d := driver(b)
	s := vmm.Spec{
		ID: sandbox.NewID(), VCPUs: 1, MemMiB: mib, Kernel: kernelImage(b), Initrd: initramfs(b, nil), Dir: shortDir(b),
		Cmdline: "test.do=" + string(guest),
	}
	first, err := d.Start(b.Context(), s)
	must(b, err)
	defer discard(b, first)
	firstByte(b, first, says)
	must(b, first.Freeze(b.Context()))
	s.Restore = sparsely(b, d, first, mib)
	spent := map[string]time.Duration{}
	timed := func(what string, do func()) {
		start := time.Now()
		do()
		spent[what] += time.Since(start)
	}
	pages, runs := 0, 0
	for b.Loop() {
		s.ID, s.Dir = sandbox.NewID(), shortDir(b)
		var m vmm.Machine
		timed("start", func() {
			var err error
			m, err = d.Start(b.Context(), s)
			must(b, err)
		})
		timed("console", func() { must(b, m.Thaw(b.Context())); firstByte(b, m, "") })
		timed("freeze", func() { must(b, m.Freeze(b.Context())) })
		timed("save", func() {
			_, err := m.Save(b.Context())
			must(b, err)
		})
		var changed []vmm.PageRun
		timed("changed", func() {
			var err error
			changed, err = m.Changed(b.Context())
			must(b, err)
		})
		timed("read", func() { pages += len(readRuns(b, m, changed)) / vmm.PageSize })
		runs += len(changed)
		discard(b, m)
	}
	for what, took := range spent {
		b.ReportMetric(float64(took.Microseconds())/1000/float64(b.N), what+"-ms/op")
	}
	b.ReportMetric(float64(pages)/float64(b.N), "pages/op")
	b.ReportMetric(float64(runs)/float64(b.N), "runs/op")
}

// sparsely saves a frozen VM, and what it changed into a file with holes.
func sparsely(b *testing.B, d *qemu.Driver, m vmm.Machine, mib int) *vmm.Restore {
	b.Helper()
	devices, err := m.Save(b.Context())
	must(b, err)
	f, err := os.Create(filepath.Join(b.TempDir(), "memory"))
	must(b, err)
	b.Cleanup(func() { _ = f.Close() }) // it was read
	must(b, f.Truncate(int64(mib)<<20))
	runs, err := m.Changed(b.Context())
	must(b, err)
	p := readRuns(b, m, runs)
	for _, r := range runs {
		_, err := f.WriteAt(p[:r.Pages*vmm.PageSize], r.Start*vmm.PageSize)
		must(b, err)
		p = p[r.Pages*vmm.PageSize:]
	}
	return &vmm.Restore{Memory: f, Devices: devices, Compat: d.Capabilities().Compat}
}

func readRuns(b *testing.B, m vmm.Machine, runs []vmm.PageRun) []byte {
	b.Helper()
	pages := int64(0)
	for _, r := range runs {
		pages += r.Pages
	}
	p := make([]byte, pages*vmm.PageSize)
	must(b, m.ReadPages(b.Context(), p, runs))
	return p
}

// firstByte waits for a word on the console, or for anything.
func firstByte(b *testing.B, m vmm.Machine, want string) {
	b.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		data, _, err := m.Console(0, 1<<20)
		must(b, err)
		if len(data) > 0 && bytes.Contains(data, []byte(want)) {
			return
		}
		if time.Now().After(deadline) {
			b.Fatalf("no %s on the console:\n%s", want, data)
		}
	}
}

func discard(b *testing.B, m vmm.Machine) {
	b.Helper()
	must(b, m.Kill(b.Context()))
	must(b, m.Release())
}

func must(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}
