package exec

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"

	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/guest/reap"
)

// process is one command, from its start to the end of its retention.
type process struct {
	tag   *string
	child *reap.Child
	group *group    // where a timeout finds the descendants
	stdin *input    // nil for /dev/null
	tty   *terminal // nil for pipes

	// config is dropped at the end: it can be as large as a message, and ended
	// processes are kept for Retention.
	config atomic.Pointer[processv1.ProcessConfig]

	exited chan struct{} // closed when the process itself is reaped
	done   chan struct{} // closed when its output is delivered too; end is set

	// delivering orders chunks for all readers. It is held while they read.
	// It comes before mu.
	delivering sync.Mutex

	mu      sync.Mutex
	readers map[*reader]struct{}
	end     *processv1.ProcessEvent_EndEvent
}

// reader is one stream that follows a process.
type reader struct {
	events chan *processv1.ProcessEvent // unbuffered: delivered means taken
	gone   chan struct{}
}

func (p *process) matches(sel *processv1.ProcessSelector) bool {
	switch by := sel.GetSelector().(type) {
	case *processv1.ProcessSelector_Pid:
		return by.Pid == uint32(p.child.PID)
	case *processv1.ProcessSelector_Tag:
		return p.tag != nil && *p.tag == by.Tag
	}
	return false
}

func (p *process) ended() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// subscribe adds a reader that gets everything delivered from now on.
func (p *process) subscribe() *reader {
	r := &reader{events: make(chan *processv1.ProcessEvent), gone: make(chan struct{})}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.readers[r] = struct{}{}
	return r
}

func (p *process) unsubscribe(r *reader) {
	close(r.gone)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.readers, r)
}

// deliver hands an event to every reader and returns when each has taken it or
// left.
func (p *process) deliver(event *processv1.ProcessEvent) {
	p.delivering.Lock()
	defer p.delivering.Unlock()
	p.mu.Lock()
	readers := make([]*reader, 0, len(p.readers))
	for r := range p.readers {
		readers = append(readers, r)
	}
	p.mu.Unlock()
	for _, r := range readers {
		select {
		case r.events <- event:
		case <-r.gone:
		}
	}
}

// follow sends what happens to a process until its end. The context bounds the
// stream, not the process.
func (p *process) follow(ctx context.Context, r *reader, keepalive time.Duration, send func(*processv1.ProcessEvent) error) error {
	start := &processv1.ProcessEvent_StartEvent{Pid: uint32(p.child.PID)}
	if err := send(&processv1.ProcessEvent{Event: &processv1.ProcessEvent_Start{Start: start}}); err != nil {
		return err
	}
	idle := time.NewTicker(keepalive)
	defer idle.Stop()
	for {
		var event *processv1.ProcessEvent
		select {
		case event = <-r.events:
			idle.Reset(keepalive)
		case <-idle.C:
			event = &processv1.ProcessEvent{Event: &processv1.ProcessEvent_Keepalive{Keepalive: &processv1.ProcessEvent_KeepAlive{}}}
		case <-p.done: // after the last delivery
			return send(&processv1.ProcessEvent{Event: &processv1.ProcessEvent_End{End: p.end}})
		case <-ctx.Done():
			return contextError(ctx)
		}
		if err := send(event); err != nil {
			return err
		}
	}
}

// contextError is why a call ends early. Who ended it may have said it.
func contextError(ctx context.Context) error {
	var said *connect.Error
	if errors.As(context.Cause(ctx), &said) {
		return said
	}
	if ctx.Err() == context.DeadlineExceeded {
		return errorf(connect.CodeDeadlineExceeded, "the timeout of the call has passed")
	}
	return connect.NewError(connect.CodeCanceled, ctx.Err())
}

// endEvent describes how a process ended. A death by signal has exit code -1.
func endEvent(state *os.ProcessState, err error) *processv1.ProcessEvent_EndEvent {
	if err != nil {
		text := "wait for the process: " + err.Error()
		return &processv1.ProcessEvent_EndEvent{ExitCode: -1, Status: text, Error: &text}
	}
	end := &processv1.ProcessEvent_EndEvent{
		ExitCode: int32(state.ExitCode()),
		Exited:   state.Exited(),
		Status:   state.String(),
	}
	if !state.Success() {
		end.Error = &end.Status
	}
	return end
}

// kill ends a process and everything it started. The process is held still
// while its descendants are looked for: once it is dead, they have no parent by
// which to be found.
func (p *process) kill() error {
	err := p.child.SignalGroup(syscall.SIGSTOP)
	if err == nil {
		p.group.kill(p.child.PID)
		err = p.child.SignalGroup(syscall.SIGKILL)
	}
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}
