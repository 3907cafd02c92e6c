package sandbox_test

import (
	"testing"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// The whole machine of docs and design, written out: what is not here is
// forbidden.
var allowed = map[sandbox.State][]sandbox.State{
	sandbox.Creating:    {sandbox.Running, sandbox.Unreachable, sandbox.Destroying, sandbox.Failed},
	sandbox.Running:     {sandbox.Pausing, sandbox.Unreachable, sandbox.Destroying, sandbox.Failed},
	sandbox.Pausing:     {sandbox.Paused, sandbox.Running, sandbox.Unreachable, sandbox.Destroying, sandbox.Failed},
	sandbox.Paused:      {sandbox.Resuming, sandbox.Unreachable, sandbox.Destroying, sandbox.Failed},
	sandbox.Resuming:    {sandbox.Running, sandbox.Paused, sandbox.Unreachable, sandbox.Destroying, sandbox.Failed},
	sandbox.Unreachable: {sandbox.Running, sandbox.Paused, sandbox.Destroying, sandbox.Failed},
	sandbox.Destroying:  {sandbox.Gone, sandbox.Failed},
	sandbox.Gone:        {},
	sandbox.Failed:      {},
}

func TestEveryTransition(t *testing.T) {
	if len(allowed) != len(sandbox.States()) {
		t.Fatalf("the table has %d states, the package %d", len(allowed), len(sandbox.States()))
	}
	for _, from := range sandbox.States() {
		want := map[sandbox.State]bool{}
		for _, to := range allowed[from] {
			want[to] = true
		}
		for _, to := range sandbox.States() {
			if got := from.CanBecome(to); got != want[to] {
				t.Errorf("%s → %s: allowed is %v, want %v", from, to, got, want[to])
			}
		}
		if from.CanBecome("sleeping") {
			t.Errorf("%s → a state that does not exist is allowed", from)
		}
	}
}

func TestOnlyTheEndsEnd(t *testing.T) {
	for _, s := range sandbox.States() {
		if want := len(allowed[s]) == 0; s.Ended() != want {
			t.Errorf("%s.Ended() is %v, want %v", s, s.Ended(), want)
		}
		if !s.Valid() {
			t.Errorf("%s is not valid", s)
		}
	}
	for _, s := range []sandbox.State{"", "RUNNING", "sleeping"} {
		if s.Valid() {
			t.Errorf("%q is valid", s)
		}
	}
}

func TestEveryStateReachesAnEnd(t *testing.T) {
	for _, s := range sandbox.States() {
		if !s.Ended() && !s.CanBecome(sandbox.Failed) {
			t.Errorf("%s cannot fail: it could last for ever", s)
		}
	}
}

func TestCausesRest(t *testing.T) {
	for cause, want := range map[sandbox.Cause]sandbox.State{
		sandbox.CauseUser: sandbox.Gone, sandbox.CauseTTL: sandbox.Gone, sandbox.CauseShutdown: sandbox.Gone,
		sandbox.CauseCreateFailed: sandbox.Failed, sandbox.CauseBootTimeout: sandbox.Failed, sandbox.CauseAgentCrash: sandbox.Failed,
		sandbox.CauseStartFailed: sandbox.Failed, sandbox.CauseNotReady: sandbox.Failed,
		sandbox.CauseGuestExit: sandbox.Failed, sandbox.CauseOOMGuest: sandbox.Failed, sandbox.CauseVMMCrash: sandbox.Failed,
		sandbox.CauseHostReboot: sandbox.Failed, sandbox.CauseHostLost: sandbox.Failed, sandbox.CausePagerFault: sandbox.Failed,
	} {
		if got := cause.End(); got != want {
			t.Errorf("%s rests in %s, want %s", cause, got, want)
		}
		if !cause.Valid() {
			t.Errorf("%s is not valid", cause)
		}
	}
	if sandbox.Cause("bad luck").Valid() || sandbox.Cause("").Valid() {
		t.Error("an unknown cause is valid")
	}
}
