package agent

import (
	"errors"
	"net/http"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/identity"
)

// serveInit takes over an identity.
func (a *Agent) serveInit(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	var init guestapi.Init
	signed, ok := a.controlBody(w, r, &init)
	if !ok {
		return
	}
	at, err := parseTime(init.Timestamp)
	if err != nil {
		writeControlError(w, err)
		return
	}
	if signed && init.Restored {
		a.serveRestored(w, r, init, hostTime{at, began})
		return
	}
	if err := a.introduce(init, at, signed); err != nil {
		status := http.StatusInternalServerError
		if errors.Is(err, identity.ErrToken) {
			status = http.StatusUnauthorized
		}
		guestapi.WriteError(w, status, err.Error())
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// introduce is the /init of a machine that was booted. What it changes of the
// machine needs a signature.
func (a *Agent) introduce(init guestapi.Init, at time.Time, signed bool) error {
	if err := a.cfg.Identity.Apply(init, signed); err != nil {
		return err
	}
	if !signed || a.cfg.Machine == nil {
		return nil
	}
	if init.NewMachineID {
		if err := a.cfg.Machine.NewMachineID(); err != nil {
			a.cfg.Log.Warn("make a new machine ID", "err", err) // a read-only /etc is tolerated
		}
	}
	return a.applyMachine(init, at)
}

// applyMachine tries all of it and joins what went wrong.
func (a *Agent) applyMachine(init guestapi.Init, at time.Time) error {
	m := a.cfg.Machine
	var errs []error
	if !at.IsZero() {
		errs = append(errs, named("set the clock", m.SetClock(at)))
	}
	if len(init.Entropy) > 0 {
		errs = append(errs, named("mix in entropy", m.AddEntropy(init.Entropy)))
	}
	if init.Hostname != "" {
		errs = append(errs, named("set the hostname", m.SetHostname(init.Hostname)))
	}
	return errors.Join(errs...)
}
