package host

import (
	"path/filepath"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// damageTick is how soon an operator reads of damage that a guest came across.
const damageTick = 10 * time.Second

// checkDisks asks the drivers for damage. What bases have is remembered and
// logged once; a sandbox whose overlay is lost has ended.
func (a *Agent) checkDisks(time.Time) {
	for _, d := range a.cfg.Disks {
		report, err := d.Check(a.ctx)
		if err != nil && a.ctx.Err() == nil {
			a.log.Warn("disks not checked", "driver", d.Name(), "err", err)
		}
		for _, x := range report.Damage {
			a.damaged(x)
		}
		for _, x := range report.Broken {
			a.diskLost(x)
		}
	}
}

func (a *Agent) damaged(x disk.Damage) {
	const most = 1000
	text := x.String()
	a.mu.Lock()
	known := a.damage[text]
	if !known && len(a.damage) < most {
		a.damage[text] = true
	}
	a.mu.Unlock()
	if !known {
		a.log.Error("base is damaged: its guests get I/O errors there", "file", x.File, "block", x.Block, "cause", x.Cause)
	}
}

// diskLost ends the sandbox that has a lost disk.
func (a *Agent) diskLost(x disk.Broken) {
	id := filepath.Base(x.Dir)
	b, err := a.box(id)
	if err != nil || a.stateDir(b.id) != x.Dir || b.now().State != stateRunning || b.alive.Err() != nil {
		return // nobody's, or it is ending already
	}
	a.log.Error("sandbox has lost its disk", "sandbox", b.id, "cause", x.Cause)
	a.wg.Go(func() {
		if err := a.end(a.ctx, b, sandbox.CauseDiskFailed, x.Cause); err != nil {
			a.log.Error("sandbox not removed yet", "sandbox", b.id, "err", err)
		}
	})
}
