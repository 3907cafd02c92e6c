package main

import (
	"io"
	"strings"
	"testing"
)

// TestSkipsAreAccountedFor: only what no lab has may be missing, and every skip
// says what it needs.
func TestSkipsAreAccountedFor(t *testing.T) {
	for _, tt := range []struct{ name, output, counts, unexpected string }{
		{"none", "=== RUN   TestA\n--- PASS: TestA (0.00s)\n", "1 passed", ""},
		{"what no lab has", "=== RUN   TestA\n    a_test.go:9: needs tcg: KVM gives a timer\n--- SKIP: TestA (0.00s)\n", "0 passed, 1 skipped", ""},
		{"nor the internet", "    a_test.go:9: needs network: a lab has none\n--- SKIP: TestA (0.00s)\n", "0 passed, 1 skipped", ""},
		{"what a lab has", "    a_test.go:9: needs dm: no device-mapper\n--- SKIP: TestA (0.00s)\n", "0 passed, 1 skipped", "it needs dm"},
		{
			"in a subtest", "=== RUN   TestA/b\n    a_test.go:9: needs kvm: none\n--- PASS: TestA (0.00s)\n    --- SKIP: TestA/b (0.00s)\n",
			"1 passed, 1 skipped", "it needs kvm",
		},
		{"without a word", "    a_test.go:9: not today\n--- SKIP: TestA (0.00s)\n", "0 passed, 1 skipped", "1 tests were skipped, and 0 said"},
		{"a failure", "--- FAIL: TestA (0.00s)\n    --- FAIL: TestA/b (0.00s)\n", "0 passed, 1 failed", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &report{}
			for _, part := range strings.SplitAfter(tt.output, "T") { // lines come in pieces
				if _, err := io.WriteString(r, part); err != nil {
					t.Fatal(err)
				}
			}
			if got := r.counts(); got != tt.counts {
				t.Errorf("counts are %q, want %q", got, tt.counts)
			}
			got := strings.Join(r.unexpected(), "\n")
			if (got == "") != (tt.unexpected == "") || !strings.Contains(got, tt.unexpected) {
				t.Errorf("unexpected is %q, want %q", got, tt.unexpected)
			}
		})
	}
}

// TestOnlyWhatTheEmulatorBrokeRunsAgain: every test that failed must have told of a
// guest that was reset.
func TestOnlyWhatTheEmulatorBrokeRunsAgain(t *testing.T) {
	const said = "    a_test.go:9: exec: guest_exit: the guest rebooted, which ends it\n"
	for _, tt := range []struct {
		name, output, again string
	}{
		{"passed", "=== RUN   TestA\n--- PASS: TestA (0.00s)\n", ""},
		{"reset, and passed", "=== RUN   TestA\n" + said + "--- PASS: TestA (0.00s)\n", ""},
		{"reset", "=== RUN   TestA\n" + said + "--- FAIL: TestA (0.00s)\n", "^TestA$"},
		{"reset in a subtest", "=== RUN   TestA\n=== RUN   TestA/b\n" + said + "--- FAIL: TestA (0.00s)\n    --- PASS: TestA/a (0.00s)\n    --- FAIL: TestA/b,_(c) (0.00s)\n        --- FAIL: TestA/b,_(c)/d (0.00s)\n", `^TestA$/^(b,_\(c\))$`},
		{"another's reset", "=== RUN   TestA\n" + said + "--- PASS: TestA (0.00s)\n=== RUN   TestB\n--- FAIL: TestB (0.00s)\n", ""},
		{"one of two", "=== RUN   TestA\n" + said + "--- FAIL: TestA (0.00s)\n=== RUN   TestB\n--- FAIL: TestB (0.00s)\n", ""},
		{"in parallel", "=== RUN   TestA\n=== RUN   TestB\n=== NAME  TestA\n" + said + "=== NAME  TestB\n--- FAIL: TestB (0.00s)\n--- PASS: TestA (0.00s)\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &report{}
			if _, err := io.WriteString(r, tt.output); err != nil {
				t.Fatal(err)
			}
			got := ""
			if r.onlyResets() {
				got = strings.Join(r.again(), " ")
			}
			if got != tt.again {
				t.Errorf("what runs again is %q, want %q", got, tt.again)
			}
		})
	}
}
