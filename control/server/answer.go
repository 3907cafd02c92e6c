package server

import (
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// errAborted says that an answer had begun and cannot be finished.
var errAborted = errors.New("answer aborted")

// aboutSandbox is an error of a create, which names what was being created.
type aboutSandbox struct {
	id  sandbox.ID
	err error
}

func (e *aboutSandbox) Error() string { return e.err.Error() }
func (e *aboutSandbox) Unwrap() error { return e.err }

// detail is what a client is told. Errors of ours that nobody gave a kind stay
// in the log: they may hold paths, statements, or another caller's data.
func detail(err error, request string) api.ErrorDetail {
	d := api.ErrorDetail{Code: string(sandbox.KindOf(err)), Message: err.Error()}
	var shown *told
	if d.Code == string(sandbox.KindInternal) && !errors.As(err, &shown) {
		d.Message = "something went wrong inside the server; its log has it under request " + request
	}
	var about *aboutSandbox
	if errors.As(err, &about) {
		d.SandboxID = string(about.id)
	}
	return d
}

// fail answers with an error.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, errAborted) {
		panic(http.ErrAbortHandler)
	}
	d := detail(err, requestID(r))
	status := api.Status(sandbox.Kind(d.Code))
	if errors.Is(err, errMediaType) {
		status = http.StatusUnsupportedMediaType
	}
	switch sandbox.Kind(d.Code) {
	case sandbox.KindInternal:
		if r.Context().Err() == nil {
			s.cfg.Log.Error("internal error", "request", requestID(r), "op", r.Pattern, "sandbox", sandboxOf(r), "err", err)
		}
	case sandbox.KindUnauthorized:
		w.Header().Set("WWW-Authenticate", "Bearer")
	case sandbox.KindBusy, sandbox.KindTransient:
		w.Header().Set("Retry-After", "1")
	}
	writeJSON(w, status, api.Error{Error: d})
}

// writeJSON answers with a value. It is the last thing a handler does.
func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // our own types can always be encoded
	}
	writeText(w, status, append(b, '\n'))
}

// restLimit is how long a client may take to send what nobody reads.
const restLimit = 2 * time.Second

// writeText answers with JSON. Before the first byte net/http reads what is left
// of the request's body, without a limit of its own: a client that announces one
// and does not send it would keep the connection for ever, and it needs no key.
// Where nothing is left there is no limit to set: net/http waits in the background
// for the next request then, takes a deadline that passes meanwhile for the end of
// the client, and gives all later requests of the connection a context that has
// ended.
func writeText(w http.ResponseWriter, status int, text []byte) {
	if unread(w) {
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(restLimit)) // tests' recorders have no connection
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(text) // a client that went away is nobody's error
}

func ok(w http.ResponseWriter, v any) error {
	writeJSON(w, http.StatusOK, v)
	return nil
}
