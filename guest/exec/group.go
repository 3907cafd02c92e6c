package exec

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
)

var groupNumber atomic.Uint64

// group is where all descendants of one command are found: a cgroup of its own
// where there are cgroups, else the tree that /proc shows.
type group struct {
	path string // of the cgroup, or empty
	dir  *os.File
}

// newGroup makes a cgroup below parent, or none when parent is empty.
func newGroup(parent string) (*group, error) {
	if parent == "" {
		return &group{}, nil
	}
	path := filepath.Join(parent, "run-"+strconv.FormatUint(groupNumber.Add(1), 10))
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, fmt.Errorf("make a cgroup: %w", err)
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open a cgroup: %w", err), os.Remove(path))
	}
	return &group{path: path, dir: dir}, nil
}

// enter makes a process start inside the group (clone3, Linux 5.7).
func (g *group) enter(sys *syscall.SysProcAttr) {
	if g.dir != nil {
		sys.UseCgroupFD, sys.CgroupFD = true, int(g.dir.Fd())
	}
}

// started lets go of what only the start needed.
func (g *group) started() {
	if g.dir != nil {
		_ = g.dir.Close() // a directory
	}
}

// remove deletes the cgroup. While a background job lives in it this fails, and
// the next sweep tries again.
func (g *group) remove() bool {
	if g.path == "" {
		return true
	}
	err := os.Remove(g.path)
	return err == nil || errors.Is(err, os.ErrNotExist)
}

// kill ends every process of the group but, without a cgroup, the first, which
// is pid.
func (g *group) kill(pid int) {
	if g.path != "" {
		kill := filepath.Join(g.path, "cgroup.kill") // Linux 5.14
		if os.WriteFile(kill, []byte("1"), 0) == nil {
			return
		}
	}
	killTree(pid)
}

// treeLimit bounds the looking of killTree. Who forks faster than that is left to
// the group's own end: a process that is held still must not stay so.
const treeLimit = 2 * time.Second

// walking is held by the one killTree that looks: each look reads all of /proc, and
// many at once would be slower than one after the other.
var walking sync.Mutex

// killTree kills the descendants of pid, and all of its session, but not pid
// itself. It looks until it finds nobody new: a process may fork while it looks.
func killTree(pid int) {
	walking.Lock()
	defer walking.Unlock()
	killed := map[int]bool{}
	for until := time.Now().Add(treeLimit); time.Now().Before(until); {
		fresh := 0
		for _, victim := range tree(pid) {
			if !killed[victim] {
				killed[victim] = true
				fresh++
				_ = syscall.Kill(victim, syscall.SIGKILL) // it may have ended by itself
			}
		}
		if fresh == 0 {
			return
		}
	}
}

// tree lists pid's session and its descendants.
func tree(pid int) []int {
	type link struct{ pid, parent, session int }
	var all []link
	entries, _ := os.ReadDir("/proc") // without /proc there is nothing to find
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if p, err := kernel.StatProc(n); err == nil { // else it is gone
			all = append(all, link{n, p.Parent, p.Session})
		}
	}
	in := map[int]bool{pid: true}
	var found []int
	for grew := true; grew; {
		grew = false
		for _, l := range all {
			if !in[l.pid] && (in[l.parent] || l.session == pid) {
				in[l.pid] = true
				found = append(found, l.pid)
				grew = true
			}
		}
	}
	return found
}
