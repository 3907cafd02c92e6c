// Package kernel asks the running kernel what it is and what it can do, and
// holds processes by descriptors instead of by numbers.
//
// A probe tries the thing itself (opens the node, makes the call) and answers
// with an error that says what is missing, never with a guess from a version
// number. What to do about a missing feature is the caller's business.
package kernel

import (
	"errors"
	"fmt"
	"os"
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
func CPUModel() string {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(data)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
