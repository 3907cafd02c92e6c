// Package bench_test measures the main job end to end, each number beside the
// floor that the same machine sets for it in the same run, and writes
// docs/benchmarks.md. `make bench` runs it.
package bench_test

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/netns"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

var results report

// TestMain writes the report when all of it was measured: half of a run does
// not replace a whole one.
func TestMain(m *testing.M) {
	if err := touchMemory(); err != nil {
		fmt.Fprintln(os.Stderr, "touch the machine's memory:", err)
		os.Exit(1)
	}
	results.begin()
	code := m.Run()
	rig.RemoveBinaries()
	if code == 0 && results.whole() {
		if err := results.write("../../docs/benchmarks.md"); err != nil {
			fmt.Fprintln(os.Stderr, "write the report:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// touchMemory uses half of the memory that is free, and frees it again. On a machine
// that is a VM itself, memory which nobody has used for long may be its host's again: the
// first use of each page would be measured with whatever comes upon it first.
func touchMemory() error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return err
	}
	mem, err := unix.Mmap(-1, 0, int(info.Freeram*uint64(info.Unit)/2), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	for at := 0; at < len(mem); at += os.Getpagesize() {
		mem[at] = 1
	}
	return unix.Munmap(mem)
}

// runs is how often a thing is measured that takes seconds; DORMOUSE_BENCH_RUNS
// changes it.
func runs() int {
	if n, err := strconv.Atoi(os.Getenv("DORMOUSE_BENCH_RUNS")); err == nil && n > 0 {
		return n
	}
	return 10
}

// once keeps a benchmark, whose samples are its own, from being repeated when
// it was faster than the testing package expects.
func once(b *testing.B) bool { return b.N == 1 }

// sample is one thing, measured several times.
type sample []float64

func (s sample) sorted() sample { return slices.Sorted(slices.Values(s)) }

// at is the value below which a part of the sample lies.
func (s sample) at(part float64) float64 {
	sorted := s.sorted()
	return sorted[int(part*float64(len(sorted)-1)+0.5)]
}

func (s sample) median() float64 { return s.at(0.5) }

// ms times a call.
func ms(b *testing.B, call func() error) float64 {
	b.Helper()
	began := time.Now()
	if err := call(); err != nil {
		b.Fatal(err)
	}
	return time.Since(began).Seconds() * 1000
}

const memMiB = 512

func create(ctx context.Context, s *rig.Server) (api.Sandbox, error) {
	life := time.Hour.Seconds()
	return s.Client.CreateSandbox(ctx, api.CreateSandbox{Template: "base", VCPUs: 1, MemMiB: memMiB, TimeoutSeconds: &life}, "")
}

func sh(b *testing.B, s *rig.Server, id, line string) string {
	b.Helper()
	got, err := s.Client.Exec(b.Context(), id, api.Exec{Shell: line, User: "root"})
	if err != nil {
		b.Fatal(err)
	}
	if got.ExitCode != 0 {
		b.Fatalf("%q: %s: %s", line, got.Status, got.Stderr)
	}
	return got.Stdout
}

// BenchmarkCreate measures from the create request to the first answer of a
// command, beside a bare QEMU that does the same: that goes on from the same warm
// snapshot. The first create of all boots; its floor does, too.
func BenchmarkCreate(b *testing.B) {
	if !once(b) {
		return
	}
	s := rig.Start(b, rig.Options{})
	results.machine(b, s)
	slot := newSlot(b)
	bootsInstead(b, s, slot)
	var made, answered, agent sample
	var bare *bareVM
	phases := newPhases()
	for range runs() {
		began := time.Now()
		sb, err := create(b.Context(), s)
		if err != nil {
			b.Fatal(err)
		}
		made = append(made, time.Since(began).Seconds()*1000)
		execTrue(b, s, sb.ID)
		answered = append(answered, time.Since(began).Seconds()*1000)
		phases.add(sb.Phases)
		if bare == nil {
			bare = newBareVM(b, s, slot)
		}
		remove(b, s, sb.ID)
		// Nothing else runs now, as nothing else ran before.
		_, health := bare.run(b)
		agent = append(agent, health)
	}
	results.add("create", row{"bare QEMU, same memory, devices and command line: start → guest agent's first answer", "ms", agent, nil})
	results.add("create", row{"create → answer over the API", "ms", made, agent})
	results.add("create", row{"create → first answer of exec (`true`) over the API", "ms", answered, agent})
	phases.report("phases")
	b.ReportMetric(answered.median(), "ms/first-answer")
	b.ReportMetric(agent.median(), "ms/floor")
}

// bootsInstead measures the create that boots, once: what it keeps is what those
// after it go on from.
func bootsInstead(b *testing.B, s *rig.Server, slot *netns.Slot) {
	b.Helper()
	began := time.Now()
	sb, err := create(b.Context(), s)
	if err != nil {
		b.Fatal(err)
	}
	made := sample{time.Since(began).Seconds() * 1000}
	bare := newBareVM(b, s, slot)
	remove(b, s, sb.ID)
	var console, agent sample
	for range min(3, runs()) {
		first, health := bare.run(b)
		console, agent = append(console, first), append(agent, health)
	}
	results.add("create", row{"bare QEMU that boots: start → first byte on the console", "ms", console, nil})
	results.add("create", row{"bare QEMU that boots: start → guest agent's first answer", "ms", agent, nil})
	results.add("create", row{"the first create of a template and shape, which boots and is kept → answer over the API", "ms", made, agent})
}

// BenchmarkPause measures a pause and the way back, beside a bare QEMU that goes on
// from the warm snapshot: nearly the same memory.
func BenchmarkPause(b *testing.B) {
	if !once(b) {
		return
	}
	s := rig.Start(b, rig.Options{})
	results.machine(b, s)
	slot := newSlot(b)
	first, err := create(b.Context(), s) // boots
	if err != nil {
		b.Fatal(err)
	}
	remove(b, s, first.ID)
	sb, err := create(b.Context(), s)
	if err != nil {
		b.Fatal(err)
	}
	bare := newBareVM(b, s, slot)
	var paused, resumed, answered, agent sample
	phases := newPhases()
	for range runs() {
		execTrue(b, s, sb.ID)
		var got api.Sandbox
		paused = append(paused, ms(b, func() (err error) { got, err = s.Client.Pause(b.Context(), sb.ID); return err }))
		phases.add(got.Phases)
		_, health := bare.run(b)
		agent = append(agent, health)
		began := time.Now()
		if _, err := s.Client.Resume(b.Context(), sb.ID, api.Resume{}); err != nil {
			b.Fatal(err)
		}
		resumed = append(resumed, time.Since(began).Seconds()*1000)
		execTrue(b, s, sb.ID)
		answered = append(answered, time.Since(began).Seconds()*1000)
	}
	results.add("pause", row{"bare QEMU that goes on from a warm snapshot: start → guest agent's first answer", "ms", agent, nil})
	results.add("pause", row{"resume → answer over the API", "ms", resumed, agent})
	results.add("pause", row{"resume → first answer of exec (`true`) over the API", "ms", answered, agent})
	results.add("pause", row{"pause of an idle guest → answer over the API: it is on disk, and synced", "ms", paused, nil})
	phases.report("pause phases")
	b.ReportMetric(answered.median(), "ms/first-answer")
	b.ReportMetric(agent.median(), "ms/floor")
}

// phaseSamples are the phases of a call, in the order in which they first came.
type phaseSamples struct {
	order []string
	taken map[string]sample
}

func newPhases() *phaseSamples { return &phaseSamples{taken: map[string]sample{}} }

func (p *phaseSamples) add(phases []api.Phase) {
	for _, x := range phases {
		if _, ok := p.taken[x.Name]; !ok {
			p.order = append(p.order, x.Name)
		}
		p.taken[x.Name] = append(p.taken[x.Name], x.Millis)
	}
}

func (p *phaseSamples) report(section string) {
	for _, name := range p.order {
		results.add(section, row{name, "ms", p.taken[name], nil})
	}
}

func execTrue(b *testing.B, s *rig.Server, id string) {
	b.Helper()
	if _, err := s.Client.Exec(b.Context(), id, api.Exec{Command: []string{"true"}}); err != nil {
		b.Fatal(err)
	}
}

func remove(b *testing.B, s *rig.Server, id string) {
	b.Helper()
	if _, err := s.Client.Delete(b.Context(), id); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkExec measures one command, beside a bare HTTP round trip to the
// guest over the same TAP and beside what the guest needs to start a process.
func BenchmarkExec(b *testing.B) {
	if !once(b) {
		return
	}
	s, sb := oneSandbox(b)
	raw := newRawHTTP(b, s, sb.ID)
	var floor, ping, exec, health sample
	for range 10 * runs() {
		floor = append(floor, ms(b, raw.health))
		ping = append(ping, ms(b, func() error {
			_, err := s.Client.Ping(b.Context(), sb.ID)
			return err
		}))
		exec = append(exec, ms(b, func() error {
			_, err := s.Client.Exec(b.Context(), sb.ID, api.Exec{Command: []string{"true"}})
			return err
		}))
		health = append(health, ms(b, func() error {
			_, err := s.Client.Health(b.Context())
			return err
		}))
	}
	var spawn sample
	const each = 20
	for range runs() {
		took := sh(b, s, sb.ID, fmt.Sprintf(`python3 -c '
import subprocess, time
t = time.monotonic()
for i in range(%d): subprocess.run(["true"])
print((time.monotonic() - t) / %d * 1000)'`, each, each))
		spawn = append(spawn, number(b, took))
	}
	results.add("exec", row{"raw HTTP: GET /health of the guest agent over the same TAP", "ms", floor, nil})
	results.add("exec", row{"inside the guest: python3 starts `true` and waits", "ms", spawn, nil})
	results.add("exec", row{"GET /healthz of the API, which touches no guest", "ms", health, floor})
	results.add("exec", row{"POST …/ping over the API", "ms", ping, floor})
	results.add("exec", row{"POST …/exec of `true` over the API", "ms", exec, floor})
	results.note("exec", fmt.Sprintf("Exec takes %.1f times what the raw round trip and starting the process take together.",
		exec.median()/(floor.median()+spawn.median())))
	b.ReportMetric(exec.median(), "ms/exec")
	b.ReportMetric(floor.median(), "ms/floor")
}

// BenchmarkFiles measures transfers, beside a raw HTTP transfer of the same size
// to and from a Python process in the same guest over the same TAP.
func BenchmarkFiles(b *testing.B) {
	if !once(b) {
		return
	}
	s, sb := oneSandbox(b)
	raw := newRawHTTP(b, s, sb.ID)
	raw.serve(b)
	const path = "/dev/shm/bench"
	var rawUp, rawDown, up, down sample
	for range runs() {
		rawUp = append(rawUp, rate(b, raw.upload))
		rawDown = append(rawDown, rate(b, raw.download))
		up = append(up, rate(b, func() error {
			_, err := s.Client.WriteFile(b.Context(), sb.ID, path, "root", zeros())
			return err
		}))
		down = append(down, rate(b, func() error {
			body, _, err := s.Client.ReadFile(b.Context(), sb.ID, path, "root")
			if err != nil {
				return err
			}
			return swallow(body)
		}))
	}
	results.add("files", row{"raw HTTP upload over the same TAP, bytes dropped in the guest", "MB/s", rawUp, nil})
	results.add("files", row{"upload over the API into a file in the guest's memory", "MB/s", up, rawUp})
	results.add("files", row{"raw HTTP download over the same TAP, bytes made in the guest", "MB/s", rawDown, nil})
	results.add("files", row{"download over the API from a file in the guest's memory", "MB/s", down, rawDown})
	b.ReportMetric(up.median(), "MB/s-up")
	b.ReportMetric(down.median(), "MB/s-down")
}

// BenchmarkMemory reads what an idle sandbox takes.
func BenchmarkMemory(b *testing.B) {
	if !once(b) {
		return
	}
	s, sb := oneSandbox(b)
	var agent, anon, vm, used, server sample
	for range runs() {
		agent = append(agent, number(b, sh(b, s, sb.ID, "awk '/^VmRSS/ {print $2/1024}' /proc/1/status")))
		anon = append(anon, number(b, sh(b, s, sb.ID, "awk '/^RssAnon/ {print $2/1024}' /proc/1/status")))
		m, err := s.Client.Metrics(b.Context(), sb.ID)
		if err != nil {
			b.Fatal(err)
		}
		used = append(used, float64(m.MemUsedBytes)/(1<<20))
		vm = append(vm, rss(b, s.VMs()[0]))
		server = append(server, rss(b, s.PID()))
	}
	results.add("memory", row{"guest agent (PID 1), resident", "MiB", agent, nil})
	results.add("memory", row{"guest agent (PID 1), of that anonymous: not shared with its file", "MiB", anon, nil})
	results.add("memory", row{fmt.Sprintf("whole guest, used of its %d MiB, page cache not counted", memMiB), "MiB", used, nil})
	results.add("memory", row{fmt.Sprintf("QEMU of an idle VM of %d MiB, resident on the host", memMiB), "MiB", vm, nil})
	results.add("memory", row{"server (control and host in one process), resident", "MiB", server, nil})
	b.ReportMetric(agent.median(), "MiB/agent")
	b.ReportMetric(vm.median(), "MiB/vm")
}

func oneSandbox(b *testing.B) (*rig.Server, api.Sandbox) {
	b.Helper()
	s := rig.Start(b, rig.Options{})
	results.machine(b, s)
	sb, err := create(b.Context(), s)
	if err != nil {
		b.Fatal(err)
	}
	return s, sb
}
