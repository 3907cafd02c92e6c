package host_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func (r *rig) mustPause(id sandbox.ID) host.Saved {
	r.t.Helper()
	saved, err := r.agent.Pause(r.t.Context(), string(id))
	if err != nil {
		r.t.Fatal(err)
	}
	return saved
}

func (r *rig) mustResume(id sandbox.ID) {
	r.t.Helper()
	if _, err := r.resume(id); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) resume(id sandbox.ID) (host.Status, error) {
	s, _, err := r.agent.Resume(r.t.Context(), host.ResumeRequest{ID: id, Deadline: time.Now().Add(time.Hour)})
	return s, err
}

// TestPausedIsNowhereButOnDisk: eight generations, each of which changes some
// pages and zeroes others; while it is paused there is nothing of the sandbox, and
// afterwards it is as it was.
func TestPausedIsNowhereButOnDisk(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	id, model := r.mustCreate(), newTruth()
	for generation := range int64(8) {
		for i := range int64(5) {
			r.fill(id, 2+(generation*3+i)%40, byte('a'+generation), model)
		}
		r.fill(id, 2+(generation*3+40)%40, 0, model)
		saved := r.mustPause(id)
		if saved.State != "paused" || saved.Memory.Put == 0 {
			t.Fatalf("saved: %+v", saved)
		}
		if left := r.leftovers(); len(left) > 0 {
			t.Errorf("generation %d: while paused there is %v", generation, left)
		}
		r.mustResume(id)
		r.holds(id, model)
		if err := r.answers(id); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.agent.Destroy(t.Context(), string(id), ""); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, 10*time.Second, "only what is warm is in the store", func() bool {
		c, err := r.store.Collect(t.Context(), nil)
		return err == nil && c.Files == 0
	})
}

// TestAPauseCostsWhatHasChanged: what is equal to the generation before is not
// written again.
func TestAPauseCostsWhatHasChanged(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	id, model := r.mustCreate(), newTruth()
	for page := int64(2); page < 50; page++ {
		r.fill(id, page, 'x', model)
	}
	r.mustPause(id)
	r.mustResume(id)
	r.fill(id, 7, 'y', model)
	r.fill(id, 8, 'x', model) // written, and not changed
	saved := r.mustPause(id)
	if saved.Memory.Written > 2 || saved.Disk.Written != 1 { // who the guest is lies in page 1
		t.Errorf("one page has changed, written were %+v and %+v", saved.Memory, saved.Disk)
	}
	if saved.Disk.Equal < 1 {
		t.Errorf("nothing was found equal: %+v", saved.Disk)
	}
}

// TestTheConsoleGoesOn: what a guest has printed is there after a pause, in a
// copy, and in what is made of a snapshot.
func TestTheConsoleGoesOn(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	prints := func(id sandbox.ID) int {
		t.Helper()
		data, _, err := r.agent.Console(string(id), 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(data), "fake guest of")
	}
	id := r.mustCreate() // goes on from a warm snapshot, or makes it
	began := prints(id)
	for range 2 {
		r.mustPause(id)
		r.mustResume(id)
	}
	if n := prints(id); n != began+2 {
		t.Errorf("its console names %d guests, want %d", n, began+2)
	}
	if _, _, err := r.agent.Snapshot(t.Context(), string(id), "kept", nil); err != nil {
		t.Fatal(err)
	}
	r.restart() // it is in the store
	req := r.request()
	req.Spec.Template = "kept"
	if _, err := r.agent.Create(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	if n := prints(req.ID); n != began+3 {
		t.Errorf("the console of one made of a snapshot names %d guests, want %d", n, began+3)
	}
}

// TestAGuestThatWantsADamagedPageIsEnded when it does not answer, and only then.
func TestAGuestThatWantsADamagedPageIsEnded(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	booted, restored := r.mustCreate(), r.mustCreate()
	look := func(damaged, answers bool, times int) {
		r.images.damaged.Store(damaged)
		r.sick.Store(!answers)
		for range times {
			r.agent.CheckMemories()
		}
	}
	look(false, false, 3)
	look(true, true, 3)
	look(true, false, 1)
	look(true, true, 1) // it was slow, once
	look(true, false, 1)
	if got := r.status(restored); got.State != "running" {
		t.Fatalf("it is %s: %s", got.State, got.Detail)
	}
	look(true, false, 1)
	testkit.Eventually(t, 5*time.Second, "ended", func() bool { return r.status(restored).State == "ended" })
	if got := r.status(restored); got.Cause != sandbox.CausePagerFault {
		t.Errorf("it ended by %s: %s", got.Cause, got.Detail)
	}
	if got := r.status(booted); got.State != "running" {
		t.Errorf("one that booted is %s: %s", got.State, got.Detail)
	}
}

// TestAGuestThatFallsOverADamagedPage and reboots has not ended by itself.
func TestAGuestThatFallsOverADamagedPage(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	booted := r.mustCreate()
	ends := func(id sandbox.ID, damaged bool, end func(sandbox.ID) error, want sandbox.Cause) {
		t.Helper()
		r.images.damaged.Store(damaged)
		if err := end(id); err != nil {
			t.Fatal(err)
		}
		testkit.Eventually(t, 5*time.Second, "ended", func() bool { return r.status(id).State == "ended" })
		if got := r.status(id); got.Cause != want {
			t.Errorf("it ended by %s: %s; want %s", got.Cause, got.Detail, want)
		}
	}
	ends(r.mustCreate(), false, r.vms.Reset, sandbox.CauseGuestExit)
	ends(r.mustCreate(), true, r.vms.Reset, sandbox.CausePagerFault)
	ends(r.mustCreate(), true, r.vms.PowerOff, sandbox.CauseGuestExit)
	ends(booted, true, r.vms.Reset, sandbox.CauseGuestExit) // it goes on from no saved memory
}

// TestPauseFailsAt fails every step of a pause in turn. The sandbox runs on, or it
// is paused; what it knows is right either way, also after one pause more.
func TestPauseFailsAt(t *testing.T) {
	for _, point := range pausePoints(t) {
		t.Run(point, func(t *testing.T) {
			r := newSnapshotRig(t)
			r.open()
			id, model := r.mustCreate(), newTruth()
			r.fill(id, 3, 'a', model)
			r.mustPause(id)
			r.mustResume(id)
			r.fill(id, 3, 'b', model)
			defer fault.Set(point, fault.Nth(1, fault.Fail))()
			_, err := r.agent.Pause(t.Context(), string(id))
			fault.Set(point, nil)
			r.settles(id, err)
			r.goesOn(id, model)
		})
	}
}

// TestWhatStandsStillSaysWhy: one that a pause has left frozen is not one whose host
// has no space.
func TestWhatStandsStillSaysWhy(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	id := r.mustCreate()
	defer fault.Set("host/capture/devices", fault.Nth(1, fault.Fail))()
	r.sick.Store(true)
	if _, err := r.agent.Pause(t.Context(), string(id)); !errors.Is(err, fault.ErrInjected) {
		t.Fatalf("the pause: %v", err)
	}
	if got := r.status(id); got.State != "running" || got.Frozen != sandbox.FreezeSave {
		t.Errorf("it is %s, frozen: %q", got.State, got.Frozen)
	}
	_, ping := r.agent.Ping(t.Context(), string(id))
	_, pause := r.agent.Pause(t.Context(), string(id))
	for _, err := range []error{ping, pause} {
		if !sandbox.Is(err, sandbox.KindTransient) || !strings.Contains(err.Error(), "given up") {
			t.Errorf("a caller is told %v", err)
		}
	}
	r.sick.Store(false)
	r.settles(id, nil)
}

// TestAnAdoptedGuestIsWoken: the agent died while it had a guest's processes frozen,
// and the guest does not answer the next one at once.
func TestAnAdoptedGuestIsWoken(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	id := r.mustCreate()
	r.sick.Store(true)
	var stood atomic.Bool
	defer fault.Set("host/adopt/wake", fault.Nth(3, func(context.Context, string) error {
		stood.Store(r.stands(id))
		r.sick.Store(false)
		return nil
	}))()
	r.killAt("host/capture/devices", func(dying *host.Agent) { _, _ = dying.Pause(t.Context(), string(id)) })
	r.settles(id, nil)
	if !stood.Load() {
		t.Error("its processes were not frozen")
	}
}

// TestAnAdoptedGuestThatDoesNotAnswerHoldsUpNothing: its root may have ended the
// agent in it. It is frozen when the disk is full, and goes on, all the same.
func TestAnAdoptedGuestThatDoesNotAnswerHoldsUpNothing(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	id := r.mustCreate()
	asked := make(chan struct{}, 100)
	defer fault.Set("host/adopt/wake", func(ctx context.Context, _ string) error {
		asked <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})()
	r.restart()
	<-asked
	r.free.Store(0)
	testkit.Eventually(t, 5*time.Second, "frozen", func() bool { return r.status(id).Frozen == sandbox.FreezeNoSpace })
	r.free.Store(1 << 40)
	testkit.Eventually(t, 5*time.Second, "going on", func() bool { return r.status(id).Frozen == "" })
	r.mustPause(id)
	r.mustResume(id)
}

// settles waits until a sandbox runs or is paused, with nothing left of it.
func (r *snapshotRig) settles(id sandbox.ID, failed error) {
	r.t.Helper()
	if failed != nil && !errors.Is(failed, fault.ErrInjected) {
		r.t.Errorf("%v, want the injected fault", failed)
	}
	testkit.Eventually(r.t, 10*time.Second, "running or paused", func() bool {
		s := r.status(id)
		switch s.State {
		case "paused":
			return len(r.leftovers()) == 0
		case "running":
			return !r.stands(id) && s.Frozen == "" && r.answers(id) == nil
		}
		return false
	})
	if s := r.status(id); failed != nil && s.State == "paused" {
		r.t.Logf("paused although: %v", failed)
	}
}

// goesOn takes a sandbox through a pause and a resume more, and compares all.
func (r *snapshotRig) goesOn(id sandbox.ID, model truth) {
	r.t.Helper()
	if r.status(id).State == "paused" {
		r.mustResume(id)
	}
	r.holds(id, model)
	r.fill(id, 4, 'c', model)
	r.fill(id, 3, 0, model)
	r.mustPause(id)
	r.mustResume(id)
	r.holds(id, model)
}

func pausePoints(t *testing.T) []string {
	r := newSnapshotRig(t)
	r.open()
	id, model := r.mustCreate(), newTruth()
	r.mustPause(id)
	r.mustResume(id)
	r.fill(id, 3, 'a', model)
	points := pointsOf(func() { r.mustPause(id) })
	if len(points) < 25 {
		t.Fatalf("a pause passes only %v", points)
	}
	return points
}

// TestPauseKilledAt kills the agent at every step of a pause.
func TestPauseKilledAt(t *testing.T) {
	for _, point := range pausePoints(t) {
		t.Run(point, func(t *testing.T) {
			r := newSnapshotRig(t)
			r.open()
			id, model := r.mustCreate(), newTruth()
			r.fill(id, 3, 'a', model)
			r.mustPause(id)
			r.mustResume(id)
			r.fill(id, 3, 'b', model)
			r.killAt(point, func(dying *host.Agent) {
				_, _ = dying.Pause(context.Background(), string(id)) // it died
			})
			r.settles(id, nil)
			r.goesOn(id, model)
		})
	}
}

func resumePoints(t *testing.T) []string {
	r := newSnapshotRig(t)
	r.open()
	id := r.mustCreate()
	r.mustPause(id)
	points := pointsOf(func() { r.mustResume(id) })
	if len(points) < 15 {
		t.Fatalf("a resume passes only %v", points)
	}
	return points
}

// TestResumeFailsAt fails every step of a resume: the sandbox is paused as before,
// with nothing of it on the host.
func TestResumeFailsAt(t *testing.T) {
	for _, point := range resumePoints(t) {
		t.Run(point, func(t *testing.T) {
			r := newSnapshotRig(t)
			r.open()
			id, model := r.mustCreate(), newTruth()
			r.fill(id, 3, 'a', model)
			r.mustPause(id)
			defer fault.Set(point, fault.Nth(1, fault.Fail))()
			_, err := r.resume(id)
			fault.Set(point, nil)
			r.settles(id, err)
			if err != nil && r.status(id).State != "paused" {
				t.Errorf("after %v it is %s", err, r.status(id).State)
			}
			r.goesOn(id, model)
		})
	}
}

// TestResumeKilledAt kills the agent at every step of a resume.
func TestResumeKilledAt(t *testing.T) {
	for _, point := range resumePoints(t) {
		t.Run(point, func(t *testing.T) {
			r := newSnapshotRig(t)
			r.open()
			id, model := r.mustCreate(), newTruth()
			r.fill(id, 3, 'a', model)
			r.mustPause(id)
			r.killAt(point, func(dying *host.Agent) {
				_, _, _ = dying.Resume(context.Background(), host.ResumeRequest{ID: id, Deadline: time.Now().Add(time.Hour)}) // it died
			})
			r.settles(id, nil)
			r.goesOn(id, model)
		})
	}
}

// TestPauseAndResumeTwice: both are success when there is nothing to do.
func TestPauseAndResumeTwice(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	id := r.mustCreate()
	r.mustPause(id)
	if saved := r.mustPause(id); saved.State != "paused" || len(saved.Phases) != 0 {
		t.Errorf("the second pause: %+v", saved)
	}
	r.mustResume(id)
	before := r.status(id).Deadline
	r.mustResume(id)
	if after := r.status(id).Deadline; !after.Equal(before) {
		t.Errorf("the second resume moved the deadline from %v to %v", before, after)
	}
}

// TestWhatAPausedOneRefuses names the state, and a destroy takes everything.
func TestWhatAPausedOneRefuses(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	id := r.mustCreate()
	r.mustPause(id)
	if err := r.answers(id); !sandbox.Is(err, sandbox.KindPaused) || !strings.Contains(err.Error(), "is paused") {
		t.Errorf("ping: %v", err)
	}
	if _, err := r.agent.Destroy(t.Context(), string(id), ""); err != nil {
		t.Fatal(err)
	}
	if s := r.status(id); s.State != "ended" || s.Cause != sandbox.CauseUser {
		t.Errorf("after the destroy: %s (%s)", s.State, s.Cause)
	}
	if _, err := r.resume(id); err == nil {
		t.Error("a destroyed one was resumed")
	}
}

// TestAPauseNeedsRoom: nothing is written when there may not be space for it.
func TestAPauseNeedsRoom(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	id, model := r.mustCreate(), newTruth()
	r.fill(id, 3, 'a', model)
	r.free.Store(256<<20 + 1000) // the reserve, and a little
	_, err := r.agent.Pause(t.Context(), string(id))
	if !sandbox.Is(err, sandbox.KindNoSpace) {
		t.Errorf("pause on a full disk: %v", err)
	}
	r.free.Store(100 << 30)
	r.settles(id, nil)
	r.goesOn(id, model)
}

// TestTenRestartsLeaveItPaused, and the point intact.
func TestTenRestartsLeaveItPaused(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	id, model := r.mustCreate(), newTruth()
	r.fill(id, 3, 'a', model)
	r.mustPause(id)
	for range 10 {
		r.restart()
		if s := r.status(id); s.State != "paused" {
			t.Fatalf("after a restart it is %s", s.State)
		}
	}
	r.goesOn(id, model)
}

// TestForksShareThePast: copies have what their source had, and what each does
// afterwards is its own.
func TestForksShareThePast(t *testing.T) {
	for _, from := range []string{"running", "paused"} {
		t.Run(from, func(t *testing.T) {
			r := newSnapshotRig(t)
			r.open()
			id, model := r.mustCreate(), newTruth()
			r.fill(id, 3, 'a', model)
			if from == "paused" {
				r.mustPause(id)
			}
			requests := []host.CreateRequest{r.request(), r.request(), r.request()}
			requests[1].Hostname = "a/b"
			copies, _, err := r.agent.Fork(t.Context(), string(id), requests)
			if err != nil {
				t.Fatal(err)
			}
			if copies[1].Err == nil || copies[0].Err != nil || copies[2].Err != nil {
				t.Fatalf("copies: %+v", copies)
			}
			if s := r.status(id); s.State != from {
				t.Errorf("the source is %s", s.State)
			}
			one, two := requests[0].ID, requests[2].ID
			if r.origins[one] != string(id) || r.origins[two] != string(id) {
				t.Errorf("they were %q and %q", r.origins[one], r.origins[two])
			}
			first, second := model.copy(), model.copy()
			r.fill(one, 3, 'b', first)
			r.fill(two, 4, 0, second)
			for range 2 {
				r.holds(one, first)
				r.holds(two, second)
				r.mustPause(one)
				r.mustResume(one)
			}
			r.goesOn(id, model)
		})
	}
}

// TestSnapshots: a named one outlives its source, its shape is locked, and its
// name is nobody else's.
func TestSnapshots(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	id, model := r.mustCreate(), newTruth()
	r.fill(id, 3, 'a', model)
	if _, _, err := r.agent.Snapshot(t.Context(), string(id), "kept", map[string]string{"a": "b"}); err != nil {
		t.Fatal(err)
	}
	then := model.copy()
	r.fill(id, 3, 'b', model)
	r.goesOn(id, model)
	for name, kind := range map[string]sandbox.Kind{
		"kept": sandbox.KindExists, "base": sandbox.KindExists, "../x": sandbox.KindInvalid, "dormouse.warm.x": sandbox.KindInvalid,
	} {
		if _, _, err := r.agent.Snapshot(t.Context(), string(id), name, nil); !sandbox.Is(err, kind) {
			t.Errorf("a snapshot called %s: %v, want the kind %s", name, err, kind)
		}
	}
	if _, err := r.agent.Destroy(t.Context(), string(id), ""); err != nil {
		t.Fatal(err)
	}
	r.restart()
	req := r.request()
	req.Spec.Template = "kept"
	req.Spec.VCPUs = 2
	if _, err := r.agent.Create(t.Context(), req); !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), "vcpus is 2, snapshot kept has 1") {
		t.Errorf("another shape: %v", err)
	}
	req.Spec.VCPUs = 1
	if _, err := r.agent.Create(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	r.holds(req.ID, then)
	if err := r.agent.DeleteSnapshot(t.Context(), "kept"); !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), string(req.ID)) {
		t.Errorf("delete what is in use: %v", err)
	}
	list, err := r.agent.Snapshots()
	if err != nil || len(list) != 1 || list[0].Name != "kept" || list[0].Point.MemoryBytes == 0 || list[0].Labels["a"] != "b" {
		t.Errorf("list: %+v, %v", list, err)
	}
	if _, err := r.agent.Destroy(t.Context(), string(req.ID), ""); err != nil {
		t.Fatal(err)
	}
	if err := r.agent.DeleteSnapshot(t.Context(), "kept"); err != nil {
		t.Error(err)
	}
}

// TestAStartLeavesPausedOnesAlone: of those of which nothing is left but the point,
// it removes nothing once more, and notes nothing once more.
func TestAStartLeavesPausedOnesAlone(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	id := r.mustCreate()
	entry := filepath.Join(r.dir, "host/journal", string(id)+".json")
	for _, left := range []struct {
		by string
		do func()
	}{
		{"a pause", func() { r.mustPause(id) }},
		{"a resume that failed", func() {
			defer fault.Set("host/restore/vm", fault.Nth(1, fault.Fail))()
			if _, err := r.resume(id); err == nil {
				t.Error("it was resumed, against all odds")
			}
		}},
	} {
		left.do()
		before, err := os.Stat(entry)
		if err != nil {
			t.Fatal(err)
		}
		passed := pointsOf(func() { r.restart() })
		for _, point := range passed {
			if strings.HasPrefix(point, "host/destroy/") || strings.HasPrefix(point, "host/pause/") {
				t.Errorf("a start after %s passes %s", left.by, point)
			}
		}
		if after, err := os.Stat(entry); err != nil || !os.SameFile(before, after) {
			t.Errorf("a start after %s has written its entry once more (%v)", left.by, err)
		}
	}
	r.mustResume(id)
}

// TestLongLinesAreFlattened: the layers of a line stay few, and the bytes what
// they are; also while it runs, and when a flatten fails.
func TestLongLinesAreFlattened(t *testing.T) {
	r := newSnapshotRig(t)
	with := r.agentCfg
	r.agentCfg = func(c *host.Config) { with(c); c.MaxLayers = 3 }
	r.open()
	id, model := r.mustCreate(), newTruth()
	defer fault.Set("host/flatten/image", fault.Nth(1, fault.Fail))()
	for generation := range int64(9) {
		r.fill(id, 2+generation, byte('a'+generation), model)
		r.fill(id, 2+generation/2, 0, model)
		if generation%3 == 0 {
			if _, _, err := r.agent.Snapshot(t.Context(), string(id), fmt.Sprint("s", generation), nil); err != nil {
				t.Fatal(err)
			}
		}
		r.mustPause(id)
		if generation > 3 {
			testkit.Eventually(t, 20*time.Second, "few layers", func() bool {
				point := r.status(id).Point
				m, err := r.store.Manifest(point.Memory)
				d, err2 := r.store.Manifest(point.Disk)
				return err == nil && err2 == nil && len(m.Layers) <= 3 && len(d.Layers) <= 3
			})
		}
		r.mustResume(id)
		r.holds(id, model)
	}
	r.restart()
	r.goesOn(id, model)
}

// TestAPauseLooksAtItsOwnLine alone, however many others there are.
func TestAPauseLooksAtItsOwnLine(t *testing.T) {
	r := newSnapshotRig(t)
	with := r.agentCfg
	var log bytes.Buffer
	r.agentCfg = func(c *host.Config) {
		with(c)
		c.RetryEvery, c.Log = time.Hour, slog.New(slog.NewTextHandler(&log, nil))
	}
	r.open()
	other, id := r.mustCreate(), r.mustCreate()
	r.mustPause(other)
	r.agent.FlattenLong()
	manifest := r.store.ManifestPath(r.status(other).Point.Memory)
	whole, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(manifest, 100); err != nil {
		t.Fatal(err)
	}
	r.mustPause(id)
	r.agent.FlattenLong()
	if err := os.WriteFile(manifest, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.agent.Close(); err != nil {
		t.Fatal(err)
	}
	r.agent = nil
	if said := "not flattened"; strings.Contains(log.String(), said) {
		t.Errorf("the line of another one was read:\n%s", log.String())
	}
}
