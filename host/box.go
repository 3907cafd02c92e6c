package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// box is one sandbox as the agent holds it.
type box struct {
	id sandbox.ID

	// op is held by the verb that changes the sandbox: create, adopt, destroy.
	// It is taken before mu.
	op      sync.Mutex
	machine *machine // guarded by op; nil unless the host has something of it
	network Network  // guarded by op; what a take-over has adopted that got no further
	unnoted bool     // guarded by op; its end has begun, and the journal did not take that

	// alive ends with the sandbox; its cause is what callers are told.
	alive context.Context
	die   context.CancelCauseFunc

	mu    sync.Mutex  // guards what is below; nothing is waited for under it
	entry entry       // as last written to the journal, or about to be
	guest *guest      // nil unless running
	vm    vmm.Machine // for its console; nil unless running
	disk  disk.Disk   // for its size; nil unless running

	// awake ends with the sandbox or with its pause, whichever is first; each
	// resume makes a new one.
	awake context.Context
	rest  context.CancelCauseFunc

	short *point // its newest point, when that has been found short enough

	joined  int // connections to its ports
	use     activity
	frozen  sandbox.Freeze // why it stands still
	overlay int64          // bytes of its disk when free space was little last
	again   time.Time      // when a VM that did not freeze or thaw is asked again
	// endWaking ends what lets an adopted guest's processes run, and waits for that.
	endWaking func()
	mute      int // how often in a row a guest with a damaged memory has not answered
}

// takeWithin takes op if it can be had in time.
func (b *box) takeWithin(limit time.Duration) bool {
	const pause = 5 * time.Millisecond
	for deadline := time.Now().Add(limit); !b.op.TryLock(); time.Sleep(pause) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

func newBox(e entry) *box {
	b := &box{id: e.ID, entry: e, endWaking: func() {}}
	b.alive, b.die = context.WithCancelCause(context.Background())
	b.awake, b.rest = context.WithCancelCause(b.alive)
	return b
}

// sleep ends every call into the guest, and keeps new ones out.
func (b *box) sleep(why error) {
	b.mu.Lock()
	rest := b.rest
	b.mute = 0
	b.mu.Unlock()
	rest(why)
	b.shut()
}

// awakened is the context of a sandbox that runs, or is about to.
func (b *box) awakened() context.Context {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.awake.Err() != nil {
		b.awake, b.rest = context.WithCancelCause(b.alive)
	}
	return b.awake
}

// now copies the entry.
func (b *box) now() entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.entry
}

// set changes the entry in memory.
func (b *box) set(change func(*entry)) entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	change(&b.entry)
	return b.entry
}

// guestOf returns the way to the guest agent for somebody who uses the sandbox: it is
// not idle until the call is over.
func (a *Agent) guestOf(ctx context.Context, b *box) (*guest, context.Context, context.CancelFunc, error) {
	leave := a.enter(b) // first: a pause says that it has begun, and then asks for calls
	g, ctx, cancel, err := a.reach(ctx, b)
	if err != nil {
		leave()
		return nil, nil, nil, err
	}
	return g, ctx, func() { cancel(); leave() }, nil
}

// reach returns the way to the guest agent, and a context that ends with the
// caller's, with the sandbox or with this agent, whichever is first. It counts for
// nothing: it is for who only looks.
func (a *Agent) reach(ctx context.Context, b *box) (*guest, context.Context, context.CancelFunc, error) {
	b.mu.Lock()
	g, e, frozen, awake := b.guest, b.entry, b.frozen, b.awake
	b.mu.Unlock()
	if e.State != stateRunning {
		return nil, nil, nil, errNotRunning(e)
	}
	if frozen != "" {
		return nil, nil, nil, a.errFrozen(b.id, frozen)
	}
	if g == nil {
		return nil, nil, nil, sandbox.Errorf(sandbox.KindTransient, "sandbox %s is being taken over after a restart; try again", b.id)
	}
	joined, cancel := a.while(ctx, awake)
	return g, joined, cancel, nil
}

// while is a context that ends with another one, with a sandbox's life or with this
// agent, whichever is first.
func (a *Agent) while(ctx, life context.Context) (context.Context, context.CancelFunc) {
	joined, cancel := context.WithCancelCause(ctx)
	stopBox := context.AfterFunc(life, func() { cancel(context.Cause(life)) })
	stopAgent := context.AfterFunc(a.ctx, func() { cancel(errClosing) })
	return joined, func() { stopBox(); stopAgent(); cancel(nil) }
}

// errNotRunning says why a sandbox cannot do what was asked.
func errNotRunning(e entry) error {
	switch e.State {
	case stateEnded, stateDestroying:
		return errEnding(e.ID, e.Cause, e.Detail)
	case statePaused, statePausing:
		return sandbox.Errorf(sandbox.KindPaused, "sandbox %s is %s", e.ID, e.State)
	}
	return sandbox.Errorf(sandbox.KindConflict, "sandbox %s is %s", e.ID, e.State)
}

// Phase is how long one step took.
type Phase struct {
	Name string        `json:"name"`
	Took time.Duration `json:"took"`
}

// stopwatch times the steps of a verb.
type stopwatch struct {
	now    func() time.Time
	last   time.Time
	phases []Phase
	// What was compared and kept of each kind.
	memory, disk snapshot.Stats
	stoodAt      time.Time     // since when the guest stands still
	stopped      time.Duration // how long it did, where it runs on
}

// phase is a lap that users know by its name.
func (s *stopwatch) phase(p sandbox.SavePhase) { s.lap(string(p)) }

// count notes what was compared and kept of an image.
func (s *stopwatch) count(kind snapshot.Kind, stats snapshot.Stats) {
	if kind == snapshot.Memory {
		s.memory = stats
	} else {
		s.disk = stats
	}
}

func newStopwatch(now func() time.Time) *stopwatch { return &stopwatch{now: now, last: now()} }

// lap ends the step that began at the last lap. A step that is done in several
// parts is one phase.
func (s *stopwatch) lap(name string) {
	t := s.now()
	took := t.Sub(s.last)
	s.last = t
	if i := slices.IndexFunc(s.phases, func(p Phase) bool { return p.Name == name }); i >= 0 {
		s.phases[i].Took += took
		return
	}
	s.phases = append(s.phases, Phase{name, took})
}

// causeError is an error that ended a sandbox, with the cause to record.
type causeError struct {
	cause  sandbox.Cause
	detail string // what goes into the record; empty when the cause says it all
	err    error
}

func (e *causeError) Error() string { return e.err.Error() }
func (e *causeError) Unwrap() error { return e.err }

func withCause(cause sandbox.Cause, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &causeError{cause, err.Error(), err}
}

// errEnding is what callers are told who wait for something of a sandbox that
// ends.
func errEnding(id sandbox.ID, cause sandbox.Cause, detail string) error {
	text := string(cause)
	if detail != "" {
		text += ": " + detail
	}
	return &causeError{cause, detail, sandbox.Errorf(sandbox.KindConflict, "sandbox %s has ended (%s)", id, text)}
}

// causeOf says why a sandbox that is ending ends.
func causeOf(b *box) (sandbox.Cause, string) {
	var c *causeError
	if errors.As(context.Cause(b.alive), &c) {
		return c.cause, c.detail
	}
	return sandbox.CauseUser, ""
}

// printable makes text from a guest fit for a message: bounded, valid UTF-8, and
// without the bytes that a terminal would obey.
func printable(s string) string {
	return clip(strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return -1
	}, s))
}

// clip bounds what is kept of a text. It never cuts a character in two: a
// message with half of one in it cannot be encoded, and takes the whole list of
// sandboxes with it.
func clip(s string) string {
	const most = 4000
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
