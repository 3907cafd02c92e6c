package host_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/cgroup"
	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestEachVMHasAControlGroup(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	want := cgroup.Limits{MemBytes: 128 << 20, PIDs: 1 + 128, CPUs: 2}
	if got := r.groups.limits[string(id)]; got != want {
		t.Errorf("limits %+v, want %+v", got, want)
	}
	if got, want := r.vms.cgroupOf(id), "/fake-cgroup/"+string(id); got != want {
		t.Errorf("the VM was started in %q, want %q", got, want)
	}
	if _, err := r.agent.Destroy(t.Context(), string(id), ""); err != nil {
		t.Fatal(err)
	}
	if left := r.leftovers(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestOOMOfTheHost: a VMM that the kernel killed for want of memory is told apart
// from one that crashed, with the agent there and without.
func TestOOMOfTheHost(t *testing.T) {
	for name, restart := range map[string]bool{"seen": false, "found out by the next agent": true} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.open()
			id, other := r.mustCreate(), r.mustCreate()
			r.groups.oomKill(string(id))
			if restart {
				r.agent.Abandon()
				r.networks.crash()
			}
			for _, id := range []sandbox.ID{id, other} {
				if err := r.vms.Crash(id); err != nil {
					t.Fatal(err)
				}
			}
			if restart {
				r.open()
			}
			testkit.Eventually(t, 5*time.Second, "both have ended", func() bool {
				return r.status(id).State == "ended" && r.status(other).State == "ended"
			})
			if a, b := r.status(id).Cause, r.status(other).Cause; a != sandbox.CauseOOMHost || b != sandbox.CauseVMMCrash {
				t.Errorf("causes %s and %s", a, b)
			}
			if left := r.leftovers(); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// TestSweepsGroupsAndDisks: what no sandbox owns goes, what one owns stays.
func TestSweepsGroupsAndDisks(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	if _, err := r.groups.Create("leftbehind", cgroup.Limits{}); err != nil {
		t.Fatal(err)
	}
	r.agent.Abandon()
	r.networks.crash()
	r.open()
	if got := r.groups.names(); !slices.Equal(got, []string{string(id)}) {
		t.Errorf("control groups after a restart: %v", got)
	}
	if want := []string{filepath.Join(r.dir, "host/sandboxes", string(id))}; !slices.Equal(r.disks.kept, want) {
		t.Errorf("disks kept: %v, want %v", r.disks.kept, want)
	}
}

func TestALostDiskEndsItsSandbox(t *testing.T) {
	r := newRig(t)
	r.open()
	id, other := r.mustCreate(), r.mustCreate()
	r.disks.find(disk.Report{
		Damage: []disk.Damage{{File: "/images/base", Block: 7, Cause: "is not what was sealed"}},
		Broken: []disk.Broken{{Dir: filepath.Join(r.dir, "host/sandboxes", string(id)), Cause: "the overlay is broken"}, {Dir: "/somebody/elses"}},
	})
	r.agent.CheckDisks()
	testkit.Eventually(t, 5*time.Second, "ended", func() bool { return r.status(id).State == "ended" })
	if s := r.status(id); s.Cause != sandbox.CauseDiskFailed || s.Detail != "the overlay is broken" {
		t.Errorf("it ended with %s (%s)", s.Cause, s.Detail)
	}
	if s := r.status(other); s.State != "running" {
		t.Errorf("the other one is %s", s.State)
	}
	r.agent.CheckDisks()
	want := []string{"/images/base: block 7 of 4 KiB (at byte 28672) is not what was sealed"}
	if got := r.agent.Describe().Damage; !slices.Equal(got, want) {
		t.Errorf("damage: %q", got)
	}
}

// TestDriversChange: a host that has come to another driver still knows its
// running sandboxes, and says so where it has lost the one that they need.
func TestDriversChange(t *testing.T) {
	r := newRig(t)
	r.open()
	old := r.mustCreate()
	if err := r.agent.Close(); err != nil {
		t.Fatal(err)
	}
	newer := &disks{sizes: map[string]int64{}, name: "newer"}

	r.networks.crash()
	r.agentCfg = func(c *host.Config) { c.Disks = []disk.Driver{newer} }
	r.open()
	if err := r.answers(old); !sandbox.Is(err, sandbox.KindTransient) {
		t.Errorf("without its driver: %v", err)
	}
	if len(r.vms.Running()) != 1 {
		t.Error("the VM was not left alone")
	}
	if err := r.agent.Close(); err != nil {
		t.Fatal(err)
	}

	r.networks.crash()
	r.agentCfg = func(c *host.Config) { c.Disks = []disk.Driver{newer, r.disks} }
	r.open()
	if err := r.answers(old); err != nil {
		t.Errorf("with its driver: %v", err)
	}
	data, err := os.ReadFile(filepath.Join(r.dir, "host/journal", string(r.mustCreate())+".json"))
	if err != nil || !strings.Contains(string(data), `"disk_driver":"newer"`) {
		t.Errorf("the entry of a new one: %s, %v", data, err)
	}
}
