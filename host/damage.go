package host

import (
	"path/filepath"
	"sync"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
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

// lostMemory reports whether a page could not be read of the memory that a sandbox
// goes on from. Under KVM that can make its guest reboot: what the kernel cannot
// read of a guest's page tables is a page fault to the guest.
func (a *Agent) lostMemory(id sandbox.ID) bool {
	b, err := a.box(string(id))
	if err != nil || a.cfg.Images == nil {
		return false
	}
	began := b.now().Began
	return began != nil && a.cfg.Images.Damaged(began.Memory)
}

// muteLimit is how often in a row a guest whose memory is damaged may not answer.
const muteLimit = 2

// checkMemories asks the guests that go on from a memory of which a page could not
// be read. Under KVM one that wants such a page stands still, and its VMM does not
// learn of it.
func (a *Agent) checkMemories(time.Time) *sync.WaitGroup {
	asked := new(sync.WaitGroup)
	if a.cfg.Images == nil {
		return asked
	}
	damaged := map[snapshot.Digest]bool{}
	for _, b := range a.all() {
		e := b.now()
		if e.State != stateRunning || e.Began == nil || b.isFrozen() || b.alive.Err() != nil {
			continue
		}
		memory := e.Began.Memory
		if _, known := damaged[memory]; !known {
			damaged[memory] = a.cfg.Images.Damaged(memory)
		}
		if damaged[memory] {
			asked.Go(func() { a.doubt(b) })
		}
	}
	return asked
}

// doubt asks one guest, and ends its sandbox when it did not answer before either.
func (a *Agent) doubt(b *box) {
	b.mu.Lock()
	g := b.guest
	b.mu.Unlock()
	if g == nil {
		return // it is being taken over
	}
	err := g.ping(a.ctx)
	if !b.op.TryLock() { // a pause or a snapshot lets it stand still just now
		return
	}
	b.op.Unlock()
	b.mu.Lock()
	if b.mute++; err == nil {
		b.mute = 0
	}
	mute := b.mute
	b.mu.Unlock()
	e := b.now()
	if mute < muteLimit || a.ctx.Err() != nil || e.State != stateRunning || b.isFrozen() || b.alive.Err() != nil {
		return
	}
	const why = "a page of the guest's saved memory could not be read, and it does not answer"
	a.log.Error("sandbox has lost a part of its memory", "sandbox", b.id, "memory", e.Began.Memory)
	if err := a.end(a.ctx, b, sandbox.CausePagerFault, why); err != nil {
		a.log.Error("sandbox not removed yet", "sandbox", b.id, "err", err)
	}
}
