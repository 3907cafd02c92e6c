package guestapi

import "time"

// Paths of what only the host may ask, signed: control calls.
const (
	PathInit   = "/init"
	PathFreeze = "/freeze"
	PathThaw   = "/thaw"
	// PathPowerOff ends the machine as its own shutdown does.
	PathPowerOff = "/poweroff"
)

// Bounds of the agent, unless a request says otherwise.
const (
	// FreezeWithin is how long user processes may take to stand still.
	FreezeWithin = 10 * time.Second
	// FreezeLimit is how long they stand still before the agent takes the host
	// for dead and lets them go on, in time that the machine runs. Who saves the
	// machine must have stopped it long before, or have frozen it once more.
	FreezeLimit = 10 * time.Minute
	// HookLimit bounds each hook of the image, and HooksLimit all of them together.
	HookLimit  = 10 * time.Second
	HooksLimit = 30 * time.Second
)

// Freeze is the body of POST /freeze: user processes stand still, and no new one
// starts, until /thaw or the /init of a restored copy. A start that is asked for
// meanwhile waits. Freezing what is frozen is success, and sets its limit anew.
//
// It is all or nothing: when they do not stand still in time, they run on, and the
// answer is 504.
type Freeze struct {
	WithinMs    int64 `json:"withinMs,omitempty"`    // instead of FreezeWithin
	ThawAfterMs int64 `json:"thawAfterMs,omitempty"` // instead of FreezeLimit
}

// Thaw is the body of POST /thaw: the same sandbox goes on. Thawing what runs is
// success.
type Thaw struct {
	// Timestamp is as in Init: the machine's clock stood still with the machine.
	Timestamp string `json:"timestamp,omitempty"`
}

// Identified is the answer to an Init with Restored.
type Identified struct {
	// Frozen says that user processes stood still when the call came, or that there
	// were none. Otherwise some may have run as a copy that did not know that it is one.
	Frozen bool `json:"frozen"`
	// Clock is the guest's, after it was set; RFC 3339.
	Clock string `json:"clock"`
	// Dropped is how many TCP connections to the outside were ended.
	Dropped int `json:"dropped"`
	// Hooks are the image's, in the order in which they ran.
	Hooks []Hook `json:"hooks,omitempty"`
	// Warnings are what could not be done and is not worth a failure: an /etc that
	// cannot be written, a kernel that cannot end connections.
	Warnings []string `json:"warnings,omitempty"`
}

// Hook is how one hook of the image ended.
type Hook struct {
	Name   string `json:"name"`
	Error  string `json:"error,omitempty"`  // empty for success
	Output string `json:"output,omitempty"` // the end of it
	TookMs int64  `json:"tookMs"`
}
