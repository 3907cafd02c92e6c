package hooks

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

var placeNumber atomic.Uint64

// place is the cgroup that one hook runs in, or none. It is never used again: some
// kernels kill at once what is born into a cgroup that was killed before.
type place struct {
	path string
	dir  *os.File
}

func (r *Runner) openPlace() (*place, error) {
	if r.Cgroup == "" {
		return &place{}, nil
	}
	path := filepath.Join(r.Cgroup, "hook-"+strconv.FormatUint(placeNumber.Add(1), 10))
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, fmt.Errorf("make a cgroup: %w", err)
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open a cgroup: %w", err), os.Remove(path))
	}
	return &place{path, dir}, nil
}

// close removes the cgroup. Killed processes take a moment to leave it; one whose
// processes do not die stays.
func (p *place) close() {
	if p.dir == nil {
		return
	}
	_ = p.dir.Close() // a directory
	for deadline := time.Now().Add(leaving); os.Remove(p.path) != nil && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
}

func (p *place) kill() {
	if p.path != "" {
		_ = os.WriteFile(filepath.Join(p.path, "cgroup.kill"), []byte("1"), 0) // Linux 5.14; else the process group has to do
	}
}

// adopt moves what a hook has left running to a cgroup of the user's processes,
// which is frozen: it freezes with them. What cannot be moved is killed.
func (p *place) adopt(to string) error {
	if p.path == "" || to == "" {
		return nil
	}
	const rounds = 100 // of who forks while he is moved
	for range rounds {
		procs, err := os.ReadFile(filepath.Join(p.path, "cgroup.procs"))
		if err != nil {
			return fmt.Errorf("what it has left running: %w", err)
		}
		pids := strings.Fields(string(procs))
		if len(pids) == 0 {
			return nil
		}
		if err := os.Mkdir(to, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			p.kill()
			return fmt.Errorf("killed what it has left running: %w", err)
		}
		for _, pid := range pids {
			_ = os.WriteFile(filepath.Join(to, "cgroup.procs"), []byte(pid), 0) // it has ended, or the next round finds it
		}
	}
	p.kill()
	return errors.New("killed what it has left running: it could not be moved")
}
