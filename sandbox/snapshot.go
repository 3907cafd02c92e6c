package sandbox

import "slices"

// TemplateKind says what a template is.
type TemplateKind string

// The kinds.
const (
	TemplateImage    TemplateKind = "image"    // a disk only: sandboxes boot
	TemplateSnapshot TemplateKind = "snapshot" // a disk and a memory: sandboxes go on
)

// SnapshotState is where a snapshot is in its life, as whoever asked for it sees
// it. One that is gone has no state.
type SnapshotState string

// The states.
const (
	SnapshotCreating SnapshotState = "creating"
	SnapshotReady    SnapshotState = "ready"
	SnapshotDeleting SnapshotState = "deleting"
	SnapshotLost     SnapshotState = "lost" // its host does not have it; reversible
)

var snapshotTransitions = map[SnapshotState][]SnapshotState{
	SnapshotCreating: {SnapshotReady, SnapshotDeleting},
	SnapshotReady:    {SnapshotDeleting, SnapshotLost},
	SnapshotDeleting: {SnapshotReady, SnapshotLost}, // its host refused
	SnapshotLost:     {SnapshotReady, SnapshotDeleting},
}

// SnapshotStates lists every state.
func SnapshotStates() []SnapshotState {
	return []SnapshotState{SnapshotCreating, SnapshotReady, SnapshotDeleting, SnapshotLost}
}

// CanBecome reports whether a snapshot in s may move to next.
func (s SnapshotState) CanBecome(next SnapshotState) bool {
	return slices.Contains(snapshotTransitions[s], next)
}
