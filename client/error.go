package client

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"

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
	Step      string // of a build that failed: where
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
	e := &Error{
		Kind: kindOfStatus(resp.StatusCode), Status: resp.StatusCode, Message: "the server answered " + resp.Status,
		RequestID: resp.Header.Get(api.HeaderRequestID),
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, most))
	var answer api.Error
	if err == nil {
		err = json.Unmarshal(body, &answer)
	}
	if err == nil && answer.Error.Code != "" {
		e.fill(answer.Error)
	}
	return e
}

// fill takes over what a server says. One that is newer may have kinds that are
// not known here; what e holds then stands for them.
func (e *Error) fill(d api.ErrorDetail) {
	if kind := sandbox.Kind(d.Code); slices.Contains(sandbox.Kinds(), kind) {
		e.Kind = kind
	}
	if d.Message != "" {
		e.Message = d.Message
	}
	e.SandboxID, e.Step = d.SandboxID, d.Step
}

// kindOfStatus guesses the kind of an answer that does not name it.
func kindOfStatus(status int) sandbox.Kind {
	if status == http.StatusBadGateway { // not unanswered: that is for what runs in a sandbox
		return sandbox.KindTransient
	}
	for _, kind := range sandbox.Kinds() {
		if api.Status(kind) == status {
			return kind
		}
	}
	switch {
	case status == http.StatusForbidden:
		return sandbox.KindUnauthorized
	case status >= 400 && status < 500:
		return sandbox.KindInvalid
	}
	return sandbox.KindInternal
}
