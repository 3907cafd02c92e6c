package server

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/store"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
)

func sandboxOut(s store.Sandbox) api.Sandbox {
	return api.Sandbox{
		ID: string(s.ID), State: string(s.State), Template: s.Spec.Template,
		VCPUs: s.Spec.VCPUs, MemMiB: s.Spec.MemMiB, DiskMiB: s.Spec.DiskMiB,
		Metadata: s.Metadata, Network: api.Network{Internet: s.Spec.Network.Internet},
		CreatedAt: s.CreatedAt, Deadline: optional(s.Deadline), EndedAt: optional(s.EndedAt),
		Cause: string(s.Cause), CauseDetail: s.CauseDetail,
		Frozen:         string(s.Frozen),
		TimeoutSeconds: s.Timeout.Seconds(), AutoPauseSeconds: s.AutoPause.Seconds(), AutoResume: s.AutoResume,
		Saved: savedOut(s.Saved), PausedAt: optional(s.PausedAt), PauseReason: string(s.PauseReason), AutoPauseError: s.PauseError,
		StartedBy: string(s.Start), ForkedFrom: string(s.ForkedFrom),
	}
}

func optional(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func specOut(s store.Sandbox, deadline time.Time) *hostv1.SandboxSpec {
	return &hostv1.SandboxSpec{
		Id: string(s.ID), Template: s.Spec.Template, Vcpus: uint32(s.Spec.VCPUs), MemMib: uint32(s.Spec.MemMiB),
		DiskMib: uint32(s.Spec.DiskMiB), Env: s.Spec.Env, Network: &hostv1.NetworkPolicy{Internet: s.Spec.Network.Internet},
		Deadline: timestamppb.New(deadline), Hostname: string(s.ID), AutoPauseNanos: int64(s.AutoPause),
	}
}

func phasesOut(phases []*hostv1.Phase) []api.Phase {
	var out []api.Phase
	for _, p := range phases {
		out = append(out, api.Phase{Name: p.GetName(), Millis: millis(time.Duration(p.GetNanos()))})
	}
	return out
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func fileOut(e *hostv1.FileEntry) api.File {
	return api.File{
		Name: e.GetName(), Path: e.GetPath(), Type: e.GetType(), Size: e.GetSize(), Mode: e.GetMode(),
		Permissions: e.GetPermissions(), Owner: e.GetOwner(), Group: e.GetGroup(),
		ModifiedAt: timeOut(e.GetModifiedAt()), SymlinkTarget: e.GetSymlinkTarget(),
	}
}

// timeOut brings a time that a guest chose into the years that JSON's times have.
func timeOut(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	switch at := t.AsTime(); {
	case at.Year() > 9999:
		return time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)
	case at.Year() < 0:
		return time.Date(0, 1, 1, 0, 0, 0, 0, time.UTC)
	default:
		return at
	}
}

func keyOut(k store.Key, secret string) api.Key {
	return api.Key{
		ID: k.ID, Name: k.Name, Prefix: k.Prefix, Secret: secret,
		CreatedAt: k.CreatedAt.UTC(), LastUsedAt: optional(k.LastUsedAt),
	}
}
