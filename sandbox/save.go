package sandbox

import "slices"

// MaxForks is how many copies one fork makes at most.
const MaxForks = 100

// SavePhase names one step of a pause, a snapshot or a fork.
type SavePhase string

// The steps, in order. Between PhaseFreeze and PhaseThaw the guest stands still;
// a pause has no PhaseThaw.
const (
	PhaseFreeze      SavePhase = "freeze"       // processes, then virtual CPUs
	PhaseDeviceState SavePhase = "device_state" // of the VMM
	PhaseDirtyScan   SavePhase = "dirty_scan"   // find what may have changed
	PhaseCopy        SavePhase = "copy"         // of that, as far as it has to be done while frozen
	PhaseThaw        SavePhase = "thaw"
	PhaseCompare     SavePhase = "compare" // drop what equals the parent
	PhasePublish     SavePhase = "publish" // make it durable and give it its name
)

// SavePhases lists every step in order.
func SavePhases() []SavePhase {
	return []SavePhase{PhaseFreeze, PhaseDeviceState, PhaseDirtyScan, PhaseCopy, PhaseThaw, PhaseCompare, PhasePublish}
}

// PauseReason says who paused a sandbox.
type PauseReason string

// The reasons.
const (
	PauseUser PauseReason = "user" // somebody asked for it
	PauseIdle PauseReason = "idle" // nothing was active for as long as its policy allows
)

// Valid reports whether r is a known reason.
func (r PauseReason) Valid() bool { return r == PauseUser || r == PauseIdle }

// Start says how a sandbox came to run.
type Start string

// The ways.
const (
	StartBoot     Start = "boot"     // its kernel booted
	StartWarm     Start = "warm"     // from what an earlier boot of its template and shape had kept
	StartSnapshot Start = "snapshot" // from a snapshot
	StartFork     Start = "fork"     // as a copy of another one
	StartResume   Start = "resume"   // from its own pause point
)

// Valid reports whether s is a known way.
func (s Start) Valid() bool {
	return slices.Contains([]Start{StartBoot, StartWarm, StartSnapshot, StartFork, StartResume}, s)
}

// Durability says what a saved state survives.
type Durability string

// DurableLocal: written to the host's disk and fsynced.
const DurableLocal Durability = "local"

// Valid reports whether d is a known level.
func (d Durability) Valid() bool { return d == DurableLocal }
