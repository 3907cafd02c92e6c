// Package place chooses the host of a new sandbox. It is one pure function over
// plain data: what hosts say of themselves in, a name or the reason for none
// out. The host checks again; this is for an early and clear answer.
package place

import "github.com/dormouse-sandbox/dormouse/sandbox"

// Host is what a host says of itself.
type Host struct {
	Name            string
	MemTotalMiB     int // for sandboxes
	MemCommittedMiB int // promised to sandboxes that are there
	Sandboxes       int
	MaxSandboxes    int // 0: no limit
}

// Choose picks the host with the most memory left. When there is none it says
// what was asked for and what there is: invalid if no host could ever do it,
// busy if one could later.
func Choose(hosts []Host, want sandbox.Spec) (Host, error) {
	if len(hosts) == 0 {
		return Host{}, sandbox.Errorf(sandbox.KindTransient, "no host answers")
	}
	var best, largest, freest *Host
	for i := range hosts {
		h := &hosts[i]
		if largest == nil || h.MemTotalMiB > largest.MemTotalMiB {
			largest = h
		}
		if freest == nil || h.free() > freest.free() {
			freest = h
		}
		if h.fits(want) && (best == nil || h.free() > best.free()) {
			best = h
		}
	}
	switch {
	case best != nil:
		return *best, nil
	case want.MemMiB > largest.MemTotalMiB:
		return Host{}, sandbox.Errorf(sandbox.KindInvalid,
			"mem_mib is %d, the host has %d MiB for sandboxes", want.MemMiB, largest.MemTotalMiB)
	case want.MemMiB > freest.free():
		return Host{}, sandbox.Errorf(sandbox.KindBusy,
			"mem_mib is %d, but %d of the host's %d MiB are promised to other sandboxes",
			want.MemMiB, freest.MemCommittedMiB, freest.MemTotalMiB)
	}
	return Host{}, sandbox.Errorf(sandbox.KindBusy,
		"the host runs %d sandboxes, its limit is %d", freest.Sandboxes, freest.MaxSandboxes)
}

func (h *Host) free() int { return h.MemTotalMiB - h.MemCommittedMiB }

func (h *Host) fits(want sandbox.Spec) bool {
	return want.MemMiB <= h.free() && (h.MaxSandboxes == 0 || h.Sandboxes < h.MaxSandboxes)
}
