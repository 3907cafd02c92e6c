package host

import (
	"context"
	"math"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Terminal is the size of one. Zero leaves a side as it is; a new terminal has 80
// columns and 24 rows.
type Terminal struct{ Cols, Rows uint32 }

func (t Terminal) check() error {
	if max(t.Cols, t.Rows) > math.MaxUint16 {
		return sandbox.Errorf(sandbox.KindInvalid, "a terminal of %d columns and %d rows: at most %d are allowed of each", t.Cols, t.Rows, math.MaxUint16)
	}
	return nil
}

func (t Terminal) wire() *process.PTY {
	return &process.PTY{Size: &process.PTY_Size{Cols: t.Cols, Rows: t.Rows}}
}

// Attach follows a command in a terminal from now on, also one that somebody else
// follows; the caller must call Finish, which leaves it running.
func (a *Agent) Attach(ctx context.Context, id string, pid uint32, size Terminal) (*Process, error) {
	if err := size.check(); err != nil {
		return nil, err
	}
	if pid == 0 {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "pid is 0, it must be that of a command in a terminal")
	}
	r, err := a.follow(ctx, id, "", func(ctx context.Context, r *Process) error { return r.connect(ctx, pid) })
	if err != nil {
		return nil, err
	}
	r.tty, r.keep = true, true
	if err := r.hasTerminal(size); err != nil {
		r.Finish(false)
		return nil, err
	}
	return r, nil
}

func (r *Process) connect(caller context.Context, pid uint32) error {
	req := connect.NewRequest(&process.ConnectRequest{Process: selector(pid)})
	return r.open(caller, req.Header(), silenceKept, func() (events, error) {
		stream, err := r.g.processes.Connect(r.ctx, req)
		return told[process.ConnectResponse]{stream, (*process.ConnectResponse).GetEvent}, err
	})
}

// hasTerminal gives a command's terminal its size, and finds out in this way
// whether it has one. A command that has ended is none of its errors: its end can
// still be told.
func (r *Process) hasTerminal(size Terminal) error {
	err := r.Resize(size)
	switch {
	case sandbox.Is(err, sandbox.KindNotFound):
		return nil
	case sandbox.Is(err, sandbox.KindInternal):
		return sandbox.Errorf(sandbox.KindInvalid, "process %d has no terminal", r.pid)
	}
	return err
}

// Resize changes the size of a command's terminal; a zero leaves a side as it is.
func (r *Process) Resize(size Terminal) error {
	if err := size.check(); err != nil {
		return err
	}
	req := connect.NewRequest(&process.UpdateRequest{Process: selector(r.pid), Pty: size.wire()})
	r.g.sign(req.Header(), r.user)
	_, err := r.g.processes.Update(r.ctx, req)
	return rpcError(r.ctx, err)
}

// Keep lets the command outlive whoever follows it.
func (r *Process) Keep() { r.keep = true }
