package chaos_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

func kill(point string) string { return "DORMOUSE_FAULT=" + point + "=kill" }

// TestKillDuringCreate kills the server at each step of a create. Started again
// it has a failed sandbox with a cause and nothing of it on the machine, or, if
// the VM was in the journal as running already, a sandbox that works.
func TestKillDuringCreate(t *testing.T) {
	every := passed(t).create
	chosen := choose(t, every)
	s := rig.Start(t, rig.Options{})
	warm(t, s)
	s.Kill()
	s.With(kill(chosen[0]))
	s.Up()
	for i, point := range chosen {
		ok := t.Run(point, func(t *testing.T) {
			known := all(t, s)
			if sb, err := try(t, s); err == nil {
				t.Fatalf("the create answers with %s, which is %s", sb.ID, sb.State)
			}
			if !isDead(t, s) {
				t.FailNow()
			}
			var next []string
			late := false // a recovery would meet it
			if i+1 < len(chosen) {
				next = []string{kill(chosen[i+1])}
				late = slices.Contains(passed(t).recovery, chosen[i+1])
			}
			s.With()
			if !late {
				s.With(next...)
			}
			s.Up()
			checkKilledCreate(t, s, known, point, every)
			if late {
				s.Kill()
				s.With(next...)
				s.Up()
			}
		})
		if !ok {
			t.FailNow() // the rest needs a server that is up
		}
	}
	id := create(t, s)
	if got := sh(t, s, id, "echo works"); got != "works" {
		t.Errorf("after it all a sandbox answers %q", got)
	}
}

// checkKilledCreate looks at what became of the one sandbox that is not known.
func checkKilledCreate(t *testing.T, s *rig.Server, known map[string]api.Sandbox, point string, every []string) {
	t.Helper()
	at := slices.Index(every, point)
	var id string
	for other := range all(t, s) {
		if _, ok := known[other]; !ok {
			id = other
		}
	}
	if id == "" {
		if at >= slices.Index(every, "control/create/recorded") {
			t.Error("the API knows nothing of a create that was on record")
		}
		onlyThese(t, s)
		return
	}
	sb := settled(t, s, id)
	t.Logf("%s: %s", sb.State, sb.Cause)
	wantRunning := at >= slices.Index(every, "osfs/create-done/fsync-dir")
	switch {
	case wantRunning != (sb.State == "running"):
		t.Errorf("it is %s (%s: %s), want running: %v", sb.State, sb.Cause, sb.CauseDetail, wantRunning)
	case wantRunning:
		onlyThese(t, s, id)
		if got := sh(t, s, id, "echo alive"); got != "alive" {
			t.Errorf("it answers %q", got)
		}
		if sb.Deadline == nil || time.Until(*sb.Deadline) < 50*time.Minute {
			t.Errorf("its deadline is %v", sb.Deadline)
		}
		if _, err := s.Client.Delete(t.Context(), id); err != nil {
			t.Error(err)
		}
	default:
		wantEnd(t, sb, "failed", "agent_crash")
	}
	onlyThese(t, s)
}

// TestKillDuringDestroy kills the server at each step of a destroy. Started
// again it goes on to the end by itself, unless nothing was on record yet: then
// the sandbox runs on and can be destroyed.
func TestKillDuringDestroy(t *testing.T) {
	every := passed(t).destroy
	s := rig.New(t, rig.Options{})
	s.Up()
	for _, point := range choose(t, every) {
		ok := t.Run(point, func(t *testing.T) {
			id := create(t, s)
			s.Kill()
			s.With(kill(point))
			s.Up()
			if sb, err := remove(t, s, id); err == nil {
				t.Fatalf("the destroy answers that it is %s", sb.State)
			}
			if !isDead(t, s) {
				t.FailNow()
			}
			s.With()
			s.Up()
			if slices.Index(every, point) == 0 {
				if got := sh(t, s, id, "echo alive"); got != "alive" {
					t.Errorf("it answers %q", got)
				}
				if _, err := remove(t, s, id); err != nil {
					t.Error(err)
				}
			}
			wantEnd(t, ended(t, s, id), "gone", "user")
			onlyThese(t, s)
		})
		if !ok {
			t.FailNow()
		}
	}
}

func remove(t testing.TB, s *rig.Server, id string) (api.Sandbox, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), settleLimit)
	defer cancel()
	return s.Client.Delete(ctx, id)
}

// failOnce arms points so that each fails when it is first passed.
func failOnce(points []string) string {
	return "DORMOUSE_FAULT=" + strings.Join(points, "=error@1,") + "=error@1"
}

// TestEachStepOfCreateFails breaks every step once but those for which a boot
// steps in: creates fail until one goes through, each at steps that have not failed
// yet. What a roll-back passes too may have failed in the one of another step, which
// was then repeated.
func TestEachStepOfCreateFails(t *testing.T) {
	every := passed(t).create
	left := slices.DeleteFunc(slices.Clone(choose(t, every)), func(p string) bool { return slices.Contains(passed(t).restore, p) })
	s := rig.Start(t, rig.Options{})
	warm(t, s)
	s.Kill()
	trace := s.Data + "/points"
	s.With(failOnce(left), "DORMOUSE_FAULT_SEEN="+trace)
	s.Up()
	recorded := slices.Index(every, "control/create/recorded")
	var id string
	for range len(left) + 1 {
		sb, err := try(t, s)
		if err == nil {
			id = sb.ID
			break
		}
		said := err.Error()
		if failed := failedID(err); failed != "" {
			ended := get(t, s, failed)
			wantEnd(t, ended, "failed", "create_failed")
			said = ended.CauseDetail
		} else if len(left) > 0 && slices.Index(every, left[0]) < recorded { // then nobody is told which it was
			said = left[0] + failing
		}
		before := len(left)
		left = slices.DeleteFunc(left, func(p string) bool { return strings.Contains(said, p+failing) })
		if len(left) == before {
			t.Errorf("a create says %q, want a step that has not failed yet, the first of %q", said, left)
		}
		onlyThese(t, s)
	}
	for _, point := range left {
		if n := count(points(t, trace), point); n < 2 {
			t.Errorf("no create failed at %s, and it was passed %d times", point, n)
		}
	}
	if id == "" {
		t.Fatal("no create goes through, after as many as there are steps")
	}
	if got := sh(t, s, id, "echo works"); got != "works" {
		t.Errorf("afterwards a sandbox answers %q", got)
	}
}

// failing is what an error says after the name of the step that failed.
const failing = ": injected fault"

// TestAWarmSnapshotThatDoesNotWorkIsGivenUp breaks every step of going on from one
// once: the create boots instead, and makes another.
func TestAWarmSnapshotThatDoesNotWorkIsGivenUp(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	warm(t, s)
	for i, point := range append(slices.Clone(passed(t).restore), "") {
		if !testkit.IsLong() && i > 0 && !strings.HasPrefix(point, "host/restore/") && point != "" {
			continue
		}
		s.Kill()
		s.With()
		want := sandbox.StartWarm
		if point != "" {
			s.With(failOnce([]string{point}))
			want = sandbox.StartBoot
		}
		s.Up()
		sb, err := try(t, s)
		if err != nil {
			t.Fatalf("%s: %v", point, err)
		}
		if sb.StartedBy != string(want) {
			t.Errorf("%s: it was started by %s, want %s", point, sb.StartedBy, want)
		}
		if got := sh(t, s, sb.ID, "echo works"); got != "works" {
			t.Errorf("%s: it answers %q", point, got)
		}
		if _, err := remove(t, s, sb.ID); err != nil {
			t.Error(err)
		}
		onlyThese(t, s)
	}
}

// TestEachStepOfDestroyFails breaks every step of one sandbox's destroy once.
// The server repeats what failed until nothing is left.
func TestEachStepOfDestroyFails(t *testing.T) {
	every := passed(t).destroy
	s := rig.New(t, rig.Options{})
	s.Up()
	id := create(t, s)
	s.Kill() // a create passes some of them too
	trace := s.Data + "/points"
	s.With(failOnce(every), "DORMOUSE_FAULT_SEEN="+trace)
	s.Up()
	if sb, err := remove(t, s, id); err == nil && sb.State == "gone" {
		t.Error("the destroy has met none of its failures")
	}
	// Whoever asked asks again, as a client does; nothing else is done for it.
	testkit.Poll(settleLimit, func() bool {
		sb, err := remove(t, s, id)
		return err == nil && sb.State == "gone"
	})
	wantEnd(t, ended(t, s, id), "gone", "user")
	onlyThese(t, s)
	var missing []string
	testkit.Poll(settleLimit, func() bool {
		missing = slices.DeleteFunc(slices.Clone(every), func(point string) bool {
			// What comes when the host has done its part, the reconciler does without it; and
			// what was done before it failed is not done again.
			return point == "control/destroy/destroyed" || point == "control/destroy/recorded" || strings.HasSuffix(point, "/done") ||
				count(points(t, trace), point) >= 2
		})
		return len(missing) == 0
	})
	if len(missing) > 0 {
		t.Errorf("%q failed and were not repeated", missing)
	}
}

func count(list []string, item string) int {
	n := 0
	for _, s := range list {
		if s == item {
			n++
		}
	}
	return n
}
