package main

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm/qemu"
)

// instance is one server on this machine, as its data directory makes it. Two
// of them side by side share nothing that has a name.
type instance struct {
	data string // absolute
	name string // [a-z0-9]{5}, in the name of everything on the host
}

func newInstance(data string) (instance, error) {
	abs, err := filepath.Abs(data)
	if err != nil {
		return instance{}, err
	}
	abs = resolve(abs)
	sum := sha256.Sum256([]byte(abs))
	name := strings.ToLower(base32.StdEncoding.EncodeToString(sum[:])[:5])
	return instance{data: abs, name: name}, nil
}

// resolve follows the links in the part of a path that exists: two spellings of
// one directory are one instance.
func resolve(path string) string {
	real, err := filepath.EvalSymlinks(path)
	if err == nil {
		return real
	}
	if parent := filepath.Dir(path); parent != path {
		return filepath.Join(resolve(parent), filepath.Base(path))
	}
	return path
}

func (i instance) hostDir() string      { return filepath.Join(i.data, "host") }
func (i instance) runDir() string       { return "/run/dormouse-" + i.name }
func (i instance) nodeDir() string      { return "/dev/dormouse-" + i.name }
func (i instance) templatesDir() string { return filepath.Join(i.data, "templates") }
func (i instance) databasePath() string { return filepath.Join(i.data, "control.db") }
func (i instance) logPath() string      { return filepath.Join(i.data, "server.log") }
func (i instance) probePath() string    { return filepath.Join(i.data, "kvm-probe.json") }
func (i instance) statePath() string    { return filepath.Join(i.data, "server.json") }
func (i instance) lockPath() string     { return filepath.Join(i.data, "server.lock") }

// uidBase is the first of the user IDs of this instance's VMs. It lies above
// what distributions and user namespaces give out, and each instance has a
// range of its own out of 1000, so that one server's VMs can hardly signal
// another's.
func (i instance) uidBase() int {
	const first, ranges, size = 1_900_000_000, 1000, 1 << 16
	sum := sha256.Sum256([]byte("uids of " + i.data))
	return first + int(binary.BigEndian.Uint32(sum[:4])%ranges)*size
}

// probe is how KVM is tried: with the kernel and the rights of the VMs later on.
// The user ID is the last of the range, which no VM has.
func (i instance) probe(kernel string) qemu.ProbeConfig {
	uid := i.uidBase() + 1<<16 - 1
	return qemu.ProbeConfig{Kernel: kernel, CacheFile: i.probePath(), UID: uid, GID: uid}
}

// makeData makes the data directory. VMs open their disks by path as users of
// their own: they may pass through, and list nothing.
func (i instance) makeData() error {
	if err := osfs.MkdirAll("data-dir", i.data, 0o711); err != nil {
		return fmt.Errorf("make data directory: %w", err)
	}
	return nil
}

// serverState is what a running server writes down of itself.
type serverState struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"`
	URL       string `json:"url"` // empty while it starts
	Version   string `json:"version"`
}

func (i instance) writeState(s serverState) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return osfs.WriteFile("server-state", i.statePath(), data, 0o644)
}

// lock keeps two processes from working on one instance: the ruleset of its
// network belongs to one of them, and so does what it sweeps. It goes with the
// process, however that ends. What is in the file says who starts, for running.
func (i instance) lock(s serverState) (_ *os.File, err error) {
	f, err := os.OpenFile(i.lockPath(), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	defer func() {
		if err != nil {
			_ = f.Close() // the error says more
		}
	}()
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, sandbox.Errorf(sandbox.KindConflict, "another dormouse process is at work on %s", i.data)
	}
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	data, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	if err = f.Truncate(0); err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	if _, err = f.WriteAt(data, 0); err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	return f, nil
}

// thisServer is the state of a server that starts in this process.
func thisServer() (serverState, error) {
	started, err := kernel.StatProc(os.Getpid())
	return serverState{PID: os.Getpid(), StartTime: started.StartTime, Version: version}, err
}

// running finds the server of this instance, also one that only starts, if its
// process lives.
func (i instance) running() (serverState, bool, error) {
	var last serverState
	for _, path := range []string{i.statePath(), i.lockPath()} {
		s, alive, err := readState(path)
		if err != nil || alive {
			return s, alive, err
		}
		if last.PID == 0 {
			last = s
		}
	}
	return last, false, nil
}

// readState finds the server that a file tells of. A file that is not
// understood tells of none: the lock keeps a second one away all the same.
func readState(path string) (serverState, bool, error) {
	data, err := osfs.ReadFileLimit(path, 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return serverState{}, false, nil
	}
	if err != nil {
		return serverState{}, false, err
	}
	var s serverState
	if json.Unmarshal(data, &s) != nil || s.PID <= 0 {
		return serverState{}, false, nil
	}
	p, err := kernel.OpenProcess(s.PID, s.StartTime)
	if err != nil {
		return s, false, nil // it is gone, or the number is a stranger's by now
	}
	defer func() { _ = p.Close() }() // only a handle
	return s, !p.Exited(), nil
}

// awaitStart is running, but waits for a server that starts just now.
func (i instance) awaitStart(ctx context.Context) (serverState, bool, error) {
	for {
		s, alive, err := i.running()
		if err != nil || !alive || s.URL != "" {
			return s, alive, err
		}
		select {
		case <-ctx.Done():
			return s, alive, context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// stop ends the server and waits for it. Its sandboxes run on.
func (i instance) stop(ctx context.Context) (stopped bool, _ error) {
	s, alive, err := i.running()
	if err != nil || !alive {
		return false, err
	}
	p, err := kernel.OpenProcess(s.PID, s.StartTime)
	if err != nil {
		return false, nil // it ended just now
	}
	defer func() { _ = p.Close() }() // only a handle
	for _, try := range []struct {
		signal   syscall.Signal
		patience time.Duration
	}{{syscall.SIGTERM, 90 * time.Second}, {syscall.SIGKILL, 10 * time.Second}} {
		if err := p.Signal(try.signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			return false, fmt.Errorf("stop server %d: %w", s.PID, err)
		}
		waiting, cancel := context.WithTimeout(ctx, try.patience)
		err = p.Wait(waiting)
		cancel()
		if err == nil {
			return true, nil
		}
		if ctx.Err() != nil {
			break
		}
	}
	return false, fmt.Errorf("stop server %d: %w", s.PID, err)
}

// healthy says that a server answers at url.
func healthy(ctx context.Context, url string) bool {
	c, err := client.New(client.Config{BaseURL: url})
	if err != nil {
		return false
	}
	defer c.CloseIdle()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err = c.Health(ctx)
	return err == nil
}
