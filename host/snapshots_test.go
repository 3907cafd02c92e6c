package host_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
)

func snapshotPoints(t *testing.T) []string {
	r := newSnapshotRig(t)
	r.open()
	id, model := r.mustCreate(), newTruth()
	r.fill(id, 3, 'a', model)
	points := pointsOf(func() {
		if _, _, err := r.agent.Snapshot(t.Context(), string(id), "kept", nil); err != nil {
			t.Fatal(err)
		}
	})
	if len(points) < 20 {
		t.Fatalf("a snapshot passes only %v", points)
	}
	return points
}

// TestSnapshotFailsAt fails every step of a snapshot: the sandbox runs on, and
// there is a whole snapshot of that name, or none.
func TestSnapshotFailsAt(t *testing.T) {
	for _, point := range snapshotPoints(t) {
		t.Run(point, func(t *testing.T) {
			r := newSnapshotRig(t)
			r.open()
			id, model := r.mustCreate(), newTruth()
			r.fill(id, 3, 'a', model)
			defer fault.Set(point, fault.Nth(1, fault.Fail))()
			_, _, err := r.agent.Snapshot(t.Context(), string(id), "kept", nil)
			fault.Set(point, nil)
			if err != nil && !errors.Is(err, fault.ErrInjected) {
				t.Errorf("%v, want the injected fault", err)
			}
			r.wholeOrNone("kept", model)
			r.settles(id, nil)
			r.goesOn(id, model)
		})
	}
}

// TestSnapshotKilledAt kills the agent at every step of a snapshot.
func TestSnapshotKilledAt(t *testing.T) {
	for _, point := range snapshotPoints(t) {
		t.Run(point, func(t *testing.T) {
			r := newSnapshotRig(t)
			r.open()
			id, model := r.mustCreate(), newTruth()
			r.fill(id, 3, 'a', model)
			r.killAt(point, func(dying *host.Agent) {
				_, _, _ = dying.Snapshot(context.Background(), string(id), "kept", nil) // it died
			})
			r.wholeOrNone("kept", model)
			r.settles(id, nil)
			r.goesOn(id, model)
		})
	}
}

// TestDeleteSnapshotFailsAtAndKilledAt: the snapshot is whole or gone, and asking
// again is enough.
func TestDeleteSnapshotFailsAtAndKilledAt(t *testing.T) {
	kept := func(t *testing.T) (*snapshotRig, truth) {
		t.Helper()
		r := newSnapshotRig(t)
		r.open()
		id, model := r.mustCreate(), newTruth()
		r.fill(id, 3, 'a', model)
		if _, _, err := r.agent.Snapshot(t.Context(), string(id), "kept", nil); err != nil {
			t.Fatal(err)
		}
		return r, model
	}
	observed, _ := kept(t)
	points := pointsOf(func() {
		if err := observed.agent.DeleteSnapshot(t.Context(), "kept"); err != nil {
			t.Fatal(err)
		}
	})
	points = slices.DeleteFunc(points, func(p string) bool { return strings.Contains(p, "snapshot-collect") }) // in the background
	if !slices.Contains(points, "host/snapshot/delete") || !slices.Contains(points, "osfs/snapshot-ref/remove") {
		t.Fatalf("a delete passes only %v", points)
	}
	gone := func(r *snapshotRig, model truth) {
		r.t.Helper()
		r.wholeOrNone("kept", model)
		if err := r.agent.DeleteSnapshot(r.t.Context(), "kept"); err != nil {
			r.t.Error(err)
		}
		if list, err := r.agent.Snapshots(); err != nil || len(list) > 0 {
			r.t.Errorf("left are %+v, %v", list, err)
		}
	}
	for _, point := range points {
		t.Run(point, func(t *testing.T) {
			r, model := kept(t)
			defer fault.Set(point, fault.Nth(1, fault.Fail))()
			err := r.agent.DeleteSnapshot(t.Context(), "kept")
			fault.Set(point, nil)
			if !errors.Is(err, fault.ErrInjected) {
				t.Errorf("%v, want the injected fault", err)
			}
			gone(r, model)
		})
		t.Run("killed at "+point, func(t *testing.T) {
			r, model := kept(t)
			r.killAt(point, func(dying *host.Agent) {
				_ = dying.DeleteSnapshot(context.Background(), "kept") // it died
			})
			gone(r, model)
		})
	}
}

// wholeOrNone makes a sandbox from a snapshot, if there is one.
func (r *snapshotRig) wholeOrNone(name string, model truth) {
	r.t.Helper()
	list, err := r.agent.Snapshots()
	if err != nil {
		r.t.Error(err)
	}
	if len(list) == 0 {
		return
	}
	report, err := r.agent.VerifySnapshot(r.t.Context(), name)
	if err != nil || len(report.Damage) > 0 {
		r.t.Errorf("verify: %+v, %v", report, err)
	}
	req := r.request()
	req.Spec.Template = name
	if _, err := r.agent.Create(r.t.Context(), req); err != nil {
		r.t.Fatal(err)
	}
	r.holds(req.ID, model)
	if _, err := r.agent.Destroy(r.t.Context(), string(req.ID), ""); err != nil {
		r.t.Error(err)
	}
}

// TestForkKilledAt kills the agent at every step of a fork: its source runs on,
// and each copy runs whole or has ended.
func TestForkKilledAt(t *testing.T) {
	for _, point := range forkPoints(t) {
		t.Run(point, func(t *testing.T) {
			r := newSnapshotRig(t)
			r.open()
			id, model := r.mustCreate(), newTruth()
			r.fill(id, 3, 'a', model)
			req := r.request()
			r.killAt(point, func(dying *host.Agent) {
				_, _, _ = dying.Fork(context.Background(), string(id), []host.CreateRequest{req}) // it died
			})
			r.settles(id, nil)
			switch s := r.status(req.ID); s.State {
			case "running":
				r.holds(req.ID, model)
				if _, err := r.agent.Destroy(t.Context(), string(req.ID), ""); err != nil {
					t.Error(err)
				}
			case "", "ended":
			default:
				t.Errorf("the copy is %s", s.State)
			}
			r.goesOn(id, model)
		})
	}
}

func forkPoints(t *testing.T) []string {
	r := newSnapshotRig(t)
	r.open()
	id := r.mustCreate()
	return pointsOf(func() {
		copies, _, err := r.agent.Fork(t.Context(), string(id), []host.CreateRequest{r.request()})
		if err != nil || copies[0].Err != nil {
			t.Fatal(copies, err)
		}
	})
}

// TestRandomLives does anything to a few sandboxes at the same time, restarts
// included, and compares what each holds with what it should. The seed is
// printed; DORMOUSE_SEED repeats it.
func TestRandomLives(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("DORMOUSE_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("DORMOUSE_SEED=%d", seed)
	r := newSnapshotRig(t)
	r.open()
	lives := make([]*life, 3)
	for i := range lives {
		lives[i] = &life{r: r, random: rand.New(rand.NewPCG(seed, uint64(i)))}
	}
	for range 4 {
		var wg sync.WaitGroup
		for _, l := range lives {
			wg.Go(func() {
				for range 8 {
					l.step()
				}
			})
		}
		wg.Wait()
		r.restart()
		for _, l := range lives {
			l.check()
		}
	}
}

// life is one sandbox, and what it should hold.
type life struct {
	r      *snapshotRig
	random *rand.Rand
	id     sandbox.ID
	model  truth
	count  int
}

func (l *life) step() {
	r := l.r
	if l.id == "" {
		req := r.request()
		if _, err := r.agent.Create(testContext, req); err != nil {
			r.t.Errorf("create: %v", err)
			return
		}
		l.id, l.model = req.ID, newTruth()
		return
	}
	switch state := r.status(l.id).State; l.random.IntN(8) {
	case 0, 1:
		if state == "running" {
			r.fill(l.id, 2+l.random.Int64N(20), byte(l.random.IntN(3)), l.model)
		}
	case 2:
		l.together("pause", func() error { _, err := r.agent.Pause(testContext, string(l.id)); return err })
	case 3:
		l.together("resume", func() error { _, err := r.resume(l.id); return err })
	case 4:
		l.count++
		name := fmt.Sprintf("s%s-%d", l.id[:8], l.count)
		if _, _, err := r.agent.Snapshot(testContext, string(l.id), name, nil); err != nil {
			r.t.Errorf("snapshot: %v", err)
			return
		}
		if err := r.agent.DeleteSnapshot(testContext, name); err != nil {
			r.t.Errorf("delete the snapshot: %v", err)
		}
	case 5: // it lives on in a copy
		req := r.request()
		copies, _, err := r.agent.Fork(testContext, string(l.id), []host.CreateRequest{req})
		if err != nil || copies[0].Err != nil {
			r.t.Errorf("fork: %v, %+v", err, copies)
			return
		}
		l.destroy()
		l.id = req.ID
	case 6:
		l.check()
	case 7:
		if l.random.IntN(4) == 0 {
			l.destroy()
			l.id = ""
		}
	}
}

// together does a thing twice at the same time: neither may break the other.
func (l *life) together(what string, do func() error) {
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if err := do(); err != nil {
				l.r.t.Errorf("%s: %v", what, err)
			}
		})
	}
	wg.Wait()
}

func (l *life) destroy() {
	if _, err := l.r.agent.Destroy(testContext, string(l.id), ""); err != nil {
		l.r.t.Errorf("destroy: %v", err)
	}
}

func (l *life) check() {
	if l.id == "" {
		return
	}
	if l.r.status(l.id).State == "paused" {
		if _, err := l.r.resume(l.id); err != nil {
			l.r.t.Errorf("resume: %v", err)
			return
		}
	}
	l.r.holds(l.id, l.model)
}

// TestRaces: whatever comes at the same time as a pause, the sandbox ends up
// whole: destroyed, paused or running.
func TestRaces(t *testing.T) {
	for name, other := range map[string]func(r *snapshotRig, id sandbox.ID) error{
		"destroy": func(r *snapshotRig, id sandbox.ID) error {
			_, err := r.agent.Destroy(testContext, string(id), "")
			return err
		},
		"pause": func(r *snapshotRig, id sandbox.ID) error {
			_, err := r.agent.Pause(testContext, string(id))
			return err
		},
		"fork": func(r *snapshotRig, id sandbox.ID) error {
			_, _, err := r.agent.Fork(testContext, string(id), []host.CreateRequest{r.request()})
			return err
		},
		"ping": func(r *snapshotRig, id sandbox.ID) error {
			_, err := r.agent.Ping(testContext, string(id))
			return err
		},
		"crash": func(r *snapshotRig, id sandbox.ID) error { return r.vms.Crash(id) },
		"resume": func(r *snapshotRig, id sandbox.ID) error {
			_, err := r.resume(id)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newSnapshotRig(t)
			r.open()
			for range 3 {
				id, model := r.mustCreate(), newTruth()
				r.fill(id, 3, 'a', model)
				var wg sync.WaitGroup
				wg.Go(func() { _, _ = r.agent.Pause(testContext, string(id)) }) // whichever comes first
				wg.Go(func() { _ = other(r, id) })
				wg.Wait()
				testkit.Eventually(t, 20*time.Second, "settled", func() bool {
					return slices.Contains([]string{"running", "paused", "ended"}, r.status(id).State)
				})
				if r.status(id).State != "ended" && name != "crash" {
					testkit.Eventually(t, 20*time.Second, "its processes run, or it is paused", func() bool { return r.status(id).State == "paused" || !r.stands(id) })
					r.goesOn(id, model)
				}
				if _, err := r.agent.Destroy(t.Context(), string(id), ""); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestTheLastPointOutlivesItsVM: a sandbox that was paused once and whose VM dies
// later has failed, and its point is a snapshot with its ID for a name; also when
// it cannot be named at once, and when the agent dies in between.
func TestTheLastPointOutlivesItsVM(t *testing.T) {
	for name, trouble := range map[string]func(r *snapshotRig, id sandbox.ID){
		"": func(r *snapshotRig, id sandbox.ID) { _ = r.vms.Crash(id) },
		"not named at once": func(r *snapshotRig, id sandbox.ID) {
			fault.Set("host/snapshot/rescue", fault.Nth(1, fault.Fail))
			_ = r.vms.Crash(id)
		},
		"with nobody to see":  func(r *snapshotRig, id sandbox.ID) { r.kill(); _ = r.vms.Crash(id); r.open() },
		"with the whole host": func(r *snapshotRig, _ sandbox.ID) { r.kill(); r.vms.Reboot("another"); r.bootID = "another"; r.open() },
	} {
		t.Run(name, func(t *testing.T) {
			r := newSnapshotRig(t)
			r.open()
			defer func() { fault.Set("host/snapshot/rescue", nil) }()
			id, other, model := r.mustCreate(), r.mustCreate(), newTruth()
			r.fill(id, 3, 'a', model)
			r.mustPause(id)
			r.mustResume(id)
			then := model.copy()
			r.fill(id, 3, 'b', model)
			trouble(r, id)
			testkit.Eventually(t, 20*time.Second, "it has failed", func() bool { s := r.status(id); return s.State == "ended" && s.Cause != sandbox.CauseUser })
			list, err := r.agent.Snapshots()
			if err != nil || len(list) != 1 || list[0].Name != string(id) || list[0].Labels["rescued"] == "" {
				t.Fatalf("snapshots: %+v, %v; the other one is %s", list, err, r.status(other).State)
			}
			req := r.request()
			req.Spec.Template = string(id)
			if _, err := r.agent.Create(t.Context(), req); err != nil {
				t.Fatal(err)
			}
			r.holds(req.ID, then)
		})
	}
}

// TestSnapshotsKnowWhatTheyDescendFrom: the pauses between two snapshots are gone,
// and the second still says which the first was, and so does the tree.
func TestSnapshotsKnowWhatTheyDescendFrom(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	id, model := r.mustCreate(), newTruth()
	take := func(name string) host.SnapshotInfo {
		t.Helper()
		r.fill(id, 2, name[0], model)
		info, _, err := r.agent.Snapshot(t.Context(), string(id), name, nil)
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	pauses := func(n int) {
		for i := range n {
			r.fill(id, 2, byte('0'+i), model)
			r.mustPause(id)
			r.mustResume(id)
		}
		r.agent.Collect()
	}
	if first := take("first"); first.Parent != "" {
		t.Errorf("the first one descends from %q", first.Parent)
	}
	pauses(3)
	second := take("second")
	if second.Parent != "first" {
		t.Errorf("the second one descends from %q", second.Parent)
	}
	pauses(2)
	tree, err := r.agent.SnapshotTree("second")
	if err != nil {
		t.Fatal(err)
	}
	parents, names := map[snapshot.Digest]snapshot.Digest{}, map[string]snapshot.Digest{}
	for _, n := range tree {
		if _, known := parents[n.Parent]; !n.Parent.IsZero() && !known {
			t.Errorf("%s %s comes before its parent", n.Kind, n.Name)
		}
		parents[n.Digest], names[n.Name] = n.Parent, n.Digest
	}
	if len(names) < 2 || parents[names["second"]] != names["first"] {
		t.Errorf("the tree is %+v", tree)
	}
	if err := r.agent.DeleteSnapshot(t.Context(), "first"); err != nil {
		t.Fatal(err)
	}
	list, err := r.agent.Snapshots()
	if err != nil || len(list) != 1 || list[0].Parent != "" {
		t.Errorf("%+v, %v", list, err)
	}
}

// TestFirstCreateKilledAt kills the agent at every step of a create that boots and
// keeps what it has booted.
func TestFirstCreateKilledAt(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	for _, point := range pointsOf(func() { r.mustCreate() }) {
		t.Run(point, func(t *testing.T) {
			r := newSnapshotRig(t)
			r.open()
			req := r.request()
			r.killAt(point, func(dying *host.Agent) {
				_, _ = dying.Create(context.Background(), req) // it died
			})
			if s := r.status(req.ID); s.ID != "" && s.State != "running" {
				if s.State != "ended" || s.Cause != sandbox.CauseAgentCrash {
					t.Errorf("after the restart: %s (%s)", s.State, s.Cause)
				}
				if left := r.leftovers(); len(left) > 0 {
					t.Errorf("left on the host: %v", left)
				}
			}
			r.mustCreate()
			r.mustCreate()
		})
	}
}
