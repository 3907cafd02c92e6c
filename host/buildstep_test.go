package host_test

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
)

func (r *rig) step() template.RunStep {
	return template.RunStep{
		Image: r.image, ImageBytes: 64 << 20, Result: filepath.Join(r.dir, "result"), Command: []string{"/bin/true"}, User: "root", Workdir: "/", Output: io.Discard,
	}
}

// clean fails when anything of a step's sandbox is left, its record included.
func (r *rig) clean() {
	r.t.Helper()
	if left := r.leftovers(); len(left) > 0 {
		r.t.Errorf("left on the host: %v", left)
	}
	records, err := os.ReadDir(filepath.Join(r.dir, "host/journal"))
	if err != nil || len(records) > 0 || r.agent.Known() > 0 {
		r.t.Errorf("records of builds are left: %v, %v; the agent knows %d", records, err, r.agent.Known())
	}
}

// TestBuildStepFailsAt fails a step's sandbox in turn; the guests of this rig
// cannot run commands, which is the last failure.
func TestBuildStepFailsAt(t *testing.T) {
	for _, point := range []string{
		"host/create/journal", "host/create/network", "host/create/disk", "host/create/vm", "host/create/boot", "host/create/identity",
		"host/create/publish", "host/build/run", "",
	} {
		t.Run(strings.ReplaceAll(point, "/", "_"), func(t *testing.T) {
			r := newRig(t)
			r.open()
			if point != "" {
				defer fault.Set(point, fault.Fail)()
			}
			if err := (host.Steps{Agent: r.agent}).Run(t.Context(), r.step()); err == nil {
				t.Error("no error")
			}
			if len(r.agent.List()) > 0 {
				t.Errorf("control is told of %+v", r.agent.List())
			}
			r.clean()
		})
	}
}

func TestBuildStepIsNotAdopted(t *testing.T) {
	for _, point := range []string{"host/create/boot", "host/build/run"} {
		t.Run(strings.ReplaceAll(point, "/", "_"), func(t *testing.T) {
			r := newRig(t)
			r.open()
			r.killAt(point, func(dying *host.Agent) {
				_ = (host.Steps{Agent: dying}).Run(context.Background(), r.step()) // its agent is dead
			})
			testkit.Eventually(t, 5*time.Second, "removed", func() bool { return len(r.leftovers()) == 0 })
			r.clean()
		})
	}
}

func TestBuildStepTakesItsShareOfTheHost(t *testing.T) {
	r := newRig(t)
	r.agentCfg = func(c *host.Config) { c.MaxMemMiB = 512 }
	r.open()
	if err := (host.Steps{Agent: r.agent}).Run(t.Context(), r.step()); !sandbox.Is(err, sandbox.KindBusy) {
		t.Errorf("a build on a host without room: %v", err)
	}
	r.free.Store(0)
	if err := (host.Steps{Agent: r.agent}).Run(t.Context(), r.step()); !sandbox.Is(err, sandbox.KindNoSpace) {
		t.Errorf("a build on a full disk: %v", err)
	}
	r.clean()
}
