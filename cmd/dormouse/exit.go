package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// exitStatus is the table from an error's kind to an exit status. The README
// has it too.
var exitStatus = map[sandbox.Kind]int{
	sandbox.KindInternal:     1,
	sandbox.KindInvalid:      2,
	sandbox.KindNotFound:     3,
	sandbox.KindUnauthorized: 4,
	sandbox.KindExists:       5,
	sandbox.KindConflict:     5,
	sandbox.KindPaused:       5,
	sandbox.KindBusy:         6,
	sandbox.KindNoSpace:      6,
	sandbox.KindTooLarge:     6,
	sandbox.KindTimeout:      7,
	sandbox.KindUnsupported:  8,
	sandbox.KindTransient:    9,
	sandbox.KindUnanswered:   9,
}

// What run and exec answer when the status is not the command's own; the same
// numbers as timeout(1) and docker run.
const (
	exitTimedOut = 124
	exitNotRun   = 125
)

// hint says what to do next, where the message itself cannot.
func hint(err error) string {
	var answer *client.Error
	answered := errors.As(err, &answer)
	switch kind := sandbox.KindOf(err); {
	case kind == sandbox.KindUnauthorized && answered:
		return "check the key: dormouse login, or DORMOUSE_API_KEY"
	case kind == sandbox.KindTransient && !answered:
		return "is the server up? make up starts it, dormouse doctor says what is wrong"
	case kind == sandbox.KindBusy:
		return "destroy what is not needed (dormouse ls, dormouse rm), or try again later"
	}
	return ""
}

// interrupted is the cause of a context that a signal ended.
type interrupted struct{ signal syscall.Signal }

func (i interrupted) Error() string { return "interrupted: " + i.signal.String() }

// exitError carries an exit status through cobra; with a nil err there is
// nothing to say about it.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}
func (e *exitError) Unwrap() error { return e.err }

// exitCode is the process's exit status for the error of a command.
func exitCode(ctx context.Context, err error) int {
	var (
		exit   *exitError
		signal interrupted
	)
	switch {
	case err == nil:
		return 0
	case errors.As(context.Cause(ctx), &signal):
		return 128 + int(signal.signal)
	case errors.Is(err, syscall.EPIPE):
		return 128 + int(syscall.SIGPIPE)
	case errors.As(err, &exit):
		return exit.code
	case strings.HasPrefix(err.Error(), "unknown command"): // cobra's own, without a type
		return exitStatus[sandbox.KindInvalid]
	}
	return exitStatus[sandbox.KindOf(err)]
}

// complain prints an error as one sentence, with what to do next. Whoever
// pressed Ctrl-C or closed the pipe knows already.
func complain(w io.Writer, ctx context.Context, err error) {
	var (
		exit   *exitError
		signal interrupted
	)
	quiet := err == nil || errors.As(context.Cause(ctx), &signal) || errors.Is(err, syscall.EPIPE) ||
		errors.As(err, &exit) && exit.err == nil
	if quiet {
		return
	}
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	if next := hint(err); next != "" {
		text += " (" + next + ")"
	}
	_, _ = fmt.Fprintln(w, "dormouse:", text) // there is nowhere to report that to
}

// usage is an error about how a command was called.
func usage(cmd *cobra.Command, format string, a ...any) error {
	return sandbox.Errorf(sandbox.KindInvalid, format+" (see %s --help)", append(a, cmd.CommandPath())...)
}

// args makes what a check of positional arguments says an error of usage.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		if err := check(cmd, given); err != nil {
			return usage(cmd, "%w", err)
		}
		return nil
	}
}

// commandStatus is what run and exec exit with: the command's own status, and
// 128 plus the number of the signal that killed it.
func commandStatus(code int, status string, timedOut bool) int {
	if timedOut {
		return exitTimedOut
	}
	if name, ok := strings.CutPrefix(status, "signal: "); ok {
		name = strings.TrimSuffix(name, " (core dumped)")
		for n := 1; n < 65; n++ {
			if syscall.Signal(n).String() == name {
				return 128 + n
			}
		}
	}
	if code < 0 || code > 255 {
		return exitNotRun
	}
	return code
}
