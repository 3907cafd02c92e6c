// Package testkit is what the tests of several packages share: checked skips,
// and checks for things that were left behind.
package testkit

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// Require skips the test when a precondition does not hold. With REQUIRE=name
// (a comma-separated list, or "all") in the environment a skip is a failure: a
// skip is a claim, and it is checked.
func Require(t testing.TB, name string, holds bool, why string) {
	t.Helper()
	if holds {
		return
	}
	required := strings.Split(os.Getenv("REQUIRE"), ",")
	if slices.Contains(required, name) || slices.Contains(required, "all") {
		t.Fatalf("REQUIRE=%s is set and %s is missing: %s", os.Getenv("REQUIRE"), name, why)
	}
	t.Skipf("needs %s: %s", name, why)
}

// Root skips the test unless it runs as root.
func Root(t testing.TB) {
	t.Helper()
	Require(t, "root", os.Geteuid() == 0, "run it as root")
}

// Tool skips the test unless an executable is on PATH.
func Tool(t testing.TB, name string) {
	t.Helper()
	_, err := exec.LookPath(name)
	Require(t, name, err == nil, "not on PATH")
}

// Eventually waits until cond holds, and fails the test after limit.
func Eventually(t testing.TB, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		if cond() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: not %s", limit, what)
		}
		time.Sleep(pause)
	}
}

// OpenFDs counts this process's file descriptors.
func OpenFDs(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
