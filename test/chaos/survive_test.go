package chaos_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// witness is a sandbox with something in it that would not survive a restart
// of its VM.
type witness struct {
	id     string
	file   string  // what the file says
	boot   string  // the guest kernel's boot ID
	pid    string  // of a process in the background
	start  string  // when that started, in ticks since the guest's boot
	uptime float64 // of the guest, in seconds, when it was last seen
}

const startOf = "cut -d' ' -f22 /proc/%s/stat"

// leave puts a file and a process into a sandbox.
func leave(t testing.TB, s *rig.Server, id string) *witness {
	t.Helper()
	w := &witness{id: id, file: "left in " + id}
	sh(t, s, id, "echo '"+w.file+"' > ~/left && sync")
	w.pid = sh(t, s, id, "setsid sleep 100000 </dev/null >/dev/null 2>&1 & echo $!")
	w.start = sh(t, s, id, fmt.Sprintf(startOf, w.pid))
	w.boot = sh(t, s, id, "cat /proc/sys/kernel/random/boot_id")
	w.uptime = w.now(t, s)
	return w
}

func (w *witness) now(t testing.TB, s *rig.Server) float64 {
	t.Helper()
	up, err := strconv.ParseFloat(sh(t, s, w.id, "cut -d' ' -f1 /proc/uptime"), 64)
	if err != nil {
		t.Fatal(err)
	}
	return up
}

// check asks for all of it again.
func (w *witness) check(t testing.TB, s *rig.Server) {
	t.Helper()
	line := "cat ~/left; cat /proc/sys/kernel/random/boot_id; " + fmt.Sprintf(startOf, w.pid)
	if got, want := sh(t, s, w.id, line), w.file+"\n"+w.boot+"\n"+w.start; got != want {
		t.Errorf("%s says %q, want %q", w.id, got, want)
	}
	if up := w.now(t, s); up <= w.uptime {
		t.Errorf("%s is up for %.2fs, and was for %.2fs before", w.id, up, w.uptime)
	} else {
		w.uptime = up
	}
}

// five starts five sandboxes and leaves something in each.
func five(t *testing.T, s *rig.Server) []*witness {
	t.Helper()
	ids := make([]string, 5)
	errs := make([]error, len(ids))
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			sb, err := try(t, s)
			ids[i], errs[i] = sb.ID, err
		})
	}
	wg.Wait()
	var out []*witness
	for i, id := range ids {
		if errs[i] != nil {
			t.Fatalf("create: %v", errs[i])
		}
		out = append(out, leave(t, s, id))
	}
	return out
}

// TestKillWithFiveRunning kills and stops the server in several ways while five
// sandboxes run. They notice nothing, and their deadlines hold.
func TestKillWithFiveRunning(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	boxes := five(t, s)
	intact := func(t *testing.T) {
		t.Helper()
		var ids []string
		for _, w := range boxes {
			w.check(t, s)
			if sb := get(t, s, w.id); sb.State != "running" {
				t.Errorf("%s is %s (%s)", w.id, sb.State, sb.Cause)
			}
			ids = append(ids, w.id)
		}
		onlyThese(t, s, ids...)
	}
	for _, step := range []struct {
		name string
		end  func()
	}{
		{"killed", s.Kill},
		{"stopped", s.Stop},
		{"killed while it takes over, twice", func() {
			s.Kill()
			for _, at := range []string{"network is declared", "sandbox adopted"} {
				s.Launch()
				testkit.Eventually(t, time.Minute, "so far: "+at, func() bool { return strings.Contains(s.Log(), at) })
				s.Kill()
			}
		}},
	} {
		t.Run(step.name, func(t *testing.T) {
			step.end()
			s.Up()
			intact(t)
		})
	}

	t.Run("deadlines", func(t *testing.T) {
		meanwhile, later := boxes[0].id, boxes[1].id
		boxes = boxes[2:]
		if _, err := s.Client.SetTimeout(t.Context(), later, 20*time.Second); err != nil {
			t.Fatal(err)
		}
		sb, err := s.Client.SetTimeout(t.Context(), meanwhile, 2*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		s.Kill()
		testkit.Eventually(t, time.Minute, "past its deadline", func() bool { return time.Now().After(*sb.Deadline) })
		s.Up()
		up := time.Now()
		wantEnd(t, ended(t, s, meanwhile), "gone", "ttl")
		t.Logf("the deadline that had passed fired within %v of the start", time.Since(up).Round(time.Millisecond))
		sb = ended(t, s, later)
		wantEnd(t, sb, "gone", "ttl")
		if sb.EndedAt != nil && sb.EndedAt.Before(*sb.Deadline) {
			t.Errorf("%s ended at %v, before its deadline %v", later, sb.EndedAt, sb.Deadline)
		}
		intact(t)
	})
}

// TestReboot makes the machine look as after a reboot: no process, namespace or
// run directory of the instance, and a journal of another boot.
func TestReboot(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	ids := []string{create(t, s), create(t, s)}
	s.Kill()
	for _, pid := range s.VMs() {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	testkit.Eventually(t, time.Minute, "without VMs", func() bool { return len(s.VMs()) == 0 })
	for _, ns := range s.Namespaces() {
		run(t, "ip", "netns", "delete", filepath.Base(ns))
	}
	run(t, "nft", "delete", "table", "inet", "dormouse_"+s.Instance)
	if err := os.RemoveAll("/run/dormouse-" + s.Instance); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		ageEntry(t, filepath.Join(s.Data, "host", "journal", id+".json"))
	}
	s.Up()
	for _, id := range ids {
		wantEnd(t, ended(t, s, id), "failed", "host_reboot")
	}
	onlyThese(t, s)
	id := create(t, s)
	if got := sh(t, s, id, "echo works"); got != "works" {
		t.Errorf("after it a sandbox answers %q", got)
	}
}

// ageEntry makes an entry of the journal one of the boot before.
func ageEntry(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var entry map[string]any
	if err := json.Unmarshal(data, &entry); err != nil {
		t.Fatal(err)
	}
	vm, ok := entry["vmm"].(map[string]any)
	if !ok || vm["boot_id"] == nil {
		t.Fatalf("%s has no boot ID", data)
	}
	vm["boot_id"] = "00000000-0000-4000-8000-000000000000"
	if data, err = json.Marshal(entry); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func run(t testing.TB, argv ...string) {
	t.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%q: %v: %s", argv, err, out)
	}
}

// TestDownAfterKill ends what a killed server left running.
func TestDownAfterKill(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	ids := []string{create(t, s), create(t, s)}
	s.Kill()
	if n := len(s.VMs()); n != len(ids) {
		t.Errorf("%d VMs run on without the server, want %d", n, len(ids))
	}
	s.Down()
	if left := s.Leftovers(); len(left) > 0 {
		t.Errorf("left after down:\n%s", strings.Join(left, "\n"))
	}
	s.Up()
	for _, id := range ids {
		wantEnd(t, ended(t, s, id), "gone", "shutdown")
	}
	onlyThese(t, s)
}
