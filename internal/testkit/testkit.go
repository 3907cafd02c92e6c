// Package testkit is what the tests of several packages share: checked skips,
// and checks for things that were left behind.
package testkit

import (
	"errors"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Require skips the test when a precondition does not hold. With REQUIRE=name
// (a comma-separated list, or "all") in the environment a skip is a failure: a
// skip is a claim, and it is checked.
func Require(t testing.TB, name string, holds bool, why string) {
	t.Helper()
	if holds {
		return
	}
	if Demanded(name) {
		t.Fatalf("REQUIRE=%s is set and %s is missing: %s", os.Getenv("REQUIRE"), name, why)
	}
	t.Skipf("needs %s: %s", name, why)
}

// Demanded says that REQUIRE names a precondition: what depends on it must not be
// left out.
func Demanded(name string) bool {
	required := strings.Split(os.Getenv("REQUIRE"), ",")
	return slices.Contains(required, name) || slices.Contains(required, "all")
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

// Patience is how long a test waits for what takes a fraction of limit on an
// ordinary machine: a multiple of it where DORMOUSE_PATIENCE has a factor, as in
// a lab, whose VMs are emulated twice. It is for waiting, not for what is measured.
func Patience(limit time.Duration) time.Duration {
	factor, err := strconv.Atoi(os.Getenv("DORMOUSE_PATIENCE"))
	if err != nil || factor < 1 {
		return limit
	}
	return limit * time.Duration(factor)
}

// Each runs a test for every one of names, as many at a time as there are
// processors. It is for tests that share nothing within this process.
func Each(t *testing.T, names []string, test func(t *testing.T, name string)) {
	t.Helper()
	var wg sync.WaitGroup
	next := make(chan string)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for name := range next {
				t.Run(strings.ReplaceAll(name, "/", "_"), func(t *testing.T) { test(t, name) })
			}
		})
	}
	for _, name := range names {
		next <- name
	}
	close(next)
	wg.Wait()
}

// Eventually waits until cond holds, and fails the test after limit, for which
// there is Patience.
func Eventually(t testing.TB, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	if !Poll(limit, cond) {
		t.Fatalf("after %v: not %s", Patience(limit), what)
	}
}

// Poll is Eventually for a test that goes on when the condition does not come.
func Poll(limit time.Duration, cond func() bool) bool {
	limit = Patience(limit)
	deadline := time.Now().Add(limit)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		if cond() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(pause)
	}
}

// Unmount unmounts what a test has mounted. Whoever walks through the machine just
// then (df, find) makes it busy for a moment; what stays busy is an error.
func Unmount(dir string) error {
	var err error
	Poll(10*time.Second, func() bool {
		err = unix.Unmount(dir, 0)
		return !errors.Is(err, unix.EBUSY)
	})
	return err
}

// Mounts lists what of some owners is mounted: the lines of /proc/self/mounts that
// name one. How many there are in all is no test's to say: others run beside it.
func Mounts(t testing.TB, owners ...string) []string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(strings.Split(string(data), "\n"), func(line string) bool {
		return !slices.ContainsFunc(owners, func(owner string) bool { return strings.Contains(line, owner) })
	})
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
