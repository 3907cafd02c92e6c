package sandbox

import "slices"

// State is where a sandbox is in its life.
type State string

// The states. Gone and Failed are the ends: nothing leaves them.
const (
	Creating    State = "creating"
	Running     State = "running"
	Pausing     State = "pausing"
	Paused      State = "paused"
	Resuming    State = "resuming"
	Unreachable State = "unreachable" // its host does not answer; reversible
	Destroying  State = "destroying"
	Gone        State = "gone"   // ended because somebody or its deadline asked for it
	Failed      State = "failed" // ended because something broke; the cause says what
)

// States lists every state.
func States() []State {
	return []State{Creating, Running, Pausing, Paused, Resuming, Unreachable, Destroying, Gone, Failed}
}

var transitions = map[State][]State{
	Creating:    {Running, Unreachable},
	Running:     {Pausing, Unreachable},
	Pausing:     {Paused, Running, Unreachable},
	Paused:      {Resuming, Unreachable},
	Resuming:    {Running, Paused, Unreachable},
	Unreachable: {Running, Paused},
	Destroying:  {Gone},
}

// CanBecome reports whether a sandbox in s may move to next. Every state but
// the ends may move to Destroying and to Failed.
func (s State) CanBecome(next State) bool {
	if s.Ended() || s == next {
		return false
	}
	if next == Failed || (next == Destroying && s != Destroying) {
		return true
	}
	return slices.Contains(transitions[s], next)
}

// Ended reports whether s is one of the ends.
func (s State) Ended() bool { return s == Gone || s == Failed }

// Valid reports whether s is a state at all.
func (s State) Valid() bool { return slices.Contains(States(), s) }

// Freeze says why a running sandbox stands still for now; empty when it does not.
type Freeze string

// The reasons.
const (
	FreezeNoSpace Freeze = "no_space" // the disk of its host is nearly full
	FreezeSave    Freeze = "save"     // a pause or snapshot was given up, and it did not go on at once
)

// Valid reports whether f is empty or a known reason.
func (f Freeze) Valid() bool { return f == "" || f == FreezeNoSpace || f == FreezeSave }

// Cause says why a sandbox ended. It is kept and answered after its death.
type Cause string

// The causes.
const (
	CauseUser         Cause = "user"          // somebody asked for it
	CauseTTL          Cause = "ttl"           // its deadline passed
	CauseShutdown     Cause = "shutdown"      // the operator took the server down
	CauseCreateFailed Cause = "create_failed" // a step of its create failed
	CauseBootTimeout  Cause = "boot_timeout"  // its guest never answered
	CauseStartFailed  Cause = "start_failed"  // its template's start command could not be started, or failed before it was ready
	CauseNotReady     Cause = "not_ready"     // its template's health check did not succeed in time
	CauseAgentCrash   Cause = "agent_crash"   // the host agent died in the middle of its create
	CauseGuestExit    Cause = "guest_exit"    // the guest powered itself off or its kernel panicked
	CauseOOMGuest     Cause = "oom_guest"     // the guest ran out of memory and its kernel gave up
	CauseOOMHost      Cause = "oom_host"      // the host's kernel ended its VMM for want of memory
	CauseVMMCrash     Cause = "vmm_crash"     // the VMM process died
	CauseDiskFailed   Cause = "disk_failed"   // its disk was lost
	CauseHostReboot   Cause = "host_reboot"   // the machine started anew under it
	CauseHostLost     Cause = "host_lost"     // its host never came back
	CausePagerFault   Cause = "pager_fault"   // its memory could not be served
)

// End is the state in which a sandbox with this cause rests.
func (c Cause) End() State {
	switch c {
	case CauseUser, CauseTTL, CauseShutdown:
		return Gone
	}
	return Failed
}

// Valid reports whether c is a known cause.
func (c Cause) Valid() bool {
	return slices.Contains([]Cause{
		CauseUser, CauseTTL, CauseShutdown, CauseCreateFailed, CauseBootTimeout, CauseStartFailed, CauseNotReady, CauseAgentCrash, CauseGuestExit,
		CauseOOMGuest, CauseOOMHost, CauseVMMCrash, CauseDiskFailed, CauseHostReboot, CauseHostLost, CausePagerFault,
	}, c)
}
