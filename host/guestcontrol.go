package host

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// What only the host may ask of a guest. See docs/guest-api.md.

// freeze makes the user processes of a guest stand still before it is saved. When
// it fails they run on; its kind is timeout when they did not stand still in
// time, unsupported when the guest's kernel cannot. A failure of the way there
// leaves open what came of it: thaw then.
//
// The guest goes on by itself when nobody has thawed it for f.ThawAfterMs of its
// own running time (guestapi.FreezeLimit). Who has not stopped it within half of
// that must not save it without freezing it once more.
func (g *guest) freeze(ctx context.Context, key ed25519.PrivateKey, id sandbox.ID, now time.Time, f guestapi.Freeze) error {
	within := guestapi.FreezeWithin
	if f.WithinMs > 0 {
		within = time.Duration(f.WithinMs) * time.Millisecond
	}
	return g.control(ctx, key, id, now, guestapi.PathFreeze, within+dialLimit, f, nil)
}

// thaw lets the same sandbox go on: after a live snapshot, or a pause that failed.
// The time is the guest's new one.
func (g *guest) thaw(ctx context.Context, key ed25519.PrivateKey, id sandbox.ID, now time.Time) error {
	return g.control(ctx, key, id, now, guestapi.PathThaw, dialLimit, guestapi.Thaw{Timestamp: stamp(now)}, nil)
}

// identify tells a restored guest who it is now, and lets it go on. before is who
// it was saved as. When it fails, the guest's user processes still stand still and
// it is still who it was: calling again is right, and so is removing it.
//
// A connection should be open already: what a first packet waits for is missing on the
// guest's clock, and costs another call that sets it.
func (g *guest) identify(ctx context.Context, key ed25519.PrivateKey, before sandbox.ID, now func() time.Time, body guestapi.Init) (guestapi.Identified, error) {
	at := now()
	body.Restored = true
	body.Timestamp = stamp(at)
	var answer guestapi.Identified
	err := g.control(ctx, key, before, at, guestapi.PathInit, guestapi.HooksLimit+dialLimit, body, func(r io.Reader) (err error) {
		answer, err = decodeIdentified(r)
		return err
	})
	if err != nil || body.Rehearsal {
		return answer, err
	}
	if body.SandboxID != "" {
		before = sandbox.ID(body.SandboxID)
	}
	return answer, g.settleClock(ctx, key, before, now, answer.Clock)
}

// A guest's clock is late by what the call that sets it was under way. On a busy
// machine that may be more than anybody wants.
const (
	clockLate  = 60 * time.Millisecond
	clockTries = 3
)

// settleClock sets a guest's clock again while it may be late. What it said last of
// its time bounds that, and then how long the call takes. A guest that says no time
// has none that we could compare.
func (g *guest) settleClock(ctx context.Context, key ed25519.PrivateKey, id sandbox.ID, now func() time.Time, said string) error {
	at, err := time.Parse(time.RFC3339Nano, said)
	if err != nil {
		return nil //nolint:nilerr // see above
	}
	for try := 0; try < clockTries && now().Sub(at) > clockLate; try++ {
		at = now()
		if err := g.thaw(ctx, key, id, at); err != nil {
			return fmt.Errorf("set the clock again: %w", err)
		}
	}
	return nil
}

func stamp(at time.Time) string { return at.UTC().Format(time.RFC3339Nano) }

// control makes a signed call. answer reads what comes back, and may be nil.
func (g *guest) control(ctx context.Context, key ed25519.PrivateKey, id sandbox.ID, now time.Time, path string, limit time.Duration, body any, answer func(io.Reader) error) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	res, err := g.do(ctx, http.MethodPost, path, bytes.NewReader(data), http.Header{
		"Content-Type":           {"application/json"},
		guestapi.HeaderSignature: {guestapi.Sign(key, string(id), http.MethodPost, path, now, data)},
	})
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }() // it was read as far as it matters
	if answer == nil {
		return nil
	}
	return answer(res.Body)
}

// maxControlAnswer bounds the answer to a control call, in bytes.
const maxControlAnswer = 1 << 20

// decodeIdentified reads the answer to an identify, and makes what a guest says of
// itself fit for logs: its root may have put anything in the agent's place.
func decodeIdentified(r io.Reader) (guestapi.Identified, error) {
	const most = 100
	var a guestapi.Identified
	if err := json.NewDecoder(io.LimitReader(r, maxControlAnswer)).Decode(&a); err != nil {
		return guestapi.Identified{}, sandbox.Errorf(sandbox.KindTransient, "the guest agent's answer to its identity: %s", printable(err.Error()))
	}
	a.Clock = printable(a.Clock)
	a.Warnings = a.Warnings[:min(most, len(a.Warnings))]
	for i, w := range a.Warnings {
		a.Warnings[i] = printable(w)
	}
	a.Hooks = a.Hooks[:min(most, len(a.Hooks))]
	for i, h := range a.Hooks {
		a.Hooks[i] = guestapi.Hook{Name: printable(h.Name), Error: printable(h.Error), Output: printable(h.Output), TookMs: h.TookMs}
	}
	return a, nil
}
