package freezer_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/guest/freezer"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// group makes a cgroup below root.
func group(t *testing.T, root, name string) string {
	t.Helper()
	dir := filepath.Join(root, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// counter runs in a cgroup and writes to a file without end. The function it
// returns says how much.
func counter(t *testing.T, dir string) (written func() int64) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "count")
	start(t, dir, "while :; do echo x >> "+path+"; done")
	written = func() int64 {
		info, err := os.Stat(path)
		if err != nil {
			return 0
		}
		return info.Size()
	}
	goesOn(t, written)
	return written
}

// start runs a script in a cgroup until the test ends.
func start(t *testing.T, dir, script string) *exec.Cmd {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // a directory
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd()), Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // also of a frozen one
		_ = cmd.Wait()                                      // killed
	})
	return cmd
}

func goesOn(t *testing.T, written func() int64) {
	t.Helper()
	before := written()
	testkit.Eventually(t, 20*time.Second, "counting", func() bool { return written() > before })
}

// standsStill looks for long enough that a process that runs would have counted.
func standsStill(t *testing.T, written func() int64, other func() int64) {
	t.Helper()
	before := written()
	for range 3 {
		goesOn(t, other) // the time that another one needs
	}
	if now := written(); now != before {
		t.Errorf("it counted from %d to %d", before, now)
	}
}

func TestEverythingStandsStillButWhatIsSpared(t *testing.T) {
	root := testkit.Cgroup(t)
	spared := counter(t, group(t, root, "agent"))
	user := group(t, root, "user")
	command := counter(t, group(t, user, "run-1"))
	other := counter(t, group(t, root, "somebody-made-it"))
	group(t, root, "empty")
	f := freezer.New(root, "agent")

	for range 2 { // twice is fine
		if err := f.Freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		standsStill(t, command, spared)
		standsStill(t, other, spared)
	}
	for range 2 {
		if err := f.Thaw(); err != nil {
			t.Fatal(err)
		}
		goesOn(t, command)
		goesOn(t, other)
	}
}

func TestWhatIsFrozenCanBeKilled(t *testing.T) {
	root := testkit.Cgroup(t)
	cmd := start(t, group(t, root, "user"), "sleep 300 & wait")
	f := freezer.New(root)
	if err := f.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // returns: that is the test
	if err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
}

// TestAStoppedProcessAndOneThatWaitsForItsChildStandStill: both are asleep in the
// kernel in ways of their own.
func TestAStoppedProcessAndOneThatWaitsForItsChildStandStill(t *testing.T) {
	root := testkit.Cgroup(t)
	user := group(t, root, "user")
	stopped := start(t, user, "kill -STOP $$")
	testkit.Eventually(t, 10*time.Second, "stopped", func() bool {
		p, err := kernel.StatProc(stopped.Process.Pid)
		return err == nil && p.State == 'T'
	})
	start(t, user, "sleep 300; true")
	if err := freezer.New(root).Freeze(t.Context()); err != nil {
		t.Error(err)
	}
}

// sleeper starts a process that sleeps uninterruptibly: it asks a file system whose
// server never answers.
func sleeper(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	testkit.Require(t, "fuse", kernel.FUSE() == nil, "no /dev/fuse")
	device, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	at := t.TempDir()
	if err := unix.Mount("mute", at, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", device.Fd())); err != nil {
		t.Fatal(errors.Join(err, device.Close()))
	}
	t.Cleanup(func() {
		if err := errors.Join(device.Close(), unix.Unmount(at, unix.MNT_DETACH)); err != nil { // whoever waits is told that nobody will answer
			t.Error(err)
		}
	})
	cmd := start(t, dir, "exec cat "+at+"/file")
	wchan := fmt.Sprintf("/proc/%d/wchan", cmd.Process.Pid)
	testkit.Eventually(t, 20*time.Second, "asleep in the kernel", func() bool {
		p, err := kernel.StatProc(cmd.Process.Pid)
		where, _ := os.ReadFile(wchan) // of nobody: nowhere
		// In state D it also is while the program itself is read from a slow disk.
		return err == nil && p.State == 'D' && strings.HasPrefix(string(where), "fuse")
	})
	return cmd
}

func TestWhoSleepsInTheKernelIsNamedAndTheOthersGoOn(t *testing.T) {
	root := testkit.Cgroup(t)
	user := group(t, root, "user")
	count := counter(t, group(t, user, "run-1"))
	other := counter(t, group(t, root, "other"))
	asleep := sleeper(t, group(t, user, "run-2"))
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience(3*time.Second)) // enough to find out who does not
	defer cancel()
	err := freezer.New(root).Freeze(ctx)
	want := fmt.Sprintf("do not stand still in time: %d (cat) is in state D", asleep.Process.Pid)
	if !sandbox.Is(err, sandbox.KindTimeout) || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
	goesOn(t, count)
	goesOn(t, other)
}

func TestACancelledFreezeLetsThemGoOn(t *testing.T) {
	root := testkit.Cgroup(t)
	user := group(t, root, "user")
	count := counter(t, group(t, user, "run-1"))
	sleeper(t, group(t, user, "run-2")) // else it might be over before it is cancelled
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := freezer.New(root).Freeze(ctx); !errors.Is(err, context.Canceled) || sandbox.Is(err, sandbox.KindTimeout) {
		t.Error(err)
	}
	goesOn(t, count)
}

// TestIdleIsWhereNothingIsToFreeze: the spared are not asked, and what runs further
// down counts.
func TestIdleIsWhereNothingIsToFreeze(t *testing.T) {
	root := testkit.Cgroup(t)
	start(t, group(t, root, "agent"), "exec sleep 300")
	user := group(t, root, "user")
	run := group(t, user, "run-1")
	f := freezer.New(root, "agent")
	if idle, err := f.Idle(); err != nil || !idle {
		t.Errorf("with empty cgroups: %v, %v", idle, err)
	}
	cmd := start(t, run, "exec sleep 300")
	if idle, err := f.Idle(); err != nil || idle {
		t.Errorf("with a process: %v, %v", idle, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	if idle, err := f.Idle(); err != nil || !idle {
		t.Errorf("when it has ended: %v, %v", idle, err)
	}
	if idle, err := freezer.New(filepath.Join(root, "none")).Idle(); err == nil || idle {
		t.Errorf("where there is no cgroup: %v, %v", idle, err)
	}
}

func TestACgroupThatIsNoneIsAnError(t *testing.T) {
	dir := t.TempDir()
	if err := freezer.New(filepath.Join(dir, "missing")).Freeze(t.Context()); err == nil {
		t.Error("a missing root was frozen")
	}
	group(t, dir, "user") // an ordinary folder: cgroup.freeze would be a file like any other
	if err := freezer.New(dir).Freeze(t.Context()); err == nil {
		t.Error("a folder was frozen")
	}
}
