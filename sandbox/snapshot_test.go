package sandbox_test

import (
	"testing"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestEverySnapshotTransition(t *testing.T) {
	allowed := map[sandbox.SnapshotState][]sandbox.SnapshotState{
		sandbox.SnapshotCreating: {sandbox.SnapshotReady, sandbox.SnapshotDeleting},
		sandbox.SnapshotReady:    {sandbox.SnapshotDeleting, sandbox.SnapshotLost},
		sandbox.SnapshotDeleting: {sandbox.SnapshotReady, sandbox.SnapshotLost},
		sandbox.SnapshotLost:     {sandbox.SnapshotReady, sandbox.SnapshotDeleting},
	}
	if len(allowed) != len(sandbox.SnapshotStates()) {
		t.Fatalf("the table has %d states, the package %d", len(allowed), len(sandbox.SnapshotStates()))
	}
	for _, from := range sandbox.SnapshotStates() {
		want := map[sandbox.SnapshotState]bool{}
		for _, to := range allowed[from] {
			want[to] = true
		}
		for _, to := range sandbox.SnapshotStates() {
			if got := from.CanBecome(to); got != want[to] {
				t.Errorf("%s → %s: allowed is %v, want %v", from, to, got, want[to])
			}
		}
		if from.CanBecome("") || !from.CanBecome(sandbox.SnapshotDeleting) && from != sandbox.SnapshotDeleting {
			t.Errorf("%s cannot be deleted, or becomes what does not exist", from)
		}
	}
}
