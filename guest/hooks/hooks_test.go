package hooks_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/guest/freezer"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/hooks"
	"github.com/dormouse-sandbox/dormouse/guest/identity"
	"github.com/dormouse-sandbox/dormouse/guest/reap"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// runner has a folder without hooks, and no cgroups.
func runner(t *testing.T) *hooks.Runner {
	t.Helper()
	return &hooks.Runner{Dir: t.TempDir(), Reaper: &reap.Reaper{}, Path: "/usr/bin:/bin", Limit: time.Minute, Total: 2 * time.Minute}
}

// grouped is a runner that has cgroups, as in a machine.
func grouped(t *testing.T) (r *hooks.Runner, root string) {
	t.Helper()
	root = testkit.Cgroup(t)
	r = runner(t)
	r.Cgroup = filepath.Join(root, "hooks")
	r.Leftovers = filepath.Join(root, "user", "hooks")
	for _, dir := range []string{r.Cgroup, filepath.Dir(r.Leftovers)} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return r, root
}

// hook writes one.
func hook(t *testing.T, r *hooks.Runner, name, script string) {
	t.Helper()
	text := script
	if !strings.HasPrefix(script, "#!") {
		text = "#!/bin/sh\n" + script + "\n"
	}
	if err := os.WriteFile(filepath.Join(r.Dir, name), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

// run runs them. How long they take is not compared.
func run(t *testing.T, r *hooks.Runner) []guestapi.Hook {
	t.Helper()
	got := r.Run(t.Context(), identity.Identity{SandboxID: "abc", Env: map[string]string{"COLOUR": "blue", "odd": "a\x00b"}})
	for i := range got {
		got[i].TookMs = 0
	}
	return got
}

func want(t *testing.T, got []guestapi.Hook, want ...guestapi.Hook) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestAnImageWithoutHooks(t *testing.T) {
	r := runner(t)
	want(t, run(t, r))
	r.Dir = filepath.Join(r.Dir, "missing")
	want(t, run(t, r))
}

func TestHooksRunInTheOrderOfTheirNames(t *testing.T) {
	r := runner(t)
	order := filepath.Join(t.TempDir(), "order")
	for _, name := range []string{"20-b", "10-a", "9-c", "a.sh"} {
		hook(t, r, name, "echo $0 >> "+order)
	}
	hook(t, r, ".hidden", "echo hidden >> "+order)
	hook(t, r, "10-a~", "echo backup >> "+order)
	hook(t, r, "README", "echo not executable >> "+order)
	if err := os.Chmod(filepath.Join(r.Dir, "README"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(r.Dir, "folder"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a.sh", filepath.Join(r.Dir, "link")); err != nil {
		t.Fatal(err)
	}
	want(t, run(t, r), []guestapi.Hook{{Name: "10-a"}, {Name: "20-b"}, {Name: "9-c"}, {Name: "a.sh"}, {Name: "link"}}...)
	data, err := os.ReadFile(order)
	if wantOrder := strings.Join([]string{"10-a", "20-b", "9-c", "a.sh", "link", ""}, "\n"); err != nil || strings.ReplaceAll(string(data), r.Dir+"/", "") != wantOrder {
		t.Errorf("%q, %v", data, err)
	}
}

func TestWhatAHookIsGiven(t *testing.T) {
	r := runner(t)
	hook(t, r, "10", `pwd; echo "$DORMOUSE_SANDBOX_ID $COLOUR $HOME $USER"; read x || echo no input; command -v ls > /dev/null && echo path`)
	want(t, run(t, r), guestapi.Hook{Name: "10", Output: "/\nabc blue /root root\nno input\npath\n"})
}

func TestHooksThatFailHoldNothingUp(t *testing.T) {
	r := runner(t)
	hook(t, r, "10", "echo no >&2; exit 3")
	hook(t, r, "20", "kill -9 $$")
	hook(t, r, "30", "#!/no/such/interpreter\n")
	hook(t, r, "40", "echo yes")
	want(t, run(t, r),
		guestapi.Hook{Name: "10", Output: "no\n", Error: "exit status 3"},
		guestapi.Hook{Name: "20", Error: "signal: killed"},
		guestapi.Hook{Name: "30", Error: "start: fork/exec " + filepath.Join(r.Dir, "30") + ": no such file or directory"},
		guestapi.Hook{Name: "40", Output: "yes\n"},
	)
}

func TestAHookThatTakesTooLongIsEndedWithAllThatItStarted(t *testing.T) {
	for name, make := range map[string]func(t *testing.T) *hooks.Runner{
		"in a cgroup":        func(t *testing.T) *hooks.Runner { r, _ := grouped(t); return r },
		"in a process group": runner,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := make(t)
			r.Limit = testkit.Patience(3 * time.Second) // for it to begin
			hook(t, r, "10", "echo begun; sleep 300 & echo $! > "+r.Dir+"/pid; wait")
			hook(t, r, "20", "echo next")
			got := run(t, r)
			if len(got) != 2 || !strings.HasPrefix(got[0].Error, "killed after ") || got[1].Output != "next\n" {
				t.Fatalf("%+v", got)
			}
			data, err := os.ReadFile(filepath.Join(r.Dir, "pid"))
			if err != nil {
				t.Fatal(err)
			}
			pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
			if err != nil {
				t.Fatal(err)
			}
			testkit.Eventually(t, 20*time.Second, "killed", func() bool { return gone(pid) })
			if left, err := filepath.Glob(filepath.Join(r.Cgroup, "hook-*")); r.Cgroup != "" && (err != nil || len(left) > 0) {
				t.Errorf("cgroups are left: %q, %v", left, err)
			}
		})
	}
}

// gone says that a process has ended, reaped or not: nobody here is PID 1.
func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(stat), ") Z ")
}

func TestHooksTogetherHaveALimit(t *testing.T) {
	r := runner(t)
	r.Total = 3 * time.Second // for the first to begin
	hook(t, r, "10", "exec sleep 300")
	hook(t, r, "20", "echo never")
	got := run(t, r)
	if len(got) != 2 || !strings.HasPrefix(got[0].Error, "killed after ") || got[1].Error != "not run: the hooks before it have taken 3s" {
		t.Errorf("%+v", got)
	}
}

func TestTooManyHooksAreNotRun(t *testing.T) {
	r := runner(t)
	for i := range 65 {
		hook(t, r, fmt.Sprintf("%02d", i), "echo ran > "+r.Dir+"/../ran")
	}
	want(t, run(t, r), guestapi.Hook{Name: filepath.Base(r.Dir), Error: "65 hooks, at most 64 are run"})
}

// TestOutputIsBoundedAndFitForAConsole: what is kept is the end.
func TestOutputIsBoundedAndFitForAConsole(t *testing.T) {
	r := runner(t)
	hook(t, r, "10", `i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo line $i; done; printf 'last\033[2J\007\377\n'`)
	got := run(t, r)
	if len(got) != 1 || len(got[0].Output) > 5000 || !strings.HasSuffix(got[0].Output, "line 3000\nlast?[2J???\n") && !strings.HasSuffix(got[0].Output, "line 3000\nlast?[2J??\n") {
		t.Errorf("%d bytes: %.100q", len(got[0].Output), got[0].Output[max(0, len(got[0].Output)-40):])
	}
	hook(t, r, "10", `exec head -c 10000 /dev/zero | tr '\0' 'ä'; printf 'ä%.0s' $(seq 5000)`)
	if got := run(t, r); !strings.HasSuffix(got[0].Output, "ää") || strings.ContainsRune(got[0].Output, '\uFFFD') {
		t.Errorf("%.100q", got[0].Output)
	}
}

// TestWhatAHookLeavesRunningGoesOnWithTheUsersProcesses: it stands still with them
// until then.
func TestWhatAHookLeavesRunningGoesOnWithTheUsersProcesses(t *testing.T) {
	r, root := grouped(t)
	f := freezer.New(root, "hooks")
	if err := f.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	count := filepath.Join(t.TempDir(), "count")
	hook(t, r, "10", "(while :; do echo x >> "+count+"; sleep 0.001; done) & echo $!; echo started")
	got := run(t, r)
	if len(got) != 1 || got[0].Error != "" || !strings.HasSuffix(got[0].Output, "started\n") {
		t.Fatalf("%+v", got)
	}
	pid, _, _ := strings.Cut(got[0].Output, "\n")
	procs, err := os.ReadFile(filepath.Join(r.Leftovers, "cgroup.procs"))
	if err != nil || !strings.Contains("\n"+string(procs), "\n"+pid+"\n") {
		t.Errorf("%q has no %s, %v", procs, pid, err)
	}
	size := func() int64 {
		info, err := os.Stat(count)
		if err != nil {
			return 0
		}
		return info.Size()
	}
	testkit.Eventually(t, 20*time.Second, "frozen", func() bool {
		events, err := os.ReadFile(filepath.Join(r.Leftovers, "cgroup.events"))
		return err == nil && strings.Contains(string(events), "frozen 1")
	})
	before := size()
	if err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, 20*time.Second, "going on", func() bool { return size() > before })
	n, err := strconv.Atoi(pid)
	if err == nil {
		err = syscall.Kill(n, syscall.SIGKILL)
	}
	if err != nil {
		t.Error(err)
	}
	if err := os.Remove(r.Cgroup); err != nil {
		t.Errorf("somebody is left in the hooks' own cgroup: %v", err)
	}
}

// TestManyHooksLeaveNothingOpen.
func TestManyHooksLeaveNothingOpen(t *testing.T) {
	r := runner(t)
	hook(t, r, "10", "exit 0")
	hook(t, r, "20", "#!/no/such/interpreter\n")
	run(t, r)
	before := testkit.OpenFDs(t)
	for range 20 {
		run(t, r)
	}
	testkit.Eventually(t, 20*time.Second, "closed", func() bool { return testkit.OpenFDs(t) <= before })
}
