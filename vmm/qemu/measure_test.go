package qemu_test

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

var firstProcess = regexp.MustCompile(`GUEST-UP uptime=(\d+)ms`)

// BenchmarkBoot measures a boot up to the guest's first process: wall clock, the
// guest's own clock, and the processor time of QEMU, which other load on the
// machine does not change. DORMOUSE_BOOT_WORDS adds kernel parameters.
func BenchmarkBoot(b *testing.B) {
	d := driver(b)
	image, initrd := kernelImage(b), initramfs(b, nil)
	var cpu, guest float64
	for b.Loop() {
		s := benchSpec(b, image, initrd)
		m, err := d.Start(b.Context(), s)
		if err != nil {
			b.Fatal(err)
		}
		var found [][]byte
		for deadline := time.Now().Add(time.Minute); found == nil; time.Sleep(5 * time.Millisecond) {
			data, _, err := m.Console(0, 1<<20)
			if err != nil || time.Now().After(deadline) {
				b.Fatalf("no first process: %v\n%s", err, data)
			}
			found = firstProcess.FindSubmatch(data)
		}
		cpu += cpuSeconds(b, m.Record().PID)
		var ms float64
		_, _ = fmt.Sscanf(string(found[1]), "%g", &ms) // digits only
		guest += ms / 1000
		if err := m.Kill(b.Context()); err != nil {
			b.Fatal(err)
		}
		if err := m.Release(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(cpu/float64(b.N), "cpu-s/op")
	b.ReportMetric(guest/float64(b.N), "guest-s/op")
}

// cpuSeconds is user and system time, fields 14 and 15 of /proc/PID/stat, in
// ticks of 10 ms.
func cpuSeconds(b *testing.B, pid int) float64 {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+2:]))
	var user, system float64
	_, _ = fmt.Sscan(fields[11]+" "+fields[12], &user, &system) // the kernel prints numbers
	return (user + system) / 100
}

func benchSpec(b *testing.B, image, initrd string) vmm.Spec {
	return vmm.Spec{
		ID: sandbox.NewID(), VCPUs: 1, MemMiB: 512, Kernel: image, Initrd: initrd, Dir: shortDir(b),
		Cmdline: os.Getenv("DORMOUSE_BOOT_WORDS"),
	}
}
