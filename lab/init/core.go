package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/sparse"
)

const (
	cores = results + "/cores"
	// corePattern makes the kernel hand cores to this program, outside of every
	// namespace and jail: PID as seen from here, signal, name.
	corePattern = "|" + self + " core %P %s %e"
	// maxCore cuts a core: QEMU's has the guest's memory in it.
	maxCore = 512 << 20
)

// saveCore writes the core file on its standard input, sparse.
func saveCore(args []string) (err error) {
	if len(args) < 3 {
		return fmt.Errorf("arguments %q", args)
	}
	name := strings.Map(func(r rune) rune {
		if r == '/' || r < ' ' {
			return '_'
		}
		return r
	}, strings.Join(args[2:], " "))
	path := filepath.Join(cores, fmt.Sprintf("%s.%s.sig%s.core", name, args[0], args[1]))
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = sparse.Copy(f, io.LimitReader(os.Stdin, maxCore))
	return err
}

func coreFiles() []string {
	entries, err := os.ReadDir(cores)
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// raiseLimits goes through package syscall, which else gives children the limit
// that this program was started with.
func raiseLimits() error {
	return errors.Join(
		syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 1 << 16, Max: 1 << 20}),
		syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}),
	)
}

// saveKernelLog keeps all of it, of which the console shows the louder part.
func saveKernelLog() {
	const readAll = 3 // SYSLOG_ACTION_READ_ALL
	text := make([]byte, 1<<20)
	n, err := unix.Klogctl(readAll, text)
	if err == nil {
		err = os.WriteFile(results+"/dmesg.txt", text[:n], 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab: save the kernel's log:", err)
	}
}
