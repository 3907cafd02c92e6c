package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
)

// silenceLimit is for how long a server may say nothing to somebody whose keyboard
// it has: it says something every 15 s.
const silenceLimit = time.Minute

// opener starts a command in a terminal, or finds one.
type opener func(ctx context.Context, opts client.TerminalOptions) (*client.Terminal, error)

// session joins a command in a terminal of a sandbox with the terminal that we have.
type session struct {
	in       *os.File // our keyboard; nil: nothing is typed
	ours     *os.File // whose size counts; nil: nobody's
	screen   *screen
	terminal *client.Terminal
	ended    atomic.Int32 // the signal that ended the session
}

// newSession looks at what we have. With -i our keyboard becomes the command's.
func newSession(cmd *cobra.Command, interactive bool) *session {
	s := &session{screen: &screen{w: cmd.OutOrStdout()}}
	for _, stream := range []any{cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()} {
		if f, ok := stream.(*os.File); ok && s.ours == nil && isTerminal(f) {
			s.ours = f
		}
	}
	if interactive {
		s.in, _ = cmd.InOrStdin().(*os.File) // execFlags.check has seen that it is one
	}
	return s
}

// run carries the session to its end, and leaves our terminal as it was.
func (s *session) run(ctx context.Context, open opener, keep bool) (client.Exit, error) {
	signals := make(chan os.Signal, 16) // from before the command runs: no change of the size is missed
	signal.Notify(signals, syscall.SIGWINCH, syscall.SIGTSTP, syscall.SIGCONT, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(signals)
	var err error
	s.terminal, err = open(ctx, client.TerminalOptions{Size: s.size(), Output: s, Keep: keep, Patience: silenceLimit})
	if err != nil {
		return client.Exit{}, err
	}
	defer func() { _ = s.terminal.Close() }() // never fails; Wait has the error
	var raw *rawMode
	if s.in != nil {
		if raw, err = newRawMode(s.in); err != nil {
			return client.Exit{}, fmt.Errorf("make the terminal raw: %w", err)
		}
		defer raw.close()
		go guarded(s.typing)
	}
	over := make(chan struct{})
	defer close(over)
	go guarded(func() { s.obey(signals, over, raw) })
	exit, err := s.terminal.Wait()
	if raw != nil {
		raw.close()
	}
	s.cleanUp(exit, err)
	if n := s.ended.Load(); err != nil && n != 0 {
		err = &exitError{code: 128 + int(n)}
	}
	return exit, err
}

// size is that of our terminal; nil if it has none, or does not know it.
func (s *session) size() *api.TerminalSize {
	if s.ours == nil {
		return nil
	}
	cols, rows, err := term.GetSize(int(s.ours.Fd()))
	if err != nil || cols < 1 || rows < 1 {
		return nil
	}
	return &api.TerminalSize{Cols: cols, Rows: rows}
}

// Write shows what the command shows.
func (s *session) Write(p []byte) (n int, err error) {
	guarded(func() {
		if err = fault.Point(context.Background(), "terminal/show"); err == nil {
			n, err = s.screen.Write(p)
		}
	})
	return n, err
}

// typing sends what is typed, until the command has ended or our terminal has gone.
func (s *session) typing() {
	buf := make([]byte, 4096)
	for {
		n, err := s.in.Read(buf)
		if err == nil {
			err = fault.Point(context.Background(), "terminal/type")
		}
		if err != nil {
			s.end(syscall.SIGHUP)
			return
		}
		if _, err := s.terminal.Write(buf[:n]); err != nil {
			return // it has ended, and Wait says how
		}
	}
}

// end ends the session for a signal; one that has ended by itself does not care.
func (s *session) end(number syscall.Signal) {
	if s.ended.CompareAndSwap(0, int32(number)) {
		_ = s.terminal.Close() // never fails
	}
}

// obey does what signals ask for. Those that a keyboard sends do not come from ours:
// they are bytes to the command.
func (s *session) obey(signals <-chan os.Signal, over <-chan struct{}, raw *rawMode) {
	for {
		var number os.Signal
		select {
		case <-over:
			return
		case number = <-signals:
		}
		switch number {
		case syscall.SIGWINCH:
			s.resize()
		case syscall.SIGTSTP:
			restoreTerminal()
			_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP) // it goes on here, with SIGCONT
		case syscall.SIGCONT:
			if raw != nil {
				_ = raw.enter() // a terminal that is not ours any more stays as it is
			}
			s.resize()
		case syscall.SIGHUP:
			s.end(syscall.SIGHUP)
		case syscall.SIGQUIT:
			s.end(syscall.SIGQUIT)
		}
	}
}

func (s *session) resize() {
	if size := s.size(); size != nil {
		_ = s.terminal.Resize(*size) // a command that has ended needs no size
	}
}

// cleanUp switches off on our terminal what the command had switched on and could
// not switch off any more.
func (s *session) cleanUp(exit client.Exit, err error) {
	killed := strings.HasPrefix(exit.Status, "signal: ")
	if !isTerminal(s.screen.w) || err == nil && !killed {
		return
	}
	text := s.screen.undo()
	if err != nil {
		text += "\x1b[0m\n" // whatever comes next begins on a line of its own
	}
	_, _ = io.WriteString(s.screen.w, text) // there is nowhere to report that to
}

// execTerminal runs a command in a terminal. Without a command it is the login shell.
func execTerminal(cmd *cobra.Command, c *client.Client, id string, req api.Exec, flags execFlags) (client.Exit, error) {
	if name := os.Getenv("TERM"); name != "" && req.Env["TERM"] == "" {
		env := map[string]string{"TERM": name}
		for k, v := range req.Env {
			env[k] = v
		}
		req.Env = env
	}
	return runSession(cmd, c, id, flags, func(ctx context.Context, opts client.TerminalOptions) (*client.Terminal, error) {
		return c.OpenTerminal(ctx, id, req, opts)
	})
}

func runSession(cmd *cobra.Command, c *client.Client, id string, flags execFlags, open opener) (client.Exit, error) {
	s := newSession(cmd, flags.interactive)
	exit, err := s.run(cmd.Context(), open, flags.keep)
	if s.ended.Load() == 0 {
		err = explain(cmd.Context(), c, id, err)
	}
	if err != nil && flags.keep && s.terminal != nil {
		cmd.PrintErrf("dormouse: the command goes on, if its sandbox does: dormouse attach %s %d\n", id, s.terminal.PID())
	}
	return exit, err
}
