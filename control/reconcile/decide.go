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
	MoveDeadline
	Destroy // ask the host to destroy it, until it has
)

// Verdict is what to do about one sandbox, with what it takes.
type Verdict struct {
	Do     Do
	Cause  sandbox.Cause
	Detail string
	At     time.Time // of an end or a deadline; zero: now
}

// Facts are what a decision depends on besides the two records.
type Facts struct {
	Owned      bool          // a create of this process is under way for it
	Age        time.Duration // since it was asked for
	CreateLong time.Duration // a create that nobody owns and takes longer is given up
	Absent     time.Duration // for how long an answering host has not named it
	AbsentLong time.Duration // after which it is lost
}

// Decide compares what was asked for with what an answering host reports, nil
// when it does not name the sandbox. It is a pure function.
func Decide(row store.Sandbox, status *hostv1.SandboxStatus, f Facts) Verdict {
	switch {
	case row.State.Ended():
		return Verdict{}
	case f.Owned && row.State == sandbox.Creating:
		return Verdict{} // whoever creates it writes the outcome
	case row.State == sandbox.Destroying:
		return decideDestroying(row, status)
	case status.GetState() == hostv1.State_STATE_ENDED:
		return ended(row, status)
	case row.State == sandbox.Creating:
		return decideOrphan(status, f)
	case status == nil && row.State != sandbox.Paused:
		return decideAbsent(f)
	case status.GetState() == hostv1.State_STATE_RUNNING:
		return decideRunning(row, status)
	}
	return Verdict{}
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
		return Verdict{Do: MakeRunning, At: deadlineOf(status)}
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

func decideRunning(row store.Sandbox, status *hostv1.SandboxStatus) Verdict {
	if row.State == sandbox.Unreachable {
		return Verdict{Do: MakeRunning}
	}
	if at := deadlineOf(status); row.State == sandbox.Running && !at.IsZero() && !at.Equal(row.Deadline) {
		return Verdict{Do: MoveDeadline, At: at}
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
