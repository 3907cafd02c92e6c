package host

import (
	"time"

	"github.com/dormouse-sandbox/dormouse/snapshot"
)

// collectTick is how often the host looks whether something is to be collected.
const collectTick = time.Second

// collectSoon says that something may have become needless.
func (a *Agent) collectSoon() { a.garbage.Store(true) }

// collect deletes what no sandbox and no reference needs. Whoever notes a point
// in a sandbox's entry does so before its pins are released.
func (a *Agent) collect(time.Time) {
	if a.cfg.Snapshots == nil || !a.garbage.CompareAndSwap(true, false) {
		return
	}
	c, err := a.cfg.Snapshots.Collect(a.ctx, a.roots)
	if err != nil {
		if a.ctx.Err() == nil {
			a.log.Error("snapshots not collected, will try again", "err", err)
		}
		return
	}
	if c.Files > 0 {
		a.log.Info("snapshots collected", "files", c.Files, "bytes", c.Bytes)
	}
}

// roots are what sandboxes need.
func (a *Agent) roots() []snapshot.Digest {
	var roots []snapshot.Digest
	for _, b := range a.all() {
		roots = append(roots, b.now().roots()...)
	}
	return roots
}
