package sandbox

import (
	"context"
	"errors"
	"fmt"
	"syscall"
)

// Kind says what sort of error something is, from the caller's side. One table
// in api maps it to an HTTP status, another in the CLI to an exit status.
type Kind string

// The kinds. Internal is what an error without a kind counts as.
const (
	KindInvalid      Kind = "invalid"      // the request itself is wrong; repeating it will not help
	KindUnauthorized Kind = "unauthorized" // no key, or a wrong one
	KindNotFound     Kind = "not_found"    // no such thing
	KindExists       Kind = "exists"       // the name is taken
	KindConflict     Kind = "conflict"     // the thing is in a state that does not allow this
	KindPaused       Kind = "paused"       // the sandbox is paused: resume it first
	KindBusy         Kind = "busy"         // out of some capacity for now; retry later
	KindTooLarge     Kind = "too_large"    // the body is over its bound
	KindNoSpace      Kind = "no_space"     // a disk is full: the host's or the sandbox's
	KindTimeout      Kind = "timeout"      // it took longer than it was allowed to
	KindUnsupported  Kind = "unsupported"  // this machine or this build cannot do it
	KindTransient    Kind = "transient"    // a part of the system does not answer right now; retry
	KindUnanswered   Kind = "unanswered"   // nothing answers at that port of the sandbox, or nothing that makes sense
	KindInternal     Kind = "internal"     // our fault
)

// Kinds lists every kind, for tables that must be complete.
func Kinds() []Kind {
	return []Kind{
		KindInvalid, KindUnauthorized, KindNotFound, KindExists, KindConflict, KindPaused, KindBusy, KindTooLarge,
		KindNoSpace, KindTimeout, KindUnsupported, KindTransient, KindUnanswered, KindInternal,
	}
}

// Error is an error with a Kind. Its message is a sentence for the caller.
type Error struct {
	Kind Kind
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an error of the given kind; %w works as in fmt.Errorf.
func Errorf(kind Kind, format string, args ...any) error {
	return &Error{Kind: kind, Err: fmt.Errorf(format, args...)}
}

// WithKind gives err a kind, keeping its message. A nil error stays nil.
func WithKind(kind Kind, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Kind: kind, Err: err}
}

// DiskFull reports whether err is the operating system's word for a disk without
// room, or for a quota that is used up.
func DiskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// NoSpace gives the error of a full disk its kind, and leaves every other one.
func NoSpace(err error) error {
	if DiskFull(err) {
		return WithKind(KindNoSpace, err)
	}
	return err
}

// KindOf finds the outermost kind in err's chain. An expired context counts as
// a timeout; what has no kind is internal.
func KindOf(err error) Kind {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e.Kind
	case errors.Is(err, context.DeadlineExceeded):
		return KindTimeout
	case errors.Is(err, context.Canceled):
		return KindTransient
	}
	return KindInternal
}

// Is reports whether err is of the given kind.
func Is(err error, kind Kind) bool { return err != nil && KindOf(err) == kind }
