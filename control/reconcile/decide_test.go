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
	)
	young := reconcile.Facts{Age: time.Second, CreateLong: time.Minute, AbsentLong: time.Second}
	owned, old, lost := young, young, young
	owned.Owned, old.Age, lost.Absent = true, time.Hour, time.Hour
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
			if v.Do == reconcile.MakeRunning && !tt.state.CanBecome(sandbox.Running) {
				t.Errorf("%s cannot become running", tt.state)
			}
		})
	}
	moved := reconcile.Decide(store.Sandbox{State: sandbox.Running, Deadline: at.Add(time.Second)}, on(running, ""), young)
	if moved.Do != reconcile.MoveDeadline || !moved.At.Equal(at) {
		t.Errorf("the host's deadline is the truth: %+v", moved)
	}
}
