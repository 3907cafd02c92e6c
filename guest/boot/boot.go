// Package boot is the agent's life as PID 1 of a virtual machine: from the
// initramfs, through the guest's own root, to a machine that looks to its
// processes as a normal distribution would leave it. It knows how to power it
// off, and how to change its clock, name and entropy.
//
// It needs Linux 5.7 for what it promises about user processes: they live in
// cgroups of their own, so that they cannot take the agent's memory, and so that
// all of them can be frozen at once. An older kernel runs them beside the agent.
//
// The image needs nothing of ours inside. A read-only /etc is tolerated.
package boot

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
)

// Path is the PATH of a machine that says nothing else.
const Path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// System is a machine that is up.
type System struct {
	Boot guestapi.Boot
	// UserCgroup is where user processes go; empty on a kernel without cgroup v2.
	UserCgroup string
	// HookCgroup is where the image's hooks run; likewise.
	HookCgroup string
	// Warnings are what went wrong without keeping the machine from being used.
	Warnings []string

	modules error // what could not be loaded: the cause of what is missing later
}

// Up brings the machine up. On an error it is in no state to be used: power off.
func Up() (*System, error) {
	s := &System{}
	network := make(chan error, 1) // both it and the disk mostly wait for the kernel
	for _, phase := range []struct {
		name string
		run  func() error
	}{
		{"mount the kernel's file systems", mountEarly},
		{"read the kernel's command line", s.readCmdline},
		{"load modules", s.loadModules},
		{"start the network", func() error { go func() { network <- s.configureNetwork() }(); return nil }},
		{"mount the root disk", s.mountRoot},
		{"switch root", switchRoot},
		{"mount", s.mountLate},
		{"cgroups", s.makeCgroups},
		{"network", func() error { return <-network }},
		{"names", s.writeNames},
		{"limits", raiseLimits},
	} {
		if err := phase.run(); err != nil {
			return nil, fmt.Errorf("%s: %w", phase.name, err)
		}
	}
	return s, nil
}

func (s *System) readCmdline() error {
	data, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	s.Boot, err = guestapi.ParseCmdline(string(data))
	return err
}

func (s *System) loadModules() error {
	s.modules = loadModules("/modules")
	return nil // what is missing shows when it is needed
}

// missing adds the modules that did not load to the error for what they drive.
func (s *System) missing(err error) error {
	if err == nil || s.modules == nil {
		return err
	}
	return errors.Join(err, s.modules)
}

func (s *System) warn(what string, err error) {
	if err != nil {
		s.Warnings = append(s.Warnings, what+": "+strings.ReplaceAll(err.Error(), "\n", "; "))
	}
}
