package reconcile

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/control/store"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// PauseOf is what a host says of a sandbox that it has paused.
func PauseOf(status *hostv1.SandboxStatus) store.Pause {
	p := store.Pause{Saved: SavedOf(status.GetSaved()), At: timeOf(status.GetPausedAt()), Reason: sandbox.PauseReason(status.GetPauseReason())}
	if !p.Reason.Valid() {
		p.Reason = sandbox.PauseUser
	}
	return p
}

// SavedOf is a pause point or a snapshot as its host describes it.
func SavedOf(m *hostv1.Saved) store.Saved {
	if m == nil {
		return store.Saved{}
	}
	return store.Saved{
		At: timeOf(m.GetAt()), Generation: int(m.GetGeneration()),
		MemoryBytes: bounded(m.GetMemoryBytes()), DiskBytes: bounded(m.GetDiskBytes()), OwnBytes: bounded(m.GetOwnBytes()),
		MemoryDigest: m.GetMemoryDigest(), DiskDigest: m.GetDiskDigest(), ParentDigest: m.GetParentDigest(),
		Compat: m.GetCompat(), Durability: sandbox.Durability(m.GetDurability()),
	}
}

// bounded keeps a figure from wrapping round.
func bounded(n uint64) int64 { return int64(min(n, 1<<62)) }

// timeOf is a time that a database can keep; zero when there is none.
func timeOf(t *timestamppb.Timestamp) time.Time {
	if !t.IsValid() || t.AsTime().Unix() <= 0 {
		return time.Time{}
	}
	return t.AsTime()
}

// SnapshotOf is a snapshot as its host describes it.
func SnapshotOf(m *hostv1.Snapshot, host string) store.Template {
	s := m.GetSaved()
	return store.Template{
		Name: m.GetName(), State: sandbox.SnapshotReady, Host: host, Image: m.GetTemplate(), Parent: m.GetParent(), Sandbox: sandbox.ID(m.GetSandbox()),
		VCPUs: int(s.GetVcpus()), MemMiB: int(s.GetMemMib()), DiskMiB: int(s.GetDiskMib()),
		Saved: SavedOf(s), Metadata: m.GetLabels(), CreatedAt: timeOf(s.GetAt()),
	}
}
