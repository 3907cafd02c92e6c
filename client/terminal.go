package client

import (
	"context"
	"io"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
)

// TerminalOptions is what a terminal is connected to.
type TerminalOptions struct {
	// Size is what fits into it; nil is 80 by 24, or as it is.
	Size *api.TerminalSize
	// Output gets what is shown, from one goroutine. A writer that blocks holds the
	// command back; one that fails ends the stream. Nil discards.
	Output io.Writer
	// Keep lets the command go on when its stream ends.
	Keep bool
	// Patience is for how long the server may say nothing; one that lives says
	// something every 15 s. Zero waits for ever.
	Patience time.Duration
}

// Terminal is a command in a terminal. Its methods may be called concurrently.
type Terminal struct{ s *Stream }

// OpenTerminal starts a command in a terminal and returns once it runs; an empty
// request is the login shell of the user. The context bounds the stream: when it
// ends, or after Close, the server kills the command, unless it is kept. The caller
// must Wait or Close.
func (c *Client) OpenTerminal(ctx context.Context, id string, req api.Exec, opts TerminalOptions) (*Terminal, error) {
	return c.terminal(ctx, id, opts, api.StreamMessage{Type: api.StreamStart, Exec: &req, Size: opts.Size, Keep: opts.Keep})
}

// ConnectTerminal follows a command in a terminal from now on; it is always kept.
func (c *Client) ConnectTerminal(ctx context.Context, id string, pid uint32, opts TerminalOptions) (*Terminal, error) {
	return c.terminal(ctx, id, opts, api.StreamMessage{Type: api.StreamConnect, PID: pid, Size: opts.Size})
}

func (c *Client) terminal(ctx context.Context, id string, opts TerminalOptions, first api.StreamMessage) (*Terminal, error) {
	unopened := &Stream{tty: true, patience: opts.Patience, opts: StreamOptions{Stdin: true, Stdout: opts.Output}}
	s, err := c.stream(ctx, id, "/pty", unopened, first)
	if err != nil {
		return nil, err
	}
	return &Terminal{s}, nil
}

// PID is the command's process ID inside the sandbox, by which ConnectTerminal
// finds it.
func (t *Terminal) PID() uint32 { return t.s.PID() }

// Write types. It blocks while the command does not read.
func (t *Terminal) Write(p []byte) (int, error) { return t.s.Write(p) }

// Resize says what fits into the terminal now.
func (t *Terminal) Resize(size api.TerminalSize) error {
	return t.s.sendText(t.s.ctx, api.StreamMessage{Type: api.StreamResize, Size: &size})
}

// Kill sends api.SignalTerm or api.SignalKill to the command and to what runs in
// the foreground of its terminal.
func (t *Terminal) Kill(signal string) error { return t.s.Kill(signal) }

// Wait returns how the command ended, after all its output was written.
func (t *Terminal) Wait() (Exit, error) { return t.s.Wait() }

// Close ends the stream, and returns when no goroutine of it is left. It may be
// called twice, and after Wait.
func (t *Terminal) Close() error { return t.s.Close() }
