package reconcile_test

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/control/reconcile"
	"github.com/dormouse-sandbox/dormouse/control/store"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

var at = time.Unix(1_800_000_000, 0).UTC()

func on(state hostv1.State, cause sandbox.Cause) *hostv1.SandboxStatus {
	s := &hostv1.SandboxStatus{State: state, Cause: string(cause), Spec: &hostv1.SandboxSpec{Deadline: timestamppb.New(at)}}
	if state == hostv1.State_STATE_ENDED {
		s.EndedAt = timestamppb.New(at)
	}
	return s
}

func TestDecide(t *testing.T) {
	const (
		creating   = hostv1.State_STATE_CREATING
		running    = hostv1.State_STATE_RUNNING
		destroying = hostv1.State_STATE_DESTROYING
		ended      = hostv1.State_STATE_ENDED
		pausing    = hostv1.State_STATE_PAUSING
		paused     = hostv1.State_STATE_PAUSED
		resuming   = hostv1.State_STATE_RESUMING
	)
	young := reconcile.Facts{Age: time.Second, CreateLong: time.Minute, AbsentLong: time.Second}
	owned, old, lost, odd := young, young, young, young
	owned.Owned, old.Age, lost.Absent = true, time.Hour, time.Hour
	young.OddLong, odd.OddLong, odd.Odd = time.Second, time.Second, time.Hour
	for _, tt := range []struct {
		name  string
		state sandbox.State
		cause sandbox.Cause
		host  *hostv1.SandboxStatus
		facts reconcile.Facts
		do    reconcile.Do
		why   sandbox.Cause
	}{
		{"a create under way is left alone", sandbox.Creating, "", nil, owned, reconcile.Nothing, ""},
		{"even when it has ended on the host", sandbox.Creating, "", on(ended, sandbox.CauseVMMCrash), owned, reconcile.Nothing, ""},
		{"a create that nobody owns and the host never saw", sandbox.Creating, "", nil, young, reconcile.End, sandbox.CauseAgentCrash},
		{"one that the host finished is kept", sandbox.Creating, "", on(running, ""), young, reconcile.MakeRunning, ""},
		{"one that the host works on gets time", sandbox.Creating, "", on(creating, ""), young, reconcile.Nothing, ""},
		{"but not for ever", sandbox.Creating, "", on(creating, ""), old, reconcile.Destroy, sandbox.CauseCreateFailed},
		{"one that failed on the host", sandbox.Creating, "", on(ended, sandbox.CauseBootTimeout), young, reconcile.End, sandbox.CauseBootTimeout},
		{"what runs runs", sandbox.Running, "", on(running, ""), young, reconcile.Nothing, ""},
		{"what crashed", sandbox.Running, "", on(ended, sandbox.CauseVMMCrash), young, reconcile.End, sandbox.CauseVMMCrash},
		{"what its deadline ended", sandbox.Running, "", on(ended, sandbox.CauseTTL), young, reconcile.End, sandbox.CauseTTL},
		{"what a reboot ended", sandbox.Running, "", on(ended, sandbox.CauseHostReboot), young, reconcile.End, sandbox.CauseHostReboot},
		{"a cause from another world", sandbox.Running, "", on(ended, "gremlins"), young, reconcile.End, sandbox.CauseVMMCrash},
		{"what the host is removing will end", sandbox.Running, "", on(destroying, ""), young, reconcile.Nothing, ""},
		{"absent for a moment", sandbox.Running, "", nil, young, reconcile.Nothing, ""},
		{"absent for good", sandbox.Running, "", nil, lost, reconcile.End, sandbox.CauseHostLost},
		{"a paused one is expected to be absent", sandbox.Paused, "", nil, lost, reconcile.Nothing, ""},
		{"a paused one that its host names", sandbox.Paused, "", on(paused, ""), young, reconcile.Nothing, ""},
		{"a paused one that runs", sandbox.Paused, "", on(running, ""), young, reconcile.MakeRunning, ""},
		{"a paused one that is lost for good is told so when it is resumed", sandbox.Paused, "", nil, old, reconcile.Nothing, ""},
		{"a paused one that ended", sandbox.Paused, "", on(ended, sandbox.CauseDiskFailed), young, reconcile.End, sandbox.CauseDiskFailed},
		{"one that its host is pausing by itself", sandbox.Running, "", on(pausing, ""), young, reconcile.Nothing, ""},
		{"one that its host has paused by itself", sandbox.Running, "", on(paused, ""), young, reconcile.MakePaused, ""},
		{"one that was created, and paused for being idle", sandbox.Creating, "", on(paused, ""), young, reconcile.MakePaused, ""},
		{"a pause under way is left alone", sandbox.Pausing, "", on(paused, ""), owned, reconcile.Nothing, ""},
		{"even when the host shows nothing of it", sandbox.Pausing, "", on(running, ""), owned, reconcile.Nothing, ""},
		{"a pause that nobody owns and the host works on", sandbox.Pausing, "", on(pausing, ""), odd, reconcile.Nothing, ""},
		{"one that the host has done", sandbox.Pausing, "", on(paused, ""), young, reconcile.MakePaused, ""},
		{"one of which the host shows nothing yet", sandbox.Pausing, "", on(running, ""), young, reconcile.Nothing, ""},
		{"one that came to nothing", sandbox.Pausing, "", on(running, ""), odd, reconcile.MakeRunning, ""},
		{"one that ended the VM", sandbox.Pausing, "", on(ended, sandbox.CauseVMMCrash), young, reconcile.End, sandbox.CauseVMMCrash},
		{"one that lost the VM", sandbox.Pausing, "", nil, lost, reconcile.End, sandbox.CauseHostLost},
		{"a resume under way is left alone", sandbox.Resuming, "", on(running, ""), owned, reconcile.Nothing, ""},
		{"a resume that nobody owns and the host works on", sandbox.Resuming, "", on(resuming, ""), odd, reconcile.Nothing, ""},
		{"one that the host has done, too", sandbox.Resuming, "", on(running, ""), young, reconcile.MakeRunning, ""},
		{"one of which the host shows nothing yet, too", sandbox.Resuming, "", on(paused, ""), young, reconcile.Nothing, ""},
		{"one that came to nothing, too", sandbox.Resuming, "", on(paused, ""), odd, reconcile.StillPaused, ""},
		{"a resume of what its host does not have, for a moment", sandbox.Resuming, "", nil, young, reconcile.Nothing, ""},
		{"and for good: it may come back", sandbox.Resuming, "", nil, lost, reconcile.StillPaused, ""},
		{"one that ended the VM, too", sandbox.Resuming, "", on(ended, sandbox.CausePagerFault), young, reconcile.End, sandbox.CausePagerFault},
		{"an unreachable one is back, and paused", sandbox.Unreachable, "", on(paused, ""), young, reconcile.MakePaused, ""},
		{"an unreachable one is back, and being paused", sandbox.Unreachable, "", on(pausing, ""), young, reconcile.Nothing, ""},
		{"a destroy of a paused one is repeated", sandbox.Destroying, sandbox.CauseUser, on(paused, ""), young, reconcile.Destroy, sandbox.CauseUser},
		{"what has ended stays so, paused or not", sandbox.Gone, sandbox.CauseUser, on(paused, ""), lost, reconcile.Nothing, ""},
		{"an unreachable one is back", sandbox.Unreachable, "", on(running, ""), young, reconcile.MakeRunning, ""},
		{"an unreachable one ended meanwhile", sandbox.Unreachable, "", on(ended, sandbox.CauseTTL), young, reconcile.End, sandbox.CauseTTL},
		{"a destroy is repeated", sandbox.Destroying, sandbox.CauseUser, on(running, ""), young, reconcile.Destroy, sandbox.CauseUser},
		{"a destroy that is done", sandbox.Destroying, sandbox.CauseUser, nil, young, reconcile.End, sandbox.CauseUser},
		{"a destroy that the deadline beat", sandbox.Destroying, sandbox.CauseUser, on(ended, sandbox.CauseTTL), young, reconcile.End, sandbox.CauseTTL},
		{"what has ended stays so", sandbox.Gone, sandbox.CauseUser, on(running, ""), lost, reconcile.Nothing, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			row := store.Sandbox{State: tt.state, Cause: tt.cause, Deadline: at}
			v := reconcile.Decide(row, tt.host, tt.facts)
			if v.Do != tt.do || v.Cause != tt.why {
				t.Errorf("got %v %q, want %v %q", v.Do, v.Cause, tt.do, tt.why)
			}
			if tt.host.GetState() == ended && v.Do == reconcile.End && !v.At.Equal(at) {
				t.Errorf("it ended at %v, want the host's time", v.At)
			}
			if v.Do == reconcile.MakeRunning && tt.state != sandbox.Paused && !tt.state.CanBecome(sandbox.Running) {
				t.Errorf("%s cannot become running", tt.state)
			}
			if v.Do == reconcile.StillPaused && !tt.state.CanBecome(sandbox.Paused) {
				t.Errorf("%s cannot become paused", tt.state)
			}
		})
	}
	moved := reconcile.Decide(store.Sandbox{State: sandbox.Running, Deadline: at.Add(time.Second)}, on(running, ""), young)
	if moved.Do != reconcile.MoveDeadline || !moved.At.Equal(at) {
		t.Errorf("the host's deadline is the truth: %+v", moved)
	}
}

// TestDecideFrozen: the database says what the host says, and only reasons that
// it knows.
func TestDecideFrozen(t *testing.T) {
	for _, tt := range []struct {
		name      string
		state     sandbox.State
		row, host sandbox.Freeze
		do        reconcile.Do
	}{
		{"it was frozen", sandbox.Running, "", sandbox.FreezeNoSpace, reconcile.NoteFrozen},
		{"it goes on", sandbox.Running, sandbox.FreezeNoSpace, "", reconcile.NoteFrozen},
		{"nothing new", sandbox.Running, sandbox.FreezeNoSpace, sandbox.FreezeNoSpace, reconcile.Nothing},
		{"a reason from another world", sandbox.Running, "", "gremlins", reconcile.Nothing},
		{"one that is about to end", sandbox.Destroying, "", sandbox.FreezeNoSpace, reconcile.Destroy},
	} {
		status := on(hostv1.State_STATE_RUNNING, "")
		status.Frozen = string(tt.host)
		v := reconcile.Decide(store.Sandbox{State: tt.state, Frozen: tt.row, Deadline: at}, status, reconcile.Facts{})
		if v.Do != tt.do || v.Do == reconcile.NoteFrozen && v.Frozen != tt.host {
			t.Errorf("%s: %+v", tt.name, v)
		}
	}
}

// TestDecideSaved: the record has the pause point and the failure that the host
// tells of, once.
func TestDecideSaved(t *testing.T) {
	saved := &hostv1.Saved{Generation: 2, MemoryBytes: 1, MemoryDigest: "m", At: timestamppb.New(at), Durability: "local"}
	for _, tt := range []struct {
		name  string
		state sandbox.State
		row   store.Saved
		why   string
		do    reconcile.Do
	}{
		{"a snapshot has moved it on", sandbox.Running, store.Saved{}, "", reconcile.NoteSaved},
		{"nothing new", sandbox.Running, reconcile.SavedOf(saved), "", reconcile.Nothing},
		{"nothing new of a paused one", sandbox.Paused, reconcile.SavedOf(saved), "", reconcile.Nothing},
		{"a paused one was flattened", sandbox.Paused, store.Saved{Generation: 9}, "", reconcile.NoteSaved},
		{"an automatic pause failed", sandbox.Running, reconcile.SavedOf(saved), "no space", reconcile.NoteSaved},
	} {
		host := hostv1.State_STATE_RUNNING
		if tt.state == sandbox.Paused {
			host = hostv1.State_STATE_PAUSED
		}
		status := on(host, "")
		status.Saved, status.AutoPauseError = saved, tt.why
		v := reconcile.Decide(store.Sandbox{State: tt.state, Deadline: at, Saved: tt.row}, status, reconcile.Facts{})
		if v.Do != tt.do || v.Do == reconcile.NoteSaved && (v.Pause.Saved != reconcile.SavedOf(saved) || v.PauseError != tt.why) {
			t.Errorf("%s: %+v", tt.name, v)
		}
	}
	status := on(hostv1.State_STATE_PAUSED, "")
	status.Saved, status.PausedAt, status.PauseReason = saved, timestamppb.New(at.Add(time.Second)), "gremlins"
	v := reconcile.Decide(store.Sandbox{State: sandbox.Running}, status, reconcile.Facts{})
	if v.Pause.Saved != reconcile.SavedOf(saved) || !v.Pause.At.Equal(at.Add(time.Second)) || v.Pause.Reason != sandbox.PauseUser {
		t.Errorf("a pause for a reason from another world: %+v", v.Pause)
	}
}

func TestDecideSnapshot(t *testing.T) {
	saved := &hostv1.Saved{Generation: 2, MemoryDigest: "m", At: timestamppb.New(at)}
	has := &hostv1.Snapshot{Name: "s", Saved: saved}
	for _, tt := range []struct {
		name  string
		state sandbox.SnapshotState
		saved store.Saved
		host  *hostv1.Snapshot
		owned bool
		until time.Time
		want  reconcile.SnapshotDo
	}{
		{"one being made is left alone", sandbox.SnapshotCreating, store.Saved{}, nil, true, at.Add(-1), reconcile.LeaveSnapshot},
		{"one that nobody owns gets its time", sandbox.SnapshotCreating, store.Saved{}, nil, false, at.Add(1), reconcile.LeaveSnapshot},
		{"but not more", sandbox.SnapshotCreating, store.Saved{}, nil, false, at.Add(-1), reconcile.ForgetSnapshot},
		{"one that the host has made", sandbox.SnapshotCreating, store.Saved{}, has, false, at.Add(1), reconcile.RecordSnapshot},
		{"one that is there", sandbox.SnapshotReady, reconcile.SavedOf(saved), has, false, at, reconcile.LeaveSnapshot},
		{"one that has changed its size", sandbox.SnapshotReady, store.Saved{}, has, false, at, reconcile.RecordSnapshot},
		{"one that its host has lost", sandbox.SnapshotReady, reconcile.SavedOf(saved), nil, false, at, reconcile.LoseSnapshot},
		{"one that stays lost", sandbox.SnapshotLost, reconcile.SavedOf(saved), nil, false, at, reconcile.LeaveSnapshot},
		{"one that is back", sandbox.SnapshotLost, reconcile.SavedOf(saved), has, false, at, reconcile.RecordSnapshot},
		{"a deletion under way is left alone", sandbox.SnapshotDeleting, reconcile.SavedOf(saved), nil, true, at, reconcile.LeaveSnapshot},
		{"a deletion is repeated", sandbox.SnapshotDeleting, reconcile.SavedOf(saved), has, false, at, reconcile.DeleteSnapshot},
		{"a deletion that is done", sandbox.SnapshotDeleting, reconcile.SavedOf(saved), nil, false, at, reconcile.ForgetSnapshot},
	} {
		row := store.Template{Name: "s", State: tt.state, Saved: tt.saved, Work: store.Work{Until: tt.until}}
		if got := reconcile.DecideSnapshot(row, tt.host, tt.owned, at); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}
