package client

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Error is an answer of the server that is an error. sandbox.KindOf finds its
// Kind.
type Error struct {
	Kind      sandbox.Kind
	Message   string
	Status    int    // of HTTP; 0 when it arrived inside a stream
	SandboxID string // of a create that failed, and still can be asked about
	RequestID string // what the server's log calls the request
}

func (e *Error) Error() string {
	if e.Kind == sandbox.KindInternal && e.RequestID != "" {
		return e.Message + " (request " + e.RequestID + ")"
	}
	return e.Message
}

// Unwrap makes the Kind visible to sandbox.KindOf.
func (e *Error) Unwrap() error {
	return &sandbox.Error{Kind: e.Kind, Err: errors.New(e.Message)}
}

// readError makes an error of an answer, also of one that a proxy in between
// wrote and that is not ours.
func readError(resp *http.Response) error {
	const most = 64 << 10
	e := &Error{Status: resp.StatusCode, RequestID: resp.Header.Get(api.HeaderRequestID)}
	body, err := io.ReadAll(io.LimitReader(resp.Body, most))
	var answer api.Error
	if err == nil {
		err = json.Unmarshal(body, &answer)
	}
	if err == nil && answer.Error.Code != "" {
		e.fill(answer.Error)
		return e
	}
	e.Kind = kindOfStatus(resp.StatusCode)
	e.Message = "the server answered " + resp.Status
	return e
}

func (e *Error) fill(d api.ErrorDetail) {
	e.Kind, e.Message, e.SandboxID = sandbox.Kind(d.Code), d.Message, d.SandboxID
}

// kindOfStatus guesses the kind of an answer that does not name it.
func kindOfStatus(status int) sandbox.Kind {
	for _, kind := range sandbox.Kinds() {
		if api.Status(kind) == status {
			return kind
		}
	}
	switch {
	case status == http.StatusForbidden:
		return sandbox.KindUnauthorized
	case status == http.StatusBadGateway:
		return sandbox.KindTransient
	case status >= 400 && status < 500:
		return sandbox.KindInvalid
	}
	return sandbox.KindInternal
}
