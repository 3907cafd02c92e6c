//go:build !release

package fault

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
)

// Enabled says whether this build has failpoints.
const Enabled = true

// ErrInjected is in the chain of every error that a failpoint makes.
var ErrInjected = errors.New("injected fault")

// Action is what an armed point does. Its context is the caller's.
type Action func(ctx context.Context, point string) error

var (
	mu    sync.Mutex
	armed = map[string]Action{}
	// any is whether something is armed, so that an unarmed process pays one load.
	any atomic.Bool

	seenMu sync.Mutex
	seen   func(point string)
)

func init() {
	if spec := os.Getenv("DORMOUSE_FAULT"); spec != "" {
		if err := Parse(spec); err != nil {
			fmt.Fprintln(os.Stderr, "DORMOUSE_FAULT:", err)
			os.Exit(2)
		}
	}
	if path := os.Getenv("DORMOUSE_FAULT_SEEN"); path != "" {
		if err := record(path); err != nil {
			fmt.Fprintln(os.Stderr, "DORMOUSE_FAULT_SEEN:", err)
			os.Exit(2)
		}
	}
}

// record appends the name of every point that is passed to a file, one a line,
// so that the test that started this process can list the steps it has to break.
func record(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	Observe(func(point string) {
		_, _ = f.WriteString(point + "\n") // a line that is missing fails the test that looks for it
	})
	return nil
}

// Parse arms points from a text: "name=error", "name=kill", "name=hang", or
// with "@N" behind the action to act on the N-th time only, several separated
// by commas.
func Parse(spec string) error {
	for item := range strings.SplitSeq(spec, ",") {
		name, what, ok := strings.Cut(item, "=")
		if !ok {
			return fmt.Errorf("%q is not name=action", item)
		}
		what, nth, counted := strings.Cut(what, "@")
		var act Action
		switch what {
		case "error":
			act = Fail
		case "kill":
			act = Kill
		case "hang":
			act = Hang
		default:
			return fmt.Errorf("%q: the actions are error, kill and hang", item)
		}
		if counted {
			n, err := strconv.Atoi(nth)
			if err != nil || n < 1 {
				return fmt.Errorf("%q: %q is not a count", item, nth)
			}
			act = Nth(n, act)
		}
		Set(name, act)
	}
	return nil
}

// Set arms a point; a nil action disarms it. It returns a function that disarms.
func Set(point string, act Action) func() {
	mu.Lock()
	defer mu.Unlock()
	if act == nil {
		delete(armed, point)
	} else {
		armed[point] = act
	}
	any.Store(len(armed) > 0)
	return func() { Set(point, nil) }
}

// Observe calls fn with the name of every point that is passed, so that a test
// can list the steps it has to break. A nil fn stops it.
func Observe(fn func(point string)) {
	seenMu.Lock()
	defer seenMu.Unlock()
	seen = fn
	if fn != nil {
		any.Store(true)
	}
}

// Point is a place where a test may break in. It returns nil unless armed.
func Point(ctx context.Context, name string) error {
	if !any.Load() {
		return nil
	}
	seenMu.Lock()
	observer := seen
	seenMu.Unlock()
	if observer != nil {
		observer(name)
	}
	mu.Lock()
	act := armed[name]
	mu.Unlock()
	if act == nil {
		return nil
	}
	return act(ctx, name)
}

// Fail makes the point return an error.
func Fail(_ context.Context, point string) error {
	return fmt.Errorf("%s: %w", point, ErrInjected)
}

// Kill ends the process at once, as kill -9 would.
func Kill(context.Context, string) error {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL) // does not return
	select {}
}

// Hang waits until the caller's context ends.
func Hang(ctx context.Context, point string) error {
	<-ctx.Done()
	return fmt.Errorf("%s: %w", point, ctx.Err())
}

// Nth acts on the n-th time only, counted from 1.
func Nth(n int, act Action) Action {
	var count atomic.Int64
	return func(ctx context.Context, point string) error {
		if count.Add(1) != int64(n) {
			return nil
		}
		return act(ctx, point)
	}
}
