package template

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// lockPoll is how often a builder that waits for another looks again: flock(2)
// itself cannot be interrupted by a context.
const lockPoll = 50 * time.Millisecond

// lock takes the lock of one cache key; onWait is called once if another
// builder has it. Closing the file releases it.
func (s *Store) lock(ctx context.Context, key string, onWait func()) (*os.File, error) {
	if err := s.makeCache(); err != nil {
		return nil, err
	}
	path := filepath.Join(s.cfg.Cache, locksDir, key)
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for {
		f, err := tryLock(path)
		if err != nil || f != nil {
			return f, err
		}
		if onWait != nil {
			onWait()
			onWait = nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-tick.C:
		}
	}
}

// tryLock returns nil and no error when somebody else holds the lock.
func tryLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case err == nil:
		return f, nil
	case errors.Is(err, unix.EWOULDBLOCK):
		return nil, f.Close()
	default:
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
}

// work is the folder of one build. Its lock is held by the builder and by every
// tool it starts, so that it is free only when all of them are gone.
type work struct {
	dir  string
	lock *os.File
}

const workLock = "lock"

// newWork makes the folder of a build, and first removes those of builds that have
// crashed.
func (s *Store) newWork() (*work, error) {
	if err := s.makeCache(); err != nil {
		return nil, err
	}
	if err := s.sweep(); err != nil {
		return nil, fmt.Errorf("sweep: %w", err)
	}
	parent := filepath.Join(s.cfg.Cache, workDir)
	// Sweepers hold this lock too: none sees the folder before its own lock is taken.
	gate, err := lockGate(parent)
	if err != nil {
		return nil, err
	}
	defer func() { _ = gate.Close() }() // nothing was written
	dir, err := os.MkdirTemp(parent, "build-*")
	if err != nil {
		return nil, err
	}
	f, err := tryLock(filepath.Join(dir, workLock))
	if err == nil {
		err = os.Chmod(dir, 0o755) // apt downloads as its own user
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return &work{dir: dir, lock: f}, nil
}

func lockGate(parent string) (*os.File, error) {
	f, err := os.Open(parent)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil { // held for microseconds, or one sweep
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (w *work) path(name string) string { return filepath.Join(w.dir, name) }

// closedDir makes a folder for a foreign tree, closed to everybody else: programs in
// it may be setuid, and nobody has checked them.
func (w *work) closedDir() (string, error) {
	closed, err := os.MkdirTemp(w.dir, "closed-") // mode 0700
	if err != nil {
		return "", err
	}
	root := filepath.Join(closed, "root")
	return root, os.Mkdir(root, 0o755)
}

func (w *work) Close() error {
	err := removeUnmounted(w.dir)
	return errors.Join(err, w.lock.Close())
}

// sweep removes what crashed builds left: here, and next to what is published.
func (s *Store) sweep() error {
	return errors.Join(s.sweepPublished(), s.sweepWork())
}

func (s *Store) sweepWork() error {
	parent := filepath.Join(s.cfg.Cache, workDir)
	gate, err := lockGate(parent)
	if err != nil {
		return err
	}
	defer func() { _ = gate.Close() }() // nothing was written
	entries, err := os.ReadDir(parent)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, s.sweepOne(filepath.Join(parent, e.Name())))
	}
	return errors.Join(errs...)
}

func (s *Store) sweepOne(dir string) error {
	f, err := tryLock(filepath.Join(dir, workLock))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil // its builder removed it meanwhile
	}
	if err != nil || f == nil {
		return err
	}
	s.log.Info("removing a crashed template build", "dir", dir)
	return errors.Join(removeUnmounted(dir), f.Close())
}

// removeUnmounted removes a tree, but never through a mount: a tool that died
// in a bad moment could have left one of the host's file systems there.
func removeUnmounted(dir string) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // read only
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			return fmt.Errorf("remove %s: %s is mounted in it", dir, fields[4])
		}
	}
	if err := lines.Err(); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}
