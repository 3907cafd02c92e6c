// Package kernel asks the running kernel what it is and what it can do, and
// holds processes by descriptors instead of by numbers. Calls on the descriptors of
// files go through WithFD.
//
// A probe tries the thing itself (opens the node, makes the call) and answers
// with an error that says what is missing, never with a guess from a version
// number. What to do about a missing feature is the caller's business.
package kernel

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrGone says that a process does not exist, or is not the one that was meant.
var ErrGone = errors.New("process is gone")

// BootID names this run of the machine: it changes at every boot, so a PID from
// another boot is recognized as meaningless.
var BootID = sync.OnceValues(func() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot ID: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
})

// Release is the kernel's release, as uname -r prints it.
func Release() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(u.Release[:]), nil
}

// CPUModel is the first processor's model name; empty where /proc/cpuinfo has none.
func CPUModel() string { return firstCPU()["model name"] }

// CPUIdentity tells processors apart that a guest would: vendor, family, model,
// stepping, and a digest of the features. It is empty where /proc/cpuinfo has none.
func CPUIdentity() string { return identityOf(firstCPU()) }

func identityOf(cpu map[string]string) string {
	flags := strings.Fields(cpu["flags"])
	if len(flags) == 0 || cpu["vendor_id"] == "" {
		return ""
	}
	slices.Sort(flags)
	sum := sha256.Sum256([]byte(strings.Join(flags, " ")))
	return fmt.Sprintf("%s %s-%s-%s %x", cpu["vendor_id"], cpu["cpu family"], cpu["model"], cpu["stepping"], sum[:6])
}

// firstCPU is what /proc/cpuinfo says of the first processor.
func firstCPU() map[string]string {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return nil
	}
	first, _, _ := strings.Cut(string(data), "\n\n")
	cpu := map[string]string{}
	for line := range strings.Lines(first) {
		if key, value, ok := strings.Cut(line, ":"); ok {
			cpu[strings.TrimSpace(key)] = strings.TrimSpace(value)
		}
	}
	return cpu
}
