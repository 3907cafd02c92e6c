package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func testInstance(t testing.TB) instance {
	t.Helper()
	inst, err := newInstance(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	if err := inst.makeData(); err != nil {
		t.Fatal(err)
	}
	return inst
}

// child is a process that can stand for a server.
func child(t *testing.T) (serverState, *exec.Cmd) {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // by a signal
	})
	stat, err := kernel.StatProc(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return serverState{PID: cmd.Process.Pid, StartTime: stat.StartTime, URL: "http://127.0.0.1:1", Version: "v1"}, cmd
}

func TestStateOfAServer(t *testing.T) {
	inst := testInstance(t)
	if s, alive, err := inst.running(); alive || err != nil || s != (serverState{}) {
		t.Errorf("before the first start: %+v, %v, %v", s, alive, err)
	}
	want, _ := child(t)
	if err := inst.writeState(want); err != nil {
		t.Fatal(err)
	}
	if s, alive, err := inst.running(); !alive || err != nil || s != want {
		t.Errorf("running: %+v, %v, %v", s, alive, err)
	}
	stranger := want
	stranger.StartTime++ // the PID is another process's by now
	if err := inst.writeState(stranger); err != nil {
		t.Fatal(err)
	}
	if _, alive, err := inst.running(); alive || err != nil {
		t.Errorf("with a reused PID: %v, %v", alive, err)
	}
	if stopped, err := inst.stop(t.Context()); stopped || err != nil {
		t.Errorf("stop of a stranger: %v, %v", stopped, err)
	}
	if err := inst.writeState(want); err != nil {
		t.Fatal(err)
	}
	if _, alive, err := inst.running(); !alive || err != nil {
		t.Errorf("the stranger is gone: %v, %v", alive, err)
	}
	if stopped, err := inst.stop(t.Context()); !stopped || err != nil {
		t.Errorf("stop: %v, %v", stopped, err)
	}
	if _, alive, err := inst.running(); alive || err != nil {
		t.Errorf("after stop: %v, %v", alive, err)
	}
}

// TestStateCutShort: whatever is left of the file, it tells of no server, and
// neither up nor down is held up by it.
func TestStateCutShort(t *testing.T) {
	inst := testInstance(t)
	s, _ := child(t)
	whole, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{inst.statePath(), inst.lockPath()} {
		for n := range len(whole) {
			if err := os.WriteFile(path, whole[:n], 0o644); err != nil {
				t.Fatal(err)
			}
			if _, alive, err := inst.running(); alive || err != nil {
				t.Fatalf("%s cut at %d: %v, %v", filepath.Base(path), n, alive, err)
			}
		}
	}
}

func FuzzServerState(f *testing.F) {
	f.Add([]byte(`{"pid":1,"start_time":1,"url":"http://127.0.0.1:7070","version":"v1"}`))
	f.Add([]byte(`{"pid":-1}`))
	f.Add([]byte(`{"pid":99999999999999999999}`))
	path := filepath.Join(testInstance(f).data, "x")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		s, alive, err := readState(path)
		if alive && (err != nil || s.PID <= 0) {
			t.Errorf("alive: %+v, %v", s, err)
		}
	})
}

// TestOneAtATime: a server, from its first moment on, keeps another one and
// down away, and can be found and stopped by them.
func TestOneAtATime(t *testing.T) {
	inst := testInstance(t)
	starting, _ := child(t)
	starting.URL = ""
	lock, err := inst.lock(starting)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := inst.lock(serverState{}); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("a second one: %v", err)
	}
	if s, alive, err := inst.running(); !alive || err != nil || s != starting {
		t.Errorf("running: %+v, %v, %v", s, alive, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := inst.awaitStart(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("await given up: %v", err)
	}
	awaited := make(chan serverState)
	go func() {
		s, _, _ := inst.awaitStart(context.Background())
		awaited <- s
	}()
	up := starting
	up.URL = "http://127.0.0.1:1"
	if err := inst.writeState(up); err != nil {
		t.Fatal(err)
	}
	if s := <-awaited; s != up {
		t.Errorf("awaited: %+v", s)
	}
	if stopped, err := inst.stop(t.Context()); !stopped || err != nil {
		t.Errorf("stop: %v, %v", stopped, err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	next, err := inst.lock(serverState{}) // as down does
	if err != nil {
		t.Fatal(err)
	}
	if s, alive, err := inst.running(); alive || err != nil {
		t.Errorf("down is taken for a server: %+v, %v", s, err)
	}
	if err := next.Close(); err != nil {
		t.Fatal(err)
	}
}

// FuzzConfig: a client's config is read whole, or the error names the file.
func FuzzConfig(f *testing.F) {
	const whole = `{"url":"http://127.0.0.1:7070","key":"k"}`
	for n := range len(whole) + 1 { // also cut short anywhere
		f.Add([]byte(whole[:n]))
	}
	f.Add([]byte("null"))
	path := filepath.Join(f.TempDir(), "config.json")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := readConfig(path)
		if err != nil && (!strings.Contains(err.Error(), path) || c != (config{})) {
			t.Errorf("%q: %+v, %v", data, c, err)
		}
		if err == nil && !json.Valid(data) {
			t.Errorf("%q is taken for %+v", data, c)
		}
	})
}

// TestTwoSpellingsAreOneInstance: a link on the way to the data directory does
// not make another instance, whether the directory exists yet or not.
func TestTwoSpellingsAreOneInstance(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "real"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, rest := range []string{"", "new/data"} {
		one, err := newInstance(filepath.Join(dir, "real", rest))
		if err != nil {
			t.Fatal(err)
		}
		other, err := newInstance(filepath.Join(dir, "link", rest))
		if err != nil {
			t.Fatal(err)
		}
		if one != other {
			t.Errorf("%q: %v and %v", rest, one, other)
		}
	}
}
