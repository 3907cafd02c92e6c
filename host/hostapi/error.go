// Package hostapi is the contract between control and a host agent: the
// generated service, and how errors keep their Kind across it.
package hostapi

import (
	"errors"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// kindHeader carries a Kind that has no code of its own.
const kindHeader = "Dormouse-Error-Kind"

var codes = map[sandbox.Kind]connect.Code{
	sandbox.KindInvalid:      connect.CodeInvalidArgument,
	sandbox.KindUnauthorized: connect.CodeUnauthenticated,
	sandbox.KindNotFound:     connect.CodeNotFound,
	sandbox.KindExists:       connect.CodeAlreadyExists,
	sandbox.KindConflict:     connect.CodeFailedPrecondition,
	sandbox.KindPaused:       connect.CodeFailedPrecondition,
	sandbox.KindBusy:         connect.CodeResourceExhausted,
	sandbox.KindTooLarge:     connect.CodeOutOfRange,
	sandbox.KindNoSpace:      connect.CodeResourceExhausted,
	sandbox.KindTimeout:      connect.CodeDeadlineExceeded,
	sandbox.KindUnsupported:  connect.CodeUnimplemented,
	sandbox.KindTransient:    connect.CodeUnavailable,
	sandbox.KindUnanswered:   connect.CodeUnavailable,
	sandbox.KindInternal:     connect.CodeInternal,
}

// ToConnect makes an error ready to cross the wire. A nil error stays nil.
func ToConnect(err error) error {
	if err == nil {
		return nil
	}
	var already *connect.Error
	if errors.As(err, &already) {
		return err
	}
	kind := sandbox.KindOf(err)
	out := connect.NewError(codes[kind], err)
	out.Meta().Set(kindHeader, string(kind))
	return out
}

// Answered says whether an error that came over the wire is the host's own word,
// that what it was asked for has not come about. Anything else, a lost connection
// or a limit that was over, leaves open what the host does.
func Answered(err error) bool {
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return false
	}
	switch sandbox.Kind(ce.Meta().Get(kindHeader)) {
	case "", sandbox.KindTransient, sandbox.KindTimeout:
		return false
	}
	return true
}

// FromConnect gives an error that came over the wire its Kind back.
func FromConnect(err error) error {
	if err == nil {
		return nil
	}
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return err
	}
	message := errors.New(ce.Message())
	if kind := sandbox.Kind(ce.Meta().Get(kindHeader)); kind != "" {
		if _, known := codes[kind]; known {
			return sandbox.WithKind(kind, message)
		}
	}
	for _, kind := range sandbox.Kinds() {
		if codes[kind] == ce.Code() {
			return sandbox.WithKind(kind, message)
		}
	}
	if ce.Code() == connect.CodeCanceled {
		return sandbox.WithKind(sandbox.KindTransient, message)
	}
	return sandbox.WithKind(sandbox.KindInternal, message)
}
