package agent

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// maxControl bounds the body of a control call, in bytes.
const maxControl = 1 << 20

// controlBody reads the body of a control call and checks that the host signed it.
// An agent without the host's key has signed say that. When ok is not true the
// call is answered.
func (a *Agent) controlBody(w http.ResponseWriter, r *http.Request, into any) (signed, ok bool) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxControl))
	if err != nil {
		guestapi.WriteError(w, http.StatusBadRequest, fmt.Sprintf("read the body: %v", err))
		return false, false
	}
	signed = a.cfg.Verifier != nil
	if signed {
		id := a.cfg.Identity.Get().SandboxID
		if err := a.cfg.Verifier.Verify(r.Header.Get(guestapi.HeaderSignature), id, r.Method, r.URL.Path, body); err != nil {
			guestapi.WriteError(w, http.StatusUnauthorized, err.Error())
			return false, false
		}
	}
	if len(body) > 0 {
		if err := json.Unmarshal(body, into); err != nil {
			guestapi.WriteError(w, http.StatusBadRequest, fmt.Sprintf("body: %v", err))
			return false, false
		}
	}
	return signed, true
}

// hostOnly reads what an agent without the host's key does not take at all.
func (a *Agent) hostOnly(w http.ResponseWriter, r *http.Request, into any) (ok bool) {
	if a.cfg.Verifier == nil {
		guestapi.WriteError(w, http.StatusUnauthorized, "this agent has no key of a host")
		return false
	}
	_, ok = a.controlBody(w, r, into)
	return ok
}

// parseTime reads a timestamp; none is the zero time.
func parseTime(text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	at, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return at, sandbox.Errorf(sandbox.KindInvalid, "body: %w", err)
	}
	return at, nil
}

// writeControlError answers with the status that the host knows the error's kind by.
func writeControlError(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	switch sandbox.KindOf(err) {
	case sandbox.KindInvalid:
		status = http.StatusBadRequest
	case sandbox.KindUnauthorized:
		status = http.StatusUnauthorized
	case sandbox.KindConflict:
		status = http.StatusConflict
	case sandbox.KindTimeout:
		status = http.StatusGatewayTimeout
	case sandbox.KindUnsupported:
		status = http.StatusNotImplemented
	}
	guestapi.WriteError(w, status, err.Error())
}

// servePowerOff ends the machine: its processes are killed, and what they have
// written is on the disk before the VM is gone. The answer comes before that.
func (a *Agent) servePowerOff(w http.ResponseWriter, r *http.Request) {
	if a.cfg.Verifier == nil || a.cfg.PowerOff == nil {
		guestapi.WriteError(w, http.StatusNotImplemented, "this agent is not a machine's")
		return
	}
	if ok := a.hostOnly(w, r, &struct{}{}); !ok {
		return
	}
	w.WriteHeader(http.StatusNoContent)
	_ = http.NewResponseController(w).Flush() // who has gone sees the VM's end
	a.cfg.PowerOff()
}
