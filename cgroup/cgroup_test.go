package cgroup_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/cgroup"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// open makes a branch that the test owns, and checks at its end that nothing of
// it is left.
func open(t *testing.T) *cgroup.Tree {
	t.Helper()
	testkit.Root(t)
	tree, err := cgroup.Open(cgroup.Mount, "test0")
	testkit.Require(t, "cgroup", err == nil, errText(err))
	t.Cleanup(func() {
		if err := tree.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(filepath.Join(cgroup.Mount, "dormouse-test0")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the branch is still there: %v", err)
		}
	})
	return tree
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

var plenty = cgroup.Limits{MemBytes: 256 << 20, PIDs: 100, CPUs: 2}

func create(t *testing.T, tree *cgroup.Tree, name string, l cgroup.Limits) *cgroup.Group {
	t.Helper()
	g, err := tree.Create(name, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return g
}

// start runs a shell command that is born in the group.
func start(t *testing.T, g *cgroup.Group, script string) *exec.Cmd {
	t.Helper()
	dir, err := os.Open(g.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }() // nothing was written
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
	})
	return cmd
}

func content(t *testing.T, g *cgroup.Group, file string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(g.Path(), file))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

func TestAFolderIsNoHierarchy(t *testing.T) {
	dir := t.TempDir()
	_, err := cgroup.Open(dir, "test0")
	if !sandbox.Is(err, sandbox.KindUnsupported) || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v, want unsupported, with the folder's name", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("it left %v", left)
	}
	if _, err := cgroup.Open(filepath.Join(dir, "nothing"), "test0"); !sandbox.Is(err, sandbox.KindUnsupported) {
		t.Errorf("got %v for a folder that is not there, want unsupported", err)
	}
}

func TestLimitsAreTheKernels(t *testing.T) {
	tree := open(t)
	g := create(t, tree, "one", cgroup.Limits{MemBytes: 64 << 20, PIDs: 17, CPUs: 3})
	for file, want := range map[string]string{
		"memory.max": "67108864", "memory.oom.group": "1", "pids.max": "17", "cpu.max": "300000 100000", "cpu.weight": "300",
	} {
		if got := content(t, g, file); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
	if _, err := tree.Create("one", plenty); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second one of that name: got %v, want that it exists", err)
	}
	if killed, err := g.OOMKilled(); killed || err != nil {
		t.Errorf("a fresh group: OOM killed %v, %v", killed, err)
	}
}

func TestALimitThatTheKernelRefusesLeavesNothing(t *testing.T) {
	tree := open(t)
	g, err := tree.Create("bad", cgroup.Limits{MemBytes: 1 << 20, PIDs: -5, CPUs: 1})
	if err == nil {
		t.Fatalf("it was taken: %v", g)
	}
	if _, err := os.Stat(tree.Find("bad").Path()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the group is still there: %v", err)
	}
}

func TestTooMuchMemoryIsAnOOMKill(t *testing.T) {
	tree := open(t)
	g := create(t, tree, "hog", cgroup.Limits{MemBytes: 24 << 20, PIDs: 20, CPUs: 1})
	err := start(t, g, `x=$(head -c 200000000 /dev/zero | tr '\0' x); echo ${#x}`).Wait()
	if err == nil {
		t.Error("200 MB fitted into 24 MiB")
	}
	if killed, err := g.OOMKilled(); !killed || err != nil {
		t.Errorf("OOM killed: %v, %v; %s", killed, err, content(t, g, "memory.events"))
	}
}

func TestProcessesAreCounted(t *testing.T) {
	tree := open(t)
	g := create(t, tree, "bomb", cgroup.Limits{MemBytes: 64 << 20, PIDs: 8, CPUs: 1})
	cmd := start(t, g, `i=0; while [ $i -lt 50 ]; do sleep 600 & i=$((i+1)); done; wait`)
	testkit.Eventually(t, 20*time.Second, "at the limit", func() bool {
		return strings.Contains(content(t, g, "pids.events"), "max ") && content(t, g, "pids.events") != "max 0"
	})
	if n := len(strings.Fields(content(t, g, "cgroup.procs"))); n > 8 {
		t.Errorf("%d processes in a group of 8", n)
	}
	if err := g.Remove(context.Background()); err != nil { // they are killed with it
		t.Error(err)
	}
	_ = cmd.Wait()
}

func TestRemoveIsRepeatable(t *testing.T) {
	tree := open(t)
	g := create(t, tree, "one", plenty)
	start(t, g, "exec sleep 600")
	for range 2 {
		if err := g.Remove(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if killed, err := g.OOMKilled(); killed || err != nil {
		t.Errorf("a group that is gone: OOM killed %v, %v", killed, err)
	}
}

func TestSweepKeepsWhatItIsToldTo(t *testing.T) {
	tree := open(t)
	kept, stray := create(t, tree, "kept", plenty), create(t, tree, "stray", plenty)
	alive, gone := start(t, kept, "exec sleep 600"), start(t, stray, "exec sleep 600")
	if err := tree.Sweep(context.Background(), func(name string) bool { return name == "kept" }); err != nil {
		t.Fatal(err)
	}
	if err := gone.Wait(); err == nil {
		t.Error("the stray's process ended by itself")
	}
	if err := alive.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the kept one's process: %v", err)
	}
	if err := tree.Close(); err != nil { // something is in it
		t.Error(err)
	}
	if got := content(t, kept, "pids.max"); got != "100" {
		t.Errorf("the kept group has pids.max %q", got)
	}
	// Another process finds both by name.
	again, err := cgroup.Open(cgroup.Mount, "test0")
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Find("kept").Remove(context.Background()); err != nil {
		t.Error(err)
	}
}
