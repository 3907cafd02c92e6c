package host_test

import (
	"io/fs"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// holdings is what a process and its machine have of sandboxes.
type holdings struct {
	goroutines, fds, mounts, namespaces int
	files                               int
	allocated                           int64
}

func holdingsOf(t *testing.T, dir string) (h holdings) {
	t.Helper()
	h.goroutines, h.fds = runtime.NumGoroutine(), testkit.OpenFDs(t)
	h.mounts = len(testkit.Mounts(t, testInstance, dir))
	names, _ := filepath.Glob("/run/netns/dm" + testInstance + "-*") // the pattern is right
	h.namespaces = len(names)
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // it is gone again
		}
		if d.Name() == "consoles" { // the last words of the ended, bounded by number and age
			return fs.SkipDir
		}
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() {
			h.files++
			h.allocated += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// livesLeaveNothing takes n sandboxes, one after the other, through a life, and
// compares what is there after the first few with what is there in the end.
func livesLeaveNothing(t *testing.T, agent *host.Agent, request func() host.CreateRequest, dir string, n int) {
	t.Helper()
	ctx := t.Context()
	life := func() {
		req := request()
		id := string(req.ID)
		if _, err := agent.Create(ctx, req); err != nil {
			t.Fatal(err)
		}
		if _, err := agent.Pause(ctx, id); err != nil {
			t.Fatal(err)
		}
		if _, _, err := agent.Resume(ctx, host.ResumeRequest{ID: req.ID, Deadline: time.Now().Add(time.Hour)}); err != nil {
			t.Fatal(err)
		}
		if _, err := agent.Destroy(ctx, id, ""); err != nil {
			t.Fatal(err)
		}
		if err := agent.Acknowledge([]string{id}); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 {
		life()
	}
	before := holdingsOf(t, dir)
	for range n {
		life()
	}
	var after holdings
	flat := testkit.Poll(time.Minute, func() bool {
		after = holdingsOf(t, dir)
		return after.goroutines <= before.goroutines+3 && after.fds <= before.fds+2 && after.mounts <= before.mounts &&
			after.namespaces <= before.namespaces+1 && after.files <= before.files+3 && after.allocated <= before.allocated+1<<20
	})
	t.Logf("after 5 lives: %+v; after %d more: %+v", before, n, after)
	if !flat {
		t.Errorf("from %+v to %+v", before, after)
	}
}

// TestAThousandLives on the fake VMM, with a real store.
func TestAThousandLives(t *testing.T) {
	testkit.Long(t, "a thousand pauses")
	r := newSnapshotRig(t)
	r.open()
	livesLeaveNothing(t, r.agent, r.request, r.dir, 1000)
}

// TestAHundredLives of real VMs.
func TestAHundredLives(t *testing.T) {
	testkit.Long(t, "a hundred VMs")
	var dir string
	agent := realHost(t, func(c *host.Config) { dir = filepath.Dir(c.Dir) })
	request := func() host.CreateRequest {
		return host.CreateRequest{
			ID: sandbox.NewID(), Deadline: time.Now().Add(time.Hour),
			Spec: sandbox.Spec{Template: "base", VCPUs: 1, MemMiB: 256, DiskMiB: 4096},
		}
	}
	livesLeaveNothing(t, agent, request, dir, 100)
}
