package qemu

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
)

// firstFD is the number of the first inherited descriptor after stdio.
const firstFD = 3

// inherit collects the descriptors that a child gets, and nothing else does.
type inherit struct{ files []*os.File }

// add passes f on and says which number it will have in the child.
func (i *inherit) add(f *os.File) int {
	i.files = append(i.files, f)
	return firstFD + len(i.files) - 1
}

// close closes our side; the child has its own.
func (i *inherit) close() error {
	var errs []error
	for _, f := range i.files {
		errs = append(errs, f.Close())
	}
	i.files = nil
	return errors.Join(errs...)
}

// process is what to run.
type process struct {
	binary string
	args   []string
	output *os.File // stdout and stderr
	files  []*os.File
	uid    int
	gid    int
	groups []uint32
	netns  string
	cgroup string
}

// spawn starts p in a session of its own, with no new privileges, in its network
// namespace, and holds it by descriptor. It is not bound to our life.
//
// Namespace and no_new_privs are properties of the thread that forks. That
// thread is never used for anything else: its goroutine ends locked to it, and
// the runtime ends the thread.
func spawn(p process) (*kernel.PidFD, error) {
	type result struct {
		pid *kernel.PidFD
		err error
	}
	out := make(chan result)
	var run func()
	run = func() {
		runtime.LockOSThread() // never unlocked
		if unix.Gettid() == os.Getpid() {
			go run() // the main thread cannot be thrown away; while we hold it, this one lands on another
			runtime.Goexit()
		}
		pid, err := forkHere(p)
		out <- result{pid, err}
	}
	go run()
	r := <-out
	return r.pid, r.err
}

// forkHere changes the calling thread for good.
func forkHere(p process) (*kernel.PidFD, error) {
	if err := enterNetNS(p.netns); err != nil {
		return nil, err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("set no_new_privs: %w", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer func() { _ = null.Close() }() // nothing was written
	ignoreFileLimit()
	pidfd := -1
	sys := &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd, Credential: p.credential()}
	if p.cgroup != "" {
		group, err := os.Open(p.cgroup)
		if err != nil {
			return nil, fmt.Errorf("open control group: %w", err)
		}
		defer func() { _ = group.Close() }() // nothing was written
		sys.UseCgroupFD, sys.CgroupFD = true, int(group.Fd())
	}
	child, err := os.StartProcess(p.binary, append([]string{p.binary}, p.args...), &os.ProcAttr{
		Dir:   "/",
		Env:   []string{"LC_ALL=C"},
		Files: append([]*os.File{null, p.output, p.output}, p.files...),
		Sys:   sys,
	})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", p.binary, err)
	}
	return kernel.HoldChild(child, pidfd)
}

func enterNetNS(path string) error {
	if path == "" {
		return nil
	}
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer func() { _ = ns.Close() }() // nothing was written
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", path, err)
	}
	return nil
}

// credential is nil for the caller's own.
func (p process) credential() *syscall.Credential {
	if p.uid == 0 && p.gid == 0 {
		return nil
	}
	return &syscall.Credential{Uid: uint32(p.uid), Gid: uint32(p.gid), Groups: p.groups}
}
