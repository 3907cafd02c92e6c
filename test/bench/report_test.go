package bench_test

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// row is one line of a table. Its floor is the sample that it is a multiple of.
type row struct {
	what  string
	unit  string
	got   sample
	floor sample
}

// section is one table, with what has to be known to read it.
type section struct {
	name, title, text string
	ratio             string // heading of the last column; empty: there is none
	rows              []row
	notes             []string
}

// report is what one run measured.
type report struct {
	began    time.Time
	load     string
	about    []string
	sections []*section
}

func (r *report) begin() {
	r.began, r.load = time.Now(), field("/proc/loadavg", 0)
	r.sections = []*section{
		{
			name: "create", title: "Create to first answer", ratio: "× floor",
			text: "The floor is a bare QEMU that the benchmark starts itself with the command line of the sandbox's own VM: the same memory, " +
				"state of the devices, image and flags, on a fresh overlay and a TAP of its own, with nobody supervising it. It takes turns with the " +
				"sandbox; nothing else runs. What the floor leaves out: a new name, token, clock and random pool for the guest, before anything of a user runs. " +
				"The first create of a template and a shape boots, and so does its floor.",
		},
		{name: "phases", title: "Where a create spends its time", text: "The phases that the API reports for the creates above but the first."},
		{
			name: "pause", title: "Pause and resume", ratio: "× floor",
			text: "An idle sandbox is paused and resumed again and again. The floor is a bare QEMU as above, that goes on from the warm snapshot the sandbox " +
				"began with: nearly the same memory, and of one generation only.",
		},
		{name: "pause phases", title: "Where a pause spends its time", text: "The phases that the API reports for the pauses above. The guest stands still during freeze, device_state and dirty_scan; it is gone after that."},
		{
			name: "exec", title: "Exec round trip", ratio: "× floor",
			text: "One command after the other, in one sandbox. The floor is a bare HTTP round trip to the guest agent from inside the sandbox's network " +
				"namespace, over the same TAP, on a connection that is kept. Starting a process inside the emulated guest is the second floor that no API can go below.",
		},
		{
			name: "files", title: "File transfer", ratio: "share of the floor",
			text: fmt.Sprintf("%d MiB of zeros at a time, which nothing compresses; MB are 10⁶ bytes. The floor is a bare HTTP transfer of as much, "+
				"over the same TAP, to and from a Python process in the same guest that drops the bytes, or makes them up. It stores nothing, the API's "+
				"transfers write and read a file on tmpfs: the disk is not part of the comparison.", transferBytes>>20),
		},
		{name: "memory", title: "Memory of an idle sandbox", text: "Read right after the create, by commands in the sandbox and from /proc of the host."},
	}
}

func (r *report) section(name string) *section {
	for _, s := range r.sections {
		if s.name == name {
			return s
		}
	}
	panic("no section " + name)
}

func (r *report) add(name string, rw row) { s := r.section(name); s.rows = append(s.rows, rw) }

func (r *report) note(name, text string) { s := r.section(name); s.notes = append(s.notes, text) }

// whole says that every table has its rows.
func (r *report) whole() bool {
	return !slices.ContainsFunc(r.sections, func(s *section) bool { return len(s.rows) == 0 })
}

// machine describes what the numbers are of.
func (r *report) machine(b *testing.B, s *rig.Server) {
	b.Helper()
	if r.about != nil {
		return
	}
	h, err := s.Client.Host(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	accelerator := map[string]string{"tcg": "software emulation (tcg), no KVM"}[h.Accelerator]
	if accelerator == "" {
		accelerator = h.Accelerator
	}
	r.about = []string{
		fmt.Sprintf("%d cores (%s), %d MiB of memory", runtime.NumCPU(), cpu(), h.MemTotalMiB),
		"Linux " + field("/proc/sys/kernel/osrelease", 0) + ", " + h.VMM + ", " + accelerator,
		fmt.Sprintf("sandboxes of 1 vCPU and %d MiB from the template base", memMiB),
	}
}

func cpu() string {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

// field is one word of a file of one line.
func field(path string, n int) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return strings.Fields(string(data))[n]
}

// The report's place in the document; the rest of it is written by people.
const (
	beginMark = "<!-- written by make bench; what is between the marks is replaced -->"
	endMark   = "<!-- end of what make bench writes -->"
)

// write replaces the part between the marks, in place: the file keeps its owner.
func (r *report) write(path string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	head, rest, ok := bytes.Cut(old, []byte(beginMark))
	_, tail, ok2 := bytes.Cut(rest, []byte(endMark))
	if !ok || !ok2 {
		return fmt.Errorf("%s has no place for the numbers: the marks are %q and %q", path, beginMark, endMark)
	}
	var out bytes.Buffer
	out.Write(head)
	out.WriteString(beginMark + "\n")
	r.render(&out)
	out.WriteString("\n" + endMark)
	out.Write(tail)
	return os.WriteFile(path, out.Bytes(), 0o644)
}

func (r *report) render(w *bytes.Buffer) {
	fmt.Fprintf(w, "\n## The run of %s UTC\n\n", r.began.UTC().Format("2006-01-02 15:04"))
	for _, line := range r.about {
		fmt.Fprintf(w, "- %s\n", line)
	}
	fmt.Fprintf(w, "- load average when it began: %s (an idle machine has one near 0; a run on a busy one says little)\n", r.load)
	for _, s := range r.sections {
		fmt.Fprintf(w, "\n### %s\n\n%s\n\n", s.title, s.text)
		s.render(w)
		for _, note := range s.notes {
			fmt.Fprintf(w, "\n%s\n", note)
		}
	}
}

func (s *section) render(w *bytes.Buffer) {
	header, line := "| | unit | median | 10 % | 90 % | runs |", "|---|---|---:|---:|---:|---:|"
	if s.ratio != "" {
		header, line = header+" "+s.ratio+" |", line+"---:|"
	}
	fmt.Fprintf(w, "%s\n%s\n", header, line)
	for _, r := range s.rows {
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %d |", r.what, r.unit,
			digits(r.got.median()), digits(r.got.at(0.1)), digits(r.got.at(0.9)), len(r.got))
		if s.ratio != "" {
			ratio := "—"
			if r.floor != nil {
				ratio = fmt.Sprintf("%.2f", r.got.median()/r.floor.median())
			}
			fmt.Fprintf(w, " %s |", ratio)
		}
		fmt.Fprintln(w)
	}
}

// digits writes a number with no more digits than its spread deserves.
func digits(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
