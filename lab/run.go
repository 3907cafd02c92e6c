package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/lab/wire"
)

// killLimit bounds how long the inside may take to end what it runs.
const killLimit = 10 * time.Second

// Command is a program to run in a lab, as root.
type Command struct {
	Args   []string
	Env    []string // after the lab's own
	Dir    string   // /root if empty
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	// TTY gives the command a terminal of this size, which Sizes changes.
	TTY   *wire.Size
	Sizes <-chan wire.Size
}

// ErrDead says that a lab has ended, or does not answer any more.
var ErrDead = errors.New("the lab is dead")

// ErrPanic is an ErrDead: the lab's own kernel came upon something impossible.
var ErrPanic = errors.New("its kernel has died")

// Run runs a command and hands its output on as it comes. When ctx ends, all that
// the command has started is killed. One command runs at a time; what it leaves
// running is killed and named in the status. The error is about the lab, not about
// the command; if it is ErrDead, no other command will run.
func (l *Lab) Run(ctx context.Context, c Command) (wire.Status, error) {
	start := wire.Command{Args: c.Args, Env: c.Env, Dir: c.Dir, TTY: c.TTY}
	if err := l.vm.conn.SendJSON(wire.Start, start); err != nil {
		return wire.Status{}, l.dead(err)
	}
	over := make(chan struct{})
	defer close(over)
	go l.sendInput(c, over)
	if c.Sizes != nil {
		go l.sendSizes(c.Sizes, over)
	}
	done, late := ctx.Done(), (<-chan time.Time)(nil)
	for {
		select {
		case f, ok := <-l.vm.frames:
			if !ok {
				return wire.Status{}, l.dead(errors.New("the connection ended"))
			}
			if status, end, err := c.take(f); end || err != nil {
				return status, err
			}
		case <-done:
			done = nil
			late = time.After(killLimit)
			go func() { _ = l.vm.conn.Send(wire.Kill, nil) }() // may block for as long as the inside does not read
		case <-late:
			return wire.Status{}, l.dead(fmt.Errorf("%w; it did not end its command within %v", context.Cause(ctx), killLimit))
		}
	}
}

func (l *Lab) dead(err error) error {
	err = l.vm.lost(err)
	if impossible(l.vm.console()) {
		err = fmt.Errorf("%w: %w", ErrPanic, err)
	}
	return fmt.Errorf("%w: %w", ErrDead, err)
}

// impossible says that a kernel came upon what no program can make it do.
func impossible(console string) bool {
	_, why, _ := strings.Cut(console, "Kernel panic - not syncing: ")
	return strings.HasPrefix(why, "Fatal exception") || strings.HasPrefix(why, "corrupted stack end")
}

// take handles one frame; end says that it was the command's last.
func (c Command) take(f frame) (status wire.Status, end bool, err error) {
	switch f.kind {
	case wire.Stdout:
		err = write(c.Stdout, f.payload)
	case wire.Stderr:
		err = write(c.Stderr, f.payload)
	case wire.Exit:
		return status, true, f.decode(&status)
	default:
		err = fmt.Errorf("unexpected frame %q", f.kind)
	}
	return status, false, err
}

func write(w io.Writer, p []byte) error {
	if w == nil {
		return nil
	}
	_, err := w.Write(p)
	return err
}

// sendInput sends standard input and its end. A read that blocks outlives the
// command, and its bytes are lost.
func (l *Lab) sendInput(c Command, over <-chan struct{}) {
	in := c.Stdin
	if in == nil {
		_ = l.vm.conn.Send(wire.Stdin, nil) // Run sees a connection that ended
		return
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := in.Read(buf)
		select {
		case <-over:
			return
		default:
		}
		if n > 0 && l.vm.conn.Send(wire.Stdin, buf[:n]) != nil {
			return
		}
		if err != nil {
			_ = l.vm.conn.Send(wire.Stdin, nil) // as above
			return
		}
	}
}

func (l *Lab) sendSizes(sizes <-chan wire.Size, over <-chan struct{}) {
	for {
		select {
		case <-over:
			return
		case size := <-sizes:
			if l.vm.conn.SendJSON(wire.Resize, size) != nil {
				return
			}
		}
	}
}
