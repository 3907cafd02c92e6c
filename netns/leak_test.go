package netns_test

import (
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/netns"
)

type usage struct{ fds, threads, goroutines, mounts, links int }

func measure(t testing.TB) usage {
	t.Helper()
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	count := func(line string) (n int) {
		for _, c := range run(t, line) {
			if c == '\n' {
				n++
			}
		}
		return n
	}
	mounts := len(testkit.Mounts(t, "/run/netns/dmtest0-"))
	return usage{testkit.OpenFDs(t), len(threads), runtime.NumGoroutine(), mounts, count("ip -o link | grep dmtest0- || true")}
}

func TestFiftyCyclesLeakNothing(t *testing.T) {
	n := network(t, netns.Config{})
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	cycle := func() {
		s := acquire(t, n, netns.Policy{Internet: true})
		tap, err := s.OpenTap()
		if err != nil {
			t.Fatal(err)
		}
		if err := tap.Close(); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 { // the runtime makes its threads
		cycle()
	}
	before := measure(t)
	for range 50 {
		cycle()
	}
	var after usage
	defer func() {
		if t.Failed() {
			t.Logf("before %+v, after %+v", before, after)
		}
	}()
	testkit.Eventually(t, 5*time.Second, "as few of everything as before", func() bool {
		after = measure(t)
		return after.fds <= before.fds && after.goroutines <= before.goroutines && after.mounts <= before.mounts &&
			after.links <= before.links && after.threads <= before.threads+20 // a busy scheduler has some idle ones; a leak of one a cycle is 50
	})
}

func BenchmarkAcquireClose(b *testing.B) {
	n := network(b, netns.Config{})
	if err := n.Sweep(b.Context()); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		s, err := n.Acquire(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		if err := s.Close(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkAcquirePrepared waits outside the clock until a slot is ready.
func BenchmarkAcquirePrepared(b *testing.B) {
	n := network(b, netns.Config{Prepare: 1})
	if err := n.Sweep(b.Context()); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		b.StopTimer()
		testkit.Eventually(b, 5*time.Second, "a slot prepared", func() bool { return len(remains(b, "test0")) == 2 })
		b.StartTimer()
		s, err := n.Acquire(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := s.Close(b.Context()); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
