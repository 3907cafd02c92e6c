// Package watch tells what happens in a directory, by inotify, and with its
// subdirectories if asked for.
//
// What it promises:
//   - What happens after Open is told once, in its order, until Close or an error.
//   - A directory that appears is watched from then on, however fast things are made
//     in it: what was made before the watch could be armed is found by reading the
//     directory, and told as created, and as written if there is something in it.
//     Only what has come and gone before is never seen.
//   - When the kernel had to drop events, when a directory cannot be watched or the
//     watched one is gone, that is the error, after all events before it. A watch
//     that has lost something never goes on as if it had not.
//   - A reader that does not read costs a bounded amount of memory: beyond it events
//     wait in the kernel's own queue, until that overflows.
//
// It is not built on fsnotify, which hides what these promises need: whether an event
// is about a directory, the cookie that joins the two halves of a move, and how much
// waits in the queue.
package watch

import (
	"context"
	"errors"
	"math"
	"sync"
	"sync/atomic"

	filesystemv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
)

// Errors that end a watch, or keep it from starting.
var (
	ErrLost    = errors.New("events were lost: they came faster than they were read")
	ErrGone    = errors.New("the watched directory is gone")
	ErrNetwork = errors.New("it is on a network file system, where events of other machines are not seen")
	ErrLimit   = errors.New("the kernel's limit of watches is reached (fs.inotify.max_user_watches, max_user_instances)")
	ErrClosed  = errors.New("the watch is closed")
)

// These bound what waits to be read, in bytes. A watch that waits for room in the
// total may always hold a little, so that none of them can stop another.
const (
	maxWaiting   = 2 << 20
	totalWaiting = 16 << 20
	alwaysRoom   = 64 << 10

	eventBytes = 64 // without its name
)

var waiting atomic.Int64 // bytes, in all watches of this process

// Event is one thing that happened.
type Event struct {
	Name string // relative to the watched directory, which is "." itself
	Type filesystemv1.EventType
}

func (e Event) bytes() int { return eventBytes + len(e.Name) }

// Config is what to watch.
type Config struct {
	Dir       string // absolute
	Recursive bool
	// Network allows network file systems.
	Network bool
	// Unfinished tells the temporary name of a file that will be renamed when it is
	// complete, and whether it replaces another: what happens to it is no event, and
	// the renaming is the creation or the writing of the file. Nil tells none.
	Unfinished func(name string) (unfinished, replaces bool)
}

// Watch is a watched directory.
type Watch struct {
	cfg  Config
	tree *tree

	ready  chan struct{} // there is something to take
	room   chan struct{} // something was taken
	closed chan struct{}
	ended  chan struct{} // the reading goroutine has ended

	closing sync.Once

	mu     sync.Mutex
	events []Event
	bytes  int
	err    error // why there will be no more events
}

// Open starts to watch. What happens from its return on is told. The context bounds
// the call, not the watch.
func Open(ctx context.Context, cfg Config) (*Watch, error) {
	w := &Watch{
		cfg: cfg, ready: make(chan struct{}, 1), room: make(chan struct{}, 1),
		closed: make(chan struct{}), ended: make(chan struct{}),
	}
	in, err := openInotify()
	if err != nil {
		return nil, err
	}
	w.tree = newTree(cfg, in, w.push)
	if err := w.tree.arm(ctx); err != nil {
		return nil, errors.Join(err, in.close())
	}
	go w.read()
	return w, nil
}

// Close ends the watch. It may be called twice.
func (w *Watch) Close() error {
	var err error
	w.closing.Do(func() {
		close(w.closed)
		err = w.tree.in.close()
		<-w.ended
		w.mu.Lock()
		defer w.mu.Unlock()
		w.release(len(w.events))
		w.err = ErrClosed
	})
	return err
}

// Next waits for events, and gives all there are. After the last one it says why
// there are no more.
func (w *Watch) Next(ctx context.Context) ([]Event, error) {
	for {
		events, err := w.Take(math.MaxInt)
		if len(events) > 0 || err != nil {
			return events, err
		}
		select {
		case <-w.ready:
		case <-w.closed:
			return nil, ErrClosed
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Take gives up to most of what there is, and only when that is nothing, why there
// will be no more.
func (w *Watch) Take(most int) ([]Event, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.events) == 0 {
		return nil, w.err
	}
	events := w.release(most)
	signal(w.room)
	if w.err != nil || len(w.events) > 0 {
		signal(w.ready)
	}
	return events, nil
}

// release takes events out. The caller holds mu.
func (w *Watch) release(most int) []Event {
	n := min(most, len(w.events))
	events := w.events[:n:n]
	w.events = w.events[n:]
	if len(w.events) == 0 {
		w.events = nil // nothing else keeps what was taken
	}
	for _, e := range events {
		w.bytes -= e.bytes()
		waiting.Add(-int64(e.bytes()))
	}
	return events
}

// read feeds the tree until the watch ends.
func (w *Watch) read() {
	defer close(w.ended)
	err := w.tree.run()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
	signal(w.ready)
}

// push adds an event, and waits for room first. It reports whether anybody is
// left to read.
func (w *Watch) push(kind filesystemv1.EventType, name string) bool {
	for !w.add(Event{Name: name, Type: kind}) {
		select {
		case <-w.room:
		case <-w.closed:
			return false
		}
	}
	return true
}

func (w *Watch) add(e Event) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	size := e.bytes()
	if w.bytes >= maxWaiting || w.bytes >= alwaysRoom && waiting.Load() >= totalWaiting {
		return false
	}
	w.events = append(w.events, e)
	w.bytes += size
	waiting.Add(int64(size))
	signal(w.ready)
	return true
}

// signal wakes whoever waits on c, now or later.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
