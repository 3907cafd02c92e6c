package host_test

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const mib = 1 << 20

// holds lets a process have so many MiB of memory that nothing else has.
func (r realSandboxes) holds(id sandbox.ID, size int) {
	r.t.Helper()
	r.run(id, fmt.Sprintf("nohup python3 -c 'import os, time; x = os.urandom(%d << 20); open(\"/tmp/held\", \"w\"); time.sleep(1e6)' > /dev/null 2>&1 &", size))
	r.run(id, "until [ -e /tmp/held ]; do sleep 0.1; done")
}

// TestAPauseCostsWhatTheGuestHasChanged: with little memory and with much, in the
// first generation and in the fifth, and after much was read.
func TestAPauseCostsWhatTheGuestHasChanged(t *testing.T) {
	testkit.Long(t, "ten pauses, five of them of 8 GiB")
	const generations, dirtied = 5, 16
	written := map[int][]int64{}
	r := realSandboxes{t, realHost(t)}
	for _, mem := range []int{512, 8192} {
		id := r.create("base", mem)
		r.run(id, "head -c 100M /dev/urandom > read; sync")
		r.pause(id)
		r.resume(id)
		for g := range generations {
			if g == generations-1 {
				r.run(id, "cat read > /dev/null")
			}
			r.run(id, fmt.Sprintf("head -c %dM /dev/urandom > /dev/shm/dirty", dirtied))
			saved := r.pause(id)
			changed := (saved.Memory.Written + saved.Disk.Written) * 4096
			if bound := changed*105/100 + 64<<10; saved.Written > bound {
				t.Errorf("%d MiB, generation %d: %d bytes have changed, and %d were written, want at most %d", mem, g, changed, saved.Written, bound)
			}
			if changed < dirtied*mib || g < generations-1 && changed > 2*dirtied*mib {
				t.Errorf("%d MiB, generation %d: %d bytes have changed, of which we have %d MiB", mem, g, changed, dirtied)
			}
			written[mem] = append(written[mem], saved.Written)
			r.resume(id)
		}
		if _, err := r.agent.Destroy(t.Context(), string(id), ""); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("written: %v", written)
	for g := range generations - 1 {
		if little, much := written[512][g], written[8192][g]; much > little*115/100+2*mib {
			t.Errorf("generation %d: with 512 MiB %d bytes were written, with 8 GiB %d", g, little, much)
		}
	}
}

// TestAResumeReadsWhatItTouches: of what was in use, a resume that runs a small
// command reads little. It is more than it touches: QEMU asks for huge pages, and
// the kernel reads 2 MiB and more around each page that is wanted.
func TestAResumeReadsWhatItTouches(t *testing.T) {
	testkit.Long(t, "it fills memory")
	r := realSandboxes{t, realHost(t)}
	id := r.create("base", 1024)
	r.holds(id, 600)
	saved := r.pause(id)
	r.resume(id)
	r.run(id, "true")
	file := memoryOf(t, id)
	defer func() { _ = file.Close() }() // read only
	var in unix.Cachestat_t
	if err := unix.Cachestat(uint(file.Fd()), &unix.CachestatRange{}, &in, 0); err != nil {
		testkit.Require(t, "cachestat", false, err.Error())
	}
	read, used := int64(in.Cache)*4096, saved.Point.MemoryBytes
	t.Logf("of %d MiB in use %d MiB were read (%d %%)", used/mib, read/mib, read*100/used)
	if used < 600*mib || read == 0 || read > used/5 {
		t.Errorf("%d bytes were read of %d in use, want some, and less than a fifth", read, used)
	}
}

// TestForksCostWhatTheyWrite: many copies of one sandbox share its memory.
func TestForksCostWhatTheyWrite(t *testing.T) {
	testkit.Long(t, "fifty VMs")
	const copies, held = 50, 200
	r := realSandboxes{t, realHost(t, func(c *host.Config) { c.MaxMemMiB = 64 << 10 })}
	id := r.create("base", 512)
	r.holds(id, held)
	forks := r.fork(id, copies)
	for _, moment := range []string{"before a first command", "after it"} {
		var shared, own int64
		for _, f := range forks {
			s, o := ramOf(t, f)
			shared, own = shared+s, own+o
		}
		t.Logf("%s the memories of %d copies take %d MiB together, of which they have %d MiB for themselves", moment, copies, (shared+own)/mib, own/mib)
		if own > copies*(held/5)*mib {
			t.Errorf("%s each copy has %d MiB of memory for itself", moment, own/copies/mib)
		}
		if limit := int64(held+300) * mib; shared > limit {
			t.Errorf("%s %d MiB of what is shared are there, want each once", moment, shared/mib)
		}
		for _, f := range forks {
			r.run(f, "true")
		}
	}
}

// TestFilesAreTrueThroughTwentyPauses, written through to the disk or not.
func TestFilesAreTrueThroughTwentyPauses(t *testing.T) {
	testkit.Long(t, "twenty pauses")
	r := realSandboxes{t, realHost(t)}
	id := r.create("base", 512)
	r.run(id, "mkdir files")
	for i := range 20 {
		sync := ""
		if i%2 == 0 {
			sync = "; sync"
		}
		r.run(id, fmt.Sprintf("cd files && head -c %d /dev/urandom > f%d && rm -f f%d && sha256sum f* > ../sums%s", 100_000*(i+1), i, i-5, sync))
		r.pause(id)
		r.resume(id)
		if got := r.run(id, "cd files && sudo sh -c 'echo 3 > /proc/sys/vm/drop_caches' && sha256sum --quiet -c ../sums && ls | wc -l"); got != strconv.Itoa(min(i+1, 5)) {
			t.Fatalf("generation %d: %q", i, got)
		}
	}
}

// TestTheClockIsRightAfterADay: what is resumed a day later has the day's time.
func TestTheClockIsRightAfterADay(t *testing.T) {
	notInALab(t)
	var later atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(later.Load())) }
	r := realSandboxes{t, realHost(t, func(c *host.Config) { c.Now = now })}
	id := r.create("base", 512)
	const off = 100 * time.Millisecond
	for day := time.Duration(1); day <= 3; day++ { // a busy machine may be late with the time once
		saved := r.pause(id)
		if saved.State != "paused" {
			t.Fatal(saved.State)
		}
		later.Store(int64(day * 24 * time.Hour))
		if _, _, err := r.agent.Resume(t.Context(), host.ResumeRequest{ID: id, Deadline: now().Add(time.Hour)}); err != nil {
			t.Fatal(err)
		}
		before := now()
		text := r.run(id, "date +%s.%N")
		after := now()
		seconds, err := strconv.ParseFloat(text, 64)
		if err != nil {
			t.Fatal(err)
		}
		got := time.Unix(0, int64(seconds*1e9))
		if !got.Before(before.Add(-off)) && !got.After(after.Add(off)) {
			return
		}
		t.Logf("the guest's time is %v, want one from %v to %v", got, before, after)
	}
	t.Error("the guest's time is wrong after each of three days")
}

// TestForksDrawTheirOwn: processes that were drawing random numbers when they were
// copied do not draw the same ones.
func TestForksDrawTheirOwn(t *testing.T) {
	notInALab(t)
	copies := 4
	if testkit.IsLong() {
		copies = 10
	}
	r := realSandboxes{t, realHost(t, func(c *host.Config) { c.MaxMemMiB = 16 << 10 })} // they use little of it
	id := r.create("base", 256)
	r.run(id, `nohup python3 -c '
import os, time, uuid
with open("/tmp/drawn", "w") as f:
    while True:
        print(os.urandom(16).hex(), uuid.uuid4().hex, open("/proc/sys/kernel/random/uuid").read().strip(), file=f, flush=True)
        time.sleep(0.01)
' > /dev/null 2>&1 &`)
	r.run(id, "until [ -s /tmp/drawn ] && [ $(wc -l </tmp/drawn) -ge 2 ]; do sleep 0.1; done")
	drawn := map[string]int{} // by how many
	for _, f := range r.fork(id, copies) {
		lines := strings.Fields(r.run(f, "n=$(wc -l </tmp/drawn); until [ $(wc -l </tmp/drawn) -gt $((n+10)) ]; do sleep 0.1; done; head -n -1 /tmp/drawn"))
		slices.Sort(lines)
		for _, l := range slices.Compact(lines) {
			drawn[l]++
		}
	}
	all, own := 0, 0
	for value, n := range drawn {
		switch n {
		case copies: // from before
			all++
		case 1:
			own++
		default:
			t.Errorf("%s was drawn by %d of %d copies", value, n, copies)
		}
	}
	t.Logf("%d values are from before, %d were drawn since", all, own)
	if all == 0 || own < copies*10 {
		t.Errorf("%d values are from before, %d were drawn since", all, own)
	}
}

// notInALab leaves a test that takes minutes there to make check-all.
func notInALab(t *testing.T) {
	t.Helper()
	if testkit.Accelerator() != "tcg" {
		testkit.Long(t, "minutes where KVM is emulated")
	}
}

// pidOf finds a sandbox's VMM.
func pidOf(t *testing.T, id sandbox.ID) string {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range lines {
		line, _ := os.ReadFile(path) // it is gone
		if strings.HasPrefix(string(line), "/usr/bin/qemu-system-x86_64\x00-name\x00"+string(id)+"\x00") {
			return filepath.Dir(path)
		}
	}
	t.Fatalf("no VMM of %s", id)
	return ""
}

// memoryOf opens the file that a VM has mapped as its memory.
func memoryOf(t *testing.T, id sandbox.ID) *os.File {
	t.Helper()
	for line := range eachLine(t, filepath.Join(pidOf(t, id), "maps")) {
		if i := strings.Index(line, "/"); i >= 0 && strings.Contains(line, ".pages/images/") {
			f, err := os.Open(line[i:])
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
	}
	t.Fatalf("%s has no memory that is a file", id)
	return nil
}

// ramOf says how many bytes of a VM's memory it shares (its part of them) and has
// for itself.
func ramOf(t *testing.T, id sandbox.ID) (shared, own int64) {
	t.Helper()
	inside := false
	var pss, anonymous int64
	for line := range eachLine(t, filepath.Join(pidOf(t, id), "smaps")) {
		name, value, _ := strings.Cut(line, ":")
		if strings.Contains(name, "-") { // the head of the next mapping
			inside = strings.Contains(line, ".pages/images/")
		}
		if !inside {
			continue
		}
		kib, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(value, "kB")), 10, 64)
		switch name {
		case "Pss":
			pss += kib << 10
		case "Anonymous":
			anonymous += kib << 10
		}
	}
	if pss == 0 {
		t.Fatalf("%s has no memory that is a file", id)
	}
	return pss - anonymous, anonymous
}

func eachLine(t *testing.T, path string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		t.Helper()
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }() // read only
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if !yield(lines.Text()) {
				return
			}
		}
	}
}
