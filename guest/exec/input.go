package exec

import (
	"context"
	"os"
	"time"

	"connectrpc.com/connect"
)

// past is a deadline that ends a wait at once.
var past = time.Unix(1, 0)

// input is the write end of a process's standard input, or its terminal. One
// writer at a time; a full pipe makes it wait, and its context ends the wait.
type input struct {
	f    *os.File
	read bool          // the same file is read from: a terminal, which who reads it closes
	turn chan struct{} // holds one token; whoever has it may write or close
	shut bool          // guarded by turn
}

func newInput(f *os.File, alsoRead bool) *input {
	in := &input{f: f, read: alsoRead, turn: make(chan struct{}, 1)}
	in.turn <- struct{}{}
	return in
}

// take waits for the turn.
func (in *input) take(ctx context.Context) error {
	select {
	case <-in.turn:
		return nil
	case <-ctx.Done():
		return contextError(ctx)
	}
}

func (in *input) give() { in.turn <- struct{}{} }

func (in *input) write(ctx context.Context, data []byte) error {
	if err := in.take(ctx); err != nil {
		return err
	}
	defer in.give()
	if in.shut {
		return errorf(connect.CodeInternal, "the input of the process is closed")
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = in.f.SetWriteDeadline(past) // a pipe has deadlines
		close(stopped)
	})
	_, err := in.f.Write(data)
	if !stop() {
		<-stopped
		_ = in.f.SetWriteDeadline(time.Time{}) // for the next writer
		if err != nil {
			return contextError(ctx)
		}
	}
	if err != nil {
		return errorf(connect.CodeInternal, "write to the process: %w", err)
	}
	return nil
}

// close ends the input after the writes that were there first.
func (in *input) close(ctx context.Context) error {
	if err := in.take(ctx); err != nil {
		return err
	}
	defer in.give()
	in.shutLocked()
	return nil
}

// abort ends the input at once: nobody will read it any more.
func (in *input) abort() {
	for {
		_ = in.f.SetWriteDeadline(past) // breaks off a write; on a closed file it has no effect
		select {
		case <-in.turn:
			defer in.give()
			in.shutLocked()
			return
		case <-time.After(lingerQuiet): // a writer may have reset the deadline
		}
	}
}

func (in *input) shutLocked() {
	if !in.shut && !in.read {
		_ = in.f.Close() // a pipe has nothing to flush
	}
	in.shut = true
}
