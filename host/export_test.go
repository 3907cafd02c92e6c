package host

import (
	"context"
	"crypto/ed25519"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Abandon drops the agent as the death of its process would: nothing is rolled
// back, released or written. Only the lock goes, as the kernel would have it.
func (a *Agent) Abandon() {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.stop()
	_ = a.lock.Close() // the process is "dead"
}

// Closed says that Close has begun.
func (a *Agent) Closed() bool { return a.isClosed() }

// DecodeEntry is for the fuzz target.
func DecodeEntry(data []byte) error {
	_, err := decodeEntry(data)
	return err
}

// CheckDisks looks for damage now.
func (a *Agent) CheckDisks() { a.checkDisks(a.cfg.Now()) }

// FlattenLong looks for long lines now.
func (a *Agent) FlattenLong() { a.flattenLong(a.cfg.Now()) }

// PauseIdle looks for idle sandboxes now, and returns when what it began is over.
func (a *Agent) PauseIdle() {
	a.pauseIdle(a.cfg.Now())
	for _, b := range a.all() {
		b.op.Lock()
		over := b.now().State // whoever had op is done
		b.op.Unlock()
		_ = over
	}
}

// ForgetFailedPauses makes automatic pauses that failed due again.
func (a *Agent) ForgetFailedPauses() {
	for _, b := range a.all() {
		b.mu.Lock()
		b.use.again = time.Time{}
		b.mu.Unlock()
	}
}

// The parsers of what a guest says, for the fuzz targets.
var (
	Printable        = printable
	AnswerError      = errorFrom
	DecodeIdentified = decodeIdentified
)

// DecodeFiles decodes a guest's answer about files.
func DecodeFiles(data []byte, into any) error { return fileCodec{}.Unmarshal(data, into) }

// Known counts everything that the agent knows, sandboxes of builds too.
func (a *Agent) Known() int { return len(a.all()) }

// Guest is the way to a guest, for tests of what the host asks of its agent.
type Guest struct{ g *guest }

// NewGuest is the way to the guest of a network.
func NewGuest(network Network) Guest { return Guest{(&Agent{}).newGuest(network, "token")} }

func (c Guest) Freeze(ctx context.Context, key ed25519.PrivateKey, id sandbox.ID, now time.Time, f guestapi.Freeze) error {
	return c.g.freeze(ctx, key, id, now, f)
}

func (c Guest) Thaw(ctx context.Context, key ed25519.PrivateKey, id sandbox.ID, now time.Time) error {
	return c.g.thaw(ctx, key, id, now)
}

func (c Guest) Identify(ctx context.Context, key ed25519.PrivateKey, before sandbox.ID, now func() time.Time, body guestapi.Init) (guestapi.Identified, error) {
	return c.g.identify(ctx, key, before, now, body)
}

func (c Guest) Close() error { return c.g.close() }

// FreezeGuest, ThawGuest and IdentifyGuest ask a sandbox's guest as the verbs do.
// me and before are who it takes itself for.
func (a *Agent) FreezeGuest(ctx context.Context, id string, me sandbox.ID, f guestapi.Freeze) error {
	b, err := a.box(id)
	if err != nil {
		return err
	}
	return b.guest.freeze(ctx, a.key, me, a.cfg.Now(), f)
}

func (a *Agent) ThawGuest(ctx context.Context, id string) error {
	b, err := a.box(id)
	if err != nil {
		return err
	}
	return b.guest.thaw(ctx, a.key, b.id, a.cfg.Now())
}

func (a *Agent) IdentifyGuest(ctx context.Context, id string, before sandbox.ID, init guestapi.Init) (guestapi.Identified, error) {
	b, err := a.box(id)
	if err != nil {
		return guestapi.Identified{}, err
	}
	return b.guest.identify(ctx, a.key, before, a.cfg.Now, init)
}

// CheckMemories looks for damaged memories now, and waits for what comes of it.
func (a *Agent) CheckMemories() { a.checkMemories(a.cfg.Now()).Wait() }

// Collect does at once what the house-keeping does in time.
func (a *Agent) Collect() { a.collect(time.Now()) }
