package netns_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// inside marks the process whose network namespace plays the host machine.
const inside = "DORMOUSE_NETNS_TEST_INSIDE"

// TestMain runs the tests in a network and mount namespace of their own: the
// real host's interfaces, rules and /run are neither seen nor touched.
func TestMain(m *testing.M) {
	switch what := os.Getenv(victim); {
	case what != "":
		if err := live(what); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	case os.Geteuid() != 0: // the tests skip themselves
		os.Exit(m.Run())
	case os.Getenv(inside) == "":
		os.Exit(again())
	}
	if err := settleIn(); err != nil {
		fmt.Fprintln(os.Stderr, "set up the test's own host:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func again() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread() // Pdeathsig follows the thread that started the child
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func settleIn() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return err
	}
	return command("ip", "link", "set", "lo", "up")
}

func command(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// run is for the test's own set-up, written as one line of a shell.
func run(t testing.TB, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
	return string(out)
}

// within runs fn in the named namespace; sockets that it makes stay there.
func within(ns string, fn func() error) error {
	if ns == "" {
		return fn()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := vnetns.Get()
		if err != nil {
			done <- err
			return
		}
		defer func() { _ = home.Close() }() // nothing was written
		there, err := vnetns.GetFromPath("/run/netns/" + ns)
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer func() { _ = there.Close() }() // nothing was written
		if err = vnetns.Set(there); err == nil {
			err = fn()
		}
		if vnetns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}
