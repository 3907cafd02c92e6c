package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/identity"
)

// maxInit bounds the body of /init, in bytes.
const maxInit = 1 << 20

// serveInit takes over an identity.
func (a *Agent) serveInit(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxInit))
	if err != nil {
		guestapi.WriteError(w, http.StatusBadRequest, fmt.Sprintf("read the body: %v", err))
		return
	}
	signed := a.cfg.Verifier != nil
	if signed {
		if err := a.cfg.Verifier.Verify(r.Header.Get(guestapi.HeaderSignature), r.Method, r.URL.Path, body); err != nil {
			guestapi.WriteError(w, http.StatusUnauthorized, err.Error())
			return
		}
	}
	var init guestapi.Init
	var at time.Time
	if len(body) > 0 {
		err = json.Unmarshal(body, &init)
	}
	if err == nil && init.Timestamp != "" {
		at, err = time.Parse(time.RFC3339Nano, init.Timestamp)
	}
	if err != nil {
		guestapi.WriteError(w, http.StatusBadRequest, fmt.Sprintf("body: %v", err))
		return
	}
	if err := a.cfg.Identity.Apply(init, signed); err != nil {
		status := http.StatusInternalServerError
		if errors.Is(err, identity.ErrToken) {
			status = http.StatusUnauthorized
		}
		guestapi.WriteError(w, status, err.Error())
		return
	}
	if signed && a.cfg.Machine != nil {
		if err := a.applyMachine(init, at); err != nil {
			guestapi.WriteError(w, http.StatusInternalServerError, err.Error())
			return
		}
	}
	w.WriteHeader(http.StatusNoContent)
}

// applyMachine tries all of it and joins what went wrong.
func (a *Agent) applyMachine(init guestapi.Init, at time.Time) error {
	var errs []error
	step := func(name string, wanted bool, do func() error) {
		if !wanted {
			return
		}
		if err := do(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	m := a.cfg.Machine
	step("mix in entropy", len(init.Entropy) > 0, func() error { return m.AddEntropy(init.Entropy) })
	step("set the clock", !at.IsZero(), func() error { return m.SetClock(at) })
	step("set the hostname", init.Hostname != "", func() error { return m.SetHostname(init.Hostname) })
	return errors.Join(errs...)
}
