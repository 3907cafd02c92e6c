package chaos_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// pagerOf is the PID of a server's page server.
func pagerOf(t *testing.T, s *rig.Server) int {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	store := []byte(filepath.Join(s.Data, "snapshots"))
	for _, path := range paths {
		line, err := os.ReadFile(path)
		if err == nil && bytes.Contains(line, []byte("\x00pager\x00")) && bytes.Contains(line, store) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	return 0
}

// killPager kills it, and gives its PID.
func killPager(t *testing.T, s *rig.Server) int {
	t.Helper()
	pid := pagerOf(t, s)
	if pid == 0 { // to kill that would be to kill ourselves
		t.Fatal("there is no page server")
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	return pid
}

// soon bounds one call.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// TestKillPagerAndServer: a sandbox that was resumed reads memory and disk from
// the page server, which is killed three times, at last together with the server:
// it notices nothing. While it is paused, both are killed: it is paused still.
func TestKillPagerAndServer(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	id := create(t, s)
	sh(t, s, id, "head -c 20000000 /dev/urandom > big; sha256sum big > sum; sync")
	pause := func() {
		t.Helper()
		if _, err := s.Client.Pause(soon(t), id); err != nil {
			t.Fatal(err)
		}
	}
	resume := func() {
		t.Helper()
		if _, err := s.Client.Resume(soon(t), id, api.Resume{}); err != nil {
			t.Fatal(err)
		}
	}
	replacePager := func() {
		t.Helper()
		before := killPager(t, s)
		testkit.Eventually(t, time.Minute, "another page server", func() bool { now := pagerOf(t, s); return now != 0 && now != before })
	}
	whole := func() {
		t.Helper()
		if got := sh(t, s, id, "sudo sh -c 'echo 3 > /proc/sys/vm/drop_caches'; sha256sum -c sum"); got != "big: OK" {
			t.Errorf("it answers %q", got)
		}
	}
	pause()
	resume()
	replacePager()
	whole()
	replacePager()
	whole()

	s.Kill()
	killPager(t, s)
	// What is in the host's page cache would be read without anybody.
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
	s.Up()
	whole()

	pause()
	s.Kill()
	killPager(t, s)
	s.Up()
	if sb := all(t, s)[id]; sb.State != "paused" {
		t.Errorf("after both were killed it is %s", sb.State)
	}
	resume()
	whole()
}
