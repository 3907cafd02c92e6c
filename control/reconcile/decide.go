package reconcile

import (
	"fmt"
	"time"

	"github.com/dormouse-sandbox/dormouse/control/store"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Do is what one sandbox needs.
type Do int

// What to do. The zero value is nothing.
const (
	Nothing     Do = iota
	End            // record the end that the host has told, or that its silence means
	MakeRunning    // the host has it running and the database does not say so
	MakePaused     // the host has it paused and the database does not say so
	StillPaused    // its resume came to nothing
	MoveDeadline
	NoteFrozen // it stands still, or goes on
	NoteSaved  // another pause point is kept, or an automatic pause failed
	Destroy    // ask the host to destroy it, until it has
)

// Verdict is what to do about one sandbox, with what it takes.
type Verdict struct {
	Do     Do
	Cause  sandbox.Cause
	Detail string
	At     time.Time // of an end, a pause or a deadline; zero: now
	Frozen sandbox.Freeze

	Start      sandbox.Start
	Pause      store.Pause
	PauseError string
}

// Facts are what a decision depends on besides the two records.
type Facts struct {
	Owned      bool          // a create, pause or resume of this process is under way for it
	Age        time.Duration // since it was asked for
	CreateLong time.Duration // a create that nobody owns and takes longer is given up
	Absent     time.Duration // for how long an answering host has not named it
	AbsentLong time.Duration // after which it is lost
	Odd        time.Duration // for how long the host has said what a pause or resume under way would not explain
	OddLong    time.Duration // after which nobody is about to ask the host for it any more
}

// Decide compares what was asked for with what an answering host reports, nil
// when it does not name the sandbox. It is a pure function.
func Decide(row store.Sandbox, status *hostv1.SandboxStatus, f Facts) Verdict {
	switch {
	case row.State.Ended():
		return Verdict{}
	case f.Owned && transitional(row.State):
		return Verdict{} // whoever works on it writes the outcome
	case row.State == sandbox.Destroying:
		return decideDestroying(row, status)
	case status.GetState() == hostv1.State_STATE_ENDED:
		return ended(row, status)
	case row.State == sandbox.Creating:
		return decideOrphan(status, f)
	case status == nil && row.State == sandbox.Resuming:
		return decideLostResume(f)
	case status == nil && row.State != sandbox.Paused:
		return decideAbsent(f)
	case status.GetState() == hostv1.State_STATE_RUNNING:
		return decideRunning(row, status, f)
	case status.GetState() == hostv1.State_STATE_PAUSED:
		return decidePaused(row, status, f)
	}
	return Verdict{}
}

// transitional says of a state that somebody works on what comes after it.
func transitional(s sandbox.State) bool {
	return s == sandbox.Creating || s == sandbox.Pausing || s == sandbox.Resuming
}

// odd says of a record and a report that they agree only if the host has not yet
// been asked for what the record says, or has done it and gone back.
func odd(state sandbox.State, status *hostv1.SandboxStatus) bool {
	return state == sandbox.Pausing && status.GetState() == hostv1.State_STATE_RUNNING ||
		state == sandbox.Resuming && status.GetState() == hostv1.State_STATE_PAUSED
}

// decideDestroying repeats the request until the host has done it.
func decideDestroying(row store.Sandbox, status *hostv1.SandboxStatus) Verdict {
	switch status.GetState() {
	case hostv1.State_STATE_ENDED:
		return ended(row, status)
	case hostv1.State_STATE_UNSPECIFIED:
		return Verdict{Do: End, Cause: asked(row)}
	}
	return Verdict{Do: Destroy, Cause: asked(row)}
}

// decideOrphan handles a create whose process died. What the host finished
// nevertheless is kept: the caller may come back with its idempotency key, and
// no running VM is thrown away.
func decideOrphan(status *hostv1.SandboxStatus, f Facts) Verdict {
	switch status.GetState() {
	case hostv1.State_STATE_UNSPECIFIED:
		return Verdict{Do: End, Cause: sandbox.CauseAgentCrash, Detail: "the server died while the sandbox was being created"}
	case hostv1.State_STATE_RUNNING:
		return runs(status)
	case hostv1.State_STATE_PAUSED: // it was idle
		return paused(status)
	case hostv1.State_STATE_CREATING:
		if f.Age > f.CreateLong {
			return Verdict{Do: Destroy, Cause: sandbox.CauseCreateFailed}
		}
	}
	return Verdict{}
}

// decideAbsent handles a sandbox of which the host has no record at all, not
// even of its end: the host's journal was lost. The host itself reports what a
// reboot ended, with that cause.
func decideAbsent(f Facts) Verdict {
	if f.Absent < f.AbsentLong {
		return Verdict{}
	}
	return Verdict{Do: End, Cause: sandbox.CauseHostLost, Detail: "the host has no record of it"}
}

// decideLostResume handles a resume of a sandbox that its host does not have. A
// paused one may be absent, so it is paused again: whoever resumes it next is told
// why that is not possible.
func decideLostResume(f Facts) Verdict {
	if f.Absent < f.AbsentLong {
		return Verdict{}
	}
	return Verdict{Do: StillPaused}
}

// decidePaused handles what the host has paused: by itself, or for a process of
// control that has not recorded it.
func decidePaused(row store.Sandbox, status *hostv1.SandboxStatus, f Facts) Verdict {
	switch {
	case row.State == sandbox.Resuming && f.Odd >= f.OddLong:
		return Verdict{Do: StillPaused}
	case row.State == sandbox.Resuming:
		return Verdict{}
	case row.State != sandbox.Paused:
		return paused(status)
	}
	return noteSaved(row, status)
}

// noteSaved is what has changed of a sandbox's pause point.
func noteSaved(row store.Sandbox, status *hostv1.SandboxStatus) Verdict {
	saved := SavedOf(status.GetSaved())
	if saved == row.Saved && status.GetAutoPauseError() == row.PauseError {
		return Verdict{}
	}
	return Verdict{Do: NoteSaved, Pause: store.Pause{Saved: saved}, PauseError: status.GetAutoPauseError()}
}

// runs is the verdict on what the host has running.
func runs(status *hostv1.SandboxStatus) Verdict {
	v := Verdict{Do: MakeRunning, At: deadlineOf(status)}
	if start := sandbox.Start(status.GetStart()); start.Valid() {
		v.Start = start
	}
	return v
}

// paused is the verdict on what the host has paused.
func paused(status *hostv1.SandboxStatus) Verdict {
	return Verdict{Do: MakePaused, Pause: PauseOf(status)}
}

func decideRunning(row store.Sandbox, status *hostv1.SandboxStatus, f Facts) Verdict {
	switch row.State {
	case sandbox.Unreachable:
		return Verdict{Do: MakeRunning}
	case sandbox.Paused, sandbox.Resuming:
		return runs(status)
	case sandbox.Pausing:
		if f.Odd >= f.OddLong {
			return Verdict{Do: MakeRunning}
		}
		return Verdict{}
	}
	if at := deadlineOf(status); row.State == sandbox.Running && !at.IsZero() && !at.Equal(row.Deadline) {
		return Verdict{Do: MoveDeadline, At: at}
	}
	if why := sandbox.Freeze(status.GetFrozen()); row.State == sandbox.Running && why != row.Frozen && why.Valid() {
		return Verdict{Do: NoteFrozen, Frozen: why}
	}
	if row.State == sandbox.Running {
		return noteSaved(row, status)
	}
	return Verdict{}
}

// deadlineOf is when the host will destroy a sandbox; zero when it does not say.
func deadlineOf(status *hostv1.SandboxStatus) time.Time {
	if d := status.GetSpec().GetDeadline(); d.IsValid() && d.AsTime().Unix() > 0 {
		return d.AsTime()
	}
	return time.Time{}
}

// ended takes the host's word for why.
func ended(row store.Sandbox, status *hostv1.SandboxStatus) Verdict {
	v := Verdict{Do: End, Cause: sandbox.Cause(status.GetCause()), Detail: status.GetCauseDetail()}
	if !v.Cause.Valid() {
		v.Detail = fmt.Sprintf("the host gave the unknown cause %q: %s", status.GetCause(), v.Detail)
		v.Cause = sandbox.CauseVMMCrash
		if row.Cause.Valid() {
			v.Cause = row.Cause
		}
	}
	if at := status.GetEndedAt(); at.IsValid() && at.AsTime().Unix() > 0 {
		v.At = at.AsTime()
	}
	return v
}

func asked(row store.Sandbox) sandbox.Cause {
	if row.Cause.Valid() {
		return row.Cause
	}
	return sandbox.CauseUser
}
