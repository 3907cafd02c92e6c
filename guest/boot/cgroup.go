package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Names of the cgroups, right below the root, that stay when all others are frozen:
// the agent's, and that of the image's hooks.
const (
	AgentCgroup = "agent"
	HookCgroup  = "hooks"
)

const (
	cgroups = "/sys/fs/cgroup"

	// agentMemory is kept back from user processes, in bytes. The agent stays
	// below it while it streams to a hundred clients.
	agentMemory = 32 << 20
	// agentWeight is the agent's share of a busy CPU, where all commands together
	// have 100.
	agentWeight = 1000
)

// makeCgroups puts the agent into one cgroup and prepares others for all user
// processes, which is what will be frozen before a save, and for hooks. They get
// neither the agent's memory nor the last process IDs.
//
// The agent's oom_score_adj stays as it is: children inherit it, and the kernel
// spares PID 1 without it (oom_unkillable_task in mm/oom_kill.c).
func (s *System) makeCgroups() error {
	if err := unix.Mount("cgroup2", cgroups, "cgroup2", noExec, "nsdelegate"); err != nil {
		s.warn("no cgroup v2, so user processes run beside the agent", err)
		return nil
	}
	agent, user, hooks := filepath.Join(cgroups, AgentCgroup), filepath.Join(cgroups, "user"), filepath.Join(cgroups, HookCgroup)
	if err := errors.Join(os.Mkdir(agent, 0o755), os.Mkdir(user, 0o755), os.Mkdir(hooks, 0o755)); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(agent, "cgroup.procs"), []byte("1"), 0); err != nil {
		return fmt.Errorf("move the agent: %w", err)
	}
	s.UserCgroup, s.HookCgroup = user, hooks
	for _, controller := range []string{"memory", "pids", "cpu"} {
		err := os.WriteFile(filepath.Join(cgroups, "cgroup.subtree_control"), []byte("+"+controller), 0)
		s.warn("no cgroup controller "+controller, err)
	}
	// Each command gets the same share of the CPU, however many processes it has:
	// a fork bomb leaves room for the command that ends it.
	s.warn("no share of the CPU for each command", os.WriteFile(filepath.Join(user, "cgroup.subtree_control"), []byte("+cpu"), 0))
	s.limit(agent, user, hooks)
	return nil
}

// limit sets bounds; a controller that is missing was warned of already.
func (s *System) limit(agent string, users ...string) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		s.warn("size of the memory", err)
		return
	}
	total := uint64(info.Totalram) * uint64(info.Unit)
	reserve := min(uint64(agentMemory), total/4)
	s.set(agent, "cpu.weight", agentWeight)
	s.set(agent, "memory.min", reserve)
	threads, err := readUint("/proc/sys/kernel/threads-max")
	for _, user := range users {
		s.set(user, "memory.max", total-reserve)
		if err == nil {
			s.set(user, "pids.max", min(threads, 32768)*9/10)
		}
	}
}

func (s *System) set(cgroup, file string, value uint64) {
	err := os.WriteFile(filepath.Join(cgroup, file), strconv.AppendUint(nil, value, 10), 0)
	if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) { // the controller is missing
		s.warn("limit "+file, err)
	}
}

func readUint(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
}
