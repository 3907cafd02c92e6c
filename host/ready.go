package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// What a health check leaves open means what it means to Docker.
const (
	checkInterval = 30 * time.Second
	checkTimeout  = 30 * time.Second
	checkRetries  = 3
	checkMost     = 24 * time.Hour // of each time: an image may say anything
)

// While a create waits, the check is not asked only once in an interval: it is to
// be over when the program is ready. These are the pauses between two tries.
const (
	firstPause = 50 * time.Millisecond
	mostPause  = 2 * time.Second
)

// check is a health check with nothing left open.
type check struct {
	command                        Command
	interval, timeout, startPeriod time.Duration
	retries                        int
}

// healthcheck is how a plan's template says that it is ready; nil if it does not.
func healthcheck(p plan) *check {
	c := p.image.Config
	if p.noStart || p.entry.Build || c == nil || c.Healthcheck == nil {
		return nil
	}
	h := c.Healthcheck
	argv := testCommand(h.Test, c.Shell)
	if len(argv) == 0 {
		return nil
	}
	out := &check{
		command:  Command{Cmd: argv[0], Args: argv[1:]},
		interval: orElse(h.Interval, checkInterval), timeout: orElse(h.Timeout, checkTimeout), startPeriod: orElse(h.StartPeriod, 0),
		retries: checkRetries,
	}
	if h.Retries > 0 {
		out.retries = h.Retries
	}
	return out
}

func orElse(given, def time.Duration) time.Duration {
	if given <= 0 {
		return def
	}
	return min(given, checkMost)
}

// testCommand makes a program and its arguments of a check's words. What is of no
// known kind is no check, as with NONE.
func testCommand(test, shell []string) []string {
	if len(test) < 2 {
		return nil
	}
	switch test[0] {
	case "CMD":
		return test[1:]
	case "CMD-SHELL":
		if len(shell) == 0 {
			shell = []string{"/bin/sh", "-c"}
		}
		return append(append([]string(nil), shell...), test[1])
	}
	return nil
}

// awaitReady asks until the check succeeds. It has failed when Docker would call it
// unhealthy: after so many failures in a row, each an interval after the one
// before, that were not in the start period. What fails in between does not count.
func (s *startup) awaitReady(ctx context.Context, c check) error {
	if err := fault.Point(ctx, "host/create/ready"); err != nil {
		return err
	}
	limit := s.a.cfg.ReadyTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errNotReadyYet)
	defer cancel()
	counts := time.Now().Add(c.startPeriod + c.interval) // the next failure that does
	last := "it did not answer"
	for failures, pause := 0, firstPause; ; pause = max(firstPause, min(2*pause, mostPause, c.interval)) {
		why, err := s.probe(ctx, c)
		if why == "" && err == nil {
			return nil
		}
		if err == nil {
			last = why
		} else if ctx.Err() == nil {
			last = printable(err.Error())
		}
		if now := time.Now(); !now.Before(counts) {
			failures, counts = failures+1, now.Add(c.interval)
		}
		if ctx.Err() == nil && failures < c.retries {
			sleep(ctx, pause)
		}
		switch {
		case context.Cause(ctx) == errNotReadyYet:
			return s.notReady("has not succeeded within %v, the most that a create waits; at last: %s", limit, last)
		case ctx.Err() != nil:
			return fmt.Errorf("wait for the health check: %w", context.Cause(ctx))
		case failures >= c.retries:
			return s.notReady("has failed %d times; at last: %s", failures, last)
		}
	}
}

var errNotReadyYet = errors.New("the health check takes too long")

func (s *startup) notReady(format string, args ...any) error {
	text := fmt.Sprintf(format, args...) + s.output.end("\nthe output of the start command ends with:\n")
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended != "" {
		text += "\nthe start command has ended: " + s.ended
	}
	return sandbox.WithKind(sandbox.KindTimeout, withCause(sandbox.CauseNotReady, "the health check %s", text))
}

// probe runs the check once. Why is empty when it has succeeded.
func (s *startup) probe(ctx context.Context, c check) (why string, err error) {
	c.command.Timeout = c.timeout
	process, err := s.g.run(ctx, c.command)
	if err != nil {
		return "", err
	}
	var output tail
	end, err := process.Output(output.add)
	process.Finish(err == nil || ctx.Err() != nil) // a machine that is given up needs no killing in it
	switch {
	case err != nil:
		return "", err
	case end.TimedOut:
		return fmt.Sprintf("it took longer than %v%s", c.timeout, output.end(", its output ends with:\n")), nil
	case !succeeded(end):
		return end.Status + output.end(", its output ends with:\n"), nil
	}
	return "", nil
}

func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
