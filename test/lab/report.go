package main

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dormouse-sandbox/dormouse/vmm/qemu"
)

// report reads the output of a test binary that runs with -test.v.
type report struct {
	all     bytes.Buffer // everything, for the log
	live    io.Writer    // nil, or where it is shown as it comes
	mu      sync.Mutex   // stdout and stderr come from one goroutine, the progress line from another
	passed  int
	failed  []string
	parts   map[string][]string // of those, the subtests that failed
	skips   int                 // subtests, too
	needs   []need              // why
	partial []byte
	current string          // whose output comes
	resets  map[string]bool // tests that told of a guest that was reset without a word
}

// need is what testkit.Require says when it skips a test.
type need struct{ name, said string }

var (
	running = regexp.MustCompile(`^=== (?:RUN|CONT|NAME) +([^/\s]+)`)
	outcome = regexp.MustCompile(`^( *)--- (PASS|FAIL|SKIP): (\S+) \(`)
	needs   = regexp.MustCompile(`^ +(\S+\.go:\d+: needs (\S+): .*)`)
)

func (r *report) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all.Write(p)
	if r.live != nil {
		if _, err := r.live.Write(p); err != nil {
			return 0, err
		}
	}
	r.partial = append(r.partial, p...)
	for {
		line, rest, ok := bytes.Cut(r.partial, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		r.line(string(line))
		r.partial = rest
	}
}

func (r *report) line(line string) {
	if m := running.FindStringSubmatch(line); m != nil {
		r.current = m[1]
	}
	if strings.Contains(line, qemu.DetailReset) {
		if r.resets == nil {
			r.resets = map[string]bool{}
		}
		r.resets[r.current] = true
	}
	if m := needs.FindStringSubmatch(line); m != nil {
		r.needs = append(r.needs, need{name: m[2], said: m[1]})
	}
	m := outcome.FindStringSubmatch(line)
	if m == nil {
		return
	}
	whole := m[1] == "" // and not a subtest
	switch m[2] {
	case "PASS":
		if whole {
			r.passed++
		}
	case "FAIL":
		if top, part, isPart := strings.Cut(m[3], "/"); whole {
			r.failed = append(r.failed, m[3])
		} else if isPart && !strings.Contains(part, "/") {
			if r.parts == nil {
				r.parts = map[string][]string{}
			}
			r.parts[top] = append(r.parts[top], regexp.QuoteMeta(part))
		}
	case "SKIP":
		r.skips++
	}
}

// onlyResets says that tests have failed, and each of them told of a guest that was
// reset. See docs/decisions.md: the emulator does that to guests of its KVM.
func (r *report) onlyResets() bool {
	other := func(test string) bool { return !r.resets[test] }
	return len(r.failed) > 0 && !slices.ContainsFunc(r.failed, other)
}

// again is what -test.run needs to run no more than what failed, a test at a time.
func (r *report) again() []string {
	var patterns []string
	for _, test := range r.failed {
		pattern := "^" + test + "$"
		if parts := r.parts[test]; len(parts) > 0 {
			pattern += "/^(" + strings.Join(parts, "|") + ")$"
		}
		patterns = append(patterns, pattern)
	}
	return patterns
}

// counts is the closing line's middle.
func (r *report) counts() string {
	text := fmt.Sprintf("%d passed", r.passed)
	if n := len(r.failed); n > 0 {
		text += fmt.Sprintf(", %d failed", n)
	}
	if r.skips > 0 {
		text += fmt.Sprintf(", %d skipped", r.skips)
	}
	return text
}

// notInALab are the preconditions that no lab has, and what only who asks for it
// gets. Tests that need them are skipped; any other skip is a failure.
var notInALab = []string{
	"false-kvm", // its KVM works
	"tcg",       // its VMs run on that
	"long",      // see testkit.Long
	"network",   // packages come from another machine
	"cachestat", // its kernel is older (Linux 6.5)
}

// unexpected says what is wrong with the skips, or nothing.
func (r *report) unexpected() []string {
	var out []string
	for _, n := range r.needs {
		if !slices.Contains(notInALab, n.name) {
			out = append(out, "it needs "+n.name+", and a lab should have it: "+n.said)
		}
	}
	if said := len(r.needs); r.skips > said {
		out = append(out, fmt.Sprintf("%d tests were skipped, and %d said what they need", r.skips, said))
	}
	return out
}

// spread tells the middle and the ends of some times.
func spread(times []time.Duration) string {
	if len(times) == 0 {
		return "no times"
	}
	slices.Sort(times)
	seconds := func(d time.Duration) string { return fmt.Sprintf("%.1fs", d.Seconds()) }
	return fmt.Sprintf("fastest %s, median %s, slowest %s",
		seconds(times[0]), seconds(times[len(times)/2]), seconds(times[len(times)-1]))
}
