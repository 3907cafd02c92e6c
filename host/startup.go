package host

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// startRecord is the name under which the guest keeps what a start command says:
// nobody follows it once the create is over.
const startRecord = "start"

// outputKept is how much of an output's end is in an error, in bytes.
const outputKept = 1000

// startUp runs what a template's image runs by itself, and returns when its health
// check, if it has one, succeeds. The command goes on, whoever follows it or not.
func (a *Agent) startUp(ctx context.Context, m *machine, g *guest, p plan, watch *stopwatch) error {
	command, check := startCommand(p), healthcheck(p)
	if command == nil && check == nil {
		return nil
	}
	ctx, stop := a.whileRuns(ctx, m)
	defer stop()
	s := &startup{a: a, g: g}
	ctx, s.fail = context.WithCancelCause(ctx)
	defer s.fail(nil)
	if command != nil {
		if err := s.start(ctx, *command); err != nil {
			return err
		}
		defer s.letGo()
		watch.lap("start")
	}
	if check == nil {
		return nil
	}
	err := s.awaitReady(ctx, *check)
	watch.lap("ready")
	return err
}

// startCommand is what a plan's template starts by itself; nil for nothing.
func startCommand(p plan) *Command {
	c := p.image.Config
	if p.noStart || p.entry.Build || c == nil || len(c.Start) == 0 {
		return nil
	}
	return &Command{Cmd: c.Start[0], Args: c.Start[1:], record: startRecord}
}

// whileRuns returns a context that ends with the machine's VM, too, and when the
// host's disk is nearly full: what runs in a sandbox that is being created can
// write, and is not frozen.
func (a *Agent) whileRuns(ctx context.Context, m *machine) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		tick := time.NewTicker(spaceTick)
		defer tick.Stop()
		for ctx.Err() == nil {
			select {
			case <-m.vm.Done():
				exit := a.exitOf(m.id, m.vm)
				cancel(withCause(exit.Cause, "the VM ended: %s%s", printable(exit.Detail), m.consoleTail()))
			case <-tick.C:
				if free, err := a.cfg.FreeBytes(a.cfg.Dir); err == nil && a.spaceOf(free) >= little {
					cancel(sandbox.Errorf(sandbox.KindNoSpace, "the host has less than %d MiB of free disk", a.cfg.ReserveMiB))
				}
			case <-ctx.Done():
			}
		}
	}()
	return ctx, func() { cancel(nil) }
}

// startup is one start under way.
type startup struct {
	a    *Agent
	g    *guest
	fail context.CancelCauseFunc // ends the wait with an error

	process *Process
	output  tail
	done    chan struct{} // closed when nobody follows the command any more

	mu    sync.Mutex
	ended string // how the command has ended; empty: it has not, or there is none
}

func (s *startup) start(ctx context.Context, c Command) error {
	if err := fault.Point(ctx, "host/create/start"); err != nil {
		return err
	}
	process, err := s.g.run(ctx, c)
	if err != nil {
		return s.notStarted(ctx, c, err)
	}
	s.process, s.done = process, make(chan struct{})
	go func() {
		defer close(s.done)
		end, err := process.Output(s.output.add)
		if err != nil {
			return
		}
		s.mu.Lock()
		s.ended = end.Status
		s.mu.Unlock()
		if !succeeded(end) {
			s.fail(sandbox.WithKind(sandbox.KindInvalid, withCause(sandbox.CauseStartFailed, "the start command ended before it was ready: %s%s",
				end.Status, s.output.end("; its output ends with:\n"))))
		}
	}()
	return nil
}

// notStarted tells a command that is none from a guest that does not answer.
func (s *startup) notStarted(ctx context.Context, c Command, err error) error {
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("start command: %w", context.Cause(ctx))
	case sandbox.Is(err, sandbox.KindTransient):
		return fmt.Errorf("start command: %w", err)
	}
	return sandbox.WithKind(sandbox.KindInvalid, withCause(sandbox.CauseStartFailed, "the start command %.200q cannot be started: %s", c.Cmd, printable(err.Error())))
}

// run starts a command on a guest that is not open to callers yet.
func (g *guest) run(ctx context.Context, c Command) (*Process, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	return launch(ctx, ctx, &Process{g: g, gone: context.WithoutCancel(ctx), user: c.User, cancel: func() {}, done: func() {}},
		func(caller context.Context, r *Process) error { return r.start(caller, c, false) })
}

// letGo leaves the command to itself.
func (s *startup) letGo() {
	s.process.Finish(true)
	<-s.done
}

func succeeded(end ExecEnd) bool { return end.Exited && end.ExitCode == 0 }

// tail is the end of an output.
type tail struct {
	mu   sync.Mutex
	text []byte
}

func (t *tail) add(stdout, stderr []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(append(t.text, stdout...), stderr...)
	if over := len(t.text) - outputKept; over > 0 {
		t.text = append([]byte(nil), t.text[over:]...) // what is cut off is to be freed
	}
	return nil
}

// end is the output behind a text, or nothing if there is none.
func (t *tail) end(text string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if out := strings.TrimSpace(printable(strings.ToValidUTF8(string(t.text), ""))); out != "" {
		return text + out
	}
	return ""
}
