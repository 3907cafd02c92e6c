package agent

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// minEntropy is how much of it, in bytes, makes a copy differ from all others.
const minEntropy = 32

// hostTime is the host's time at a moment of ours.
type hostTime struct{ host, ours time.Time }

// now is the host's time of now. It does not look at the clock that is to be set.
func (t hostTime) now() time.Time { return t.host.Add(time.Since(t.ours)) }

func (a *Agent) serveRestored(w http.ResponseWriter, r *http.Request, init guestapi.Init, at hostTime) {
	if at.host.IsZero() || len(init.Entropy) < minEntropy {
		writeControlError(w, sandbox.Errorf(sandbox.KindInvalid,
			"a restored machine needs a timestamp and %d bytes of entropy", minEntropy))
		return
	}
	answer, err := a.identify(r.Context(), init, at)
	if err != nil {
		writeControlError(w, err)
		return
	}
	writeJSON(w, answer)
}

// identify is the /init of a machine that was restored. After an error user
// processes stand still, and it is still who it was.
func (a *Agent) identify(ctx context.Context, init guestapi.Init, at hostTime) (guestapi.Identified, error) {
	if err := a.still.take(ctx); err != nil {
		return guestapi.Identified{}, err
	}
	defer a.still.give()
	out := guestapi.Identified{Frozen: a.still.holds}
	if err := a.freezeLate(ctx); err != nil {
		return out, err
	}
	alone := init.Unused && a.still.idle // nobody has a connection
	out.Frozen = out.Frozen || alone
	if a.cfg.Machine != nil {
		if err := a.applyMachine(init, at.now()); err != nil {
			return out, err
		}
		a.leavePast(init, alone, &out)
	}
	if !init.Rehearsal {
		a.era.end(ctx)
	}
	if err := a.cfg.Identity.Apply(init, true); err != nil {
		return out, err
	}
	if a.cfg.Hooks != nil && !init.Rehearsal { // who this is stands by now: nothing of it depends on the caller any more
		out.Hooks = a.cfg.Hooks(context.WithoutCancel(ctx), a.cfg.Identity.Get())
	}
	if err := a.thawLocked(); err != nil {
		return out, err
	}
	out.Clock = time.Now().UTC().Format(time.RFC3339Nano)
	return out, nil
}

// freezeLate freezes what should have been frozen when the machine was saved, as
// far as it can be.
func (a *Agent) freezeLate(ctx context.Context) error {
	if a.still.holds || a.cfg.Freezer == nil {
		return nil
	}
	if err := a.freezeLocked(ctx, guestapi.FreezeWithin); err != nil {
		return err
	}
	a.still.life = ""
	return nil
}

// leavePast does what an image or a kernel may not be able to.
func (a *Agent) leavePast(init guestapi.Init, alone bool, out *guestapi.Identified) {
	warn := func(what string, err error) {
		if err != nil {
			out.Warnings = append(out.Warnings, fmt.Sprintf("%s: %s", what, strings.ReplaceAll(err.Error(), "\n", "; ")))
		}
	}
	if init.NewMachineID {
		warn("make a new machine ID", a.cfg.Machine.NewMachineID())
	}
	if !alone {
		var err error
		out.Dropped, err = a.cfg.Machine.EndPast()
		warn("end connections of the past", err)
	}
}
