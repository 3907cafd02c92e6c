package kernel_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

func TestTSCIsMeasuredOnceAndPlausible(t *testing.T) {
	khz, err := kernel.TSCkHz()
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	again, err := kernel.TSCkHz()
	if err != nil || again != khz {
		t.Errorf("second answer %d, %v; the first was %d", again, err, khz)
	}
	if took := time.Since(start); took > 150*time.Millisecond { // measuring takes 200
		t.Errorf("the second answer took %v: measured again", took)
	}
	if khz < 500_000 || khz > 7_000_000 {
		t.Errorf("%d kHz is no frequency of a server's counter", khz)
	}
}

func TestBootIDIsStable(t *testing.T) {
	id, err := kernel.BootID()
	if err != nil || len(id) != 36 {
		t.Fatalf("boot ID %q, %v", id, err)
	}
}

// child starts a process that waits to be killed.
func child(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // gone already in some tests
		_ = cmd.Wait()
	})
	return cmd
}

func open(t *testing.T, pid int) *kernel.PidFD {
	t.Helper()
	p, err := kernel.OpenPidFD(pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

func TestWaitSeesTheEndAndReapTellsHow(t *testing.T) {
	p := open(t, child(t).Process.Pid)
	if p.Exited() {
		t.Fatal("a running process counts as ended")
	}
	done := make(chan error, 1)
	go func() { done <- p.Wait(t.Context()) }()
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	status, err := p.Reap()
	if err != nil || status.String() != "killed by signal SIGKILL" {
		t.Errorf("status %q, %v", status, err)
	}
	if err := p.Signal(syscall.SIGKILL); !errors.Is(err, kernel.ErrGone) {
		t.Errorf("signal to a reaped process: %v", err)
	}
}

func TestWaitEndsWithItsContextAndWithClose(t *testing.T) {
	p := open(t, child(t).Process.Pid)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := p.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait past its deadline: %v", err)
	}
	q := open(t, p.PID())
	done := make(chan error, 1)
	go func() { done <- q.Wait(context.Background()) }()
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("Wait on a closed descriptor reports an end")
	}
}

func TestReapLeavesRunningAndForeignProcessesAlone(t *testing.T) {
	p := open(t, child(t).Process.Pid)
	if status, err := p.Reap(); err != nil || status.Known {
		t.Errorf("a running child was reaped: %v, %v", status, err)
	}
	parent := open(t, os.Getppid())
	if status, err := parent.Reap(); err != nil || status.Known {
		t.Errorf("a process that is not our child has status %v, %v", status, err)
	}
}

func TestOpenProcessRefusesAStranger(t *testing.T) {
	pid := child(t).Process.Pid
	start, err := kernel.ProcStartTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	p, err := kernel.OpenProcess(pid, start)
	if err != nil {
		t.Fatal(err)
	}
	_ = p.Close()
	if _, err := kernel.OpenProcess(pid, start+1); !errors.Is(err, kernel.ErrGone) {
		t.Errorf("another start time: %v", err)
	}
	if _, err := kernel.OpenProcess(1<<22+1, start); !errors.Is(err, kernel.ErrGone) {
		t.Errorf("no such PID: %v", err)
	}
}

func TestOpenProcessReapsItsOwnZombie(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	if err := cmd.Process.Release(); err != nil {
		t.Fatal(err)
	}
	start, err := kernel.ProcStartTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, 5*time.Second, "a zombie", func() bool {
		p, err := kernel.StatProc(pid)
		return err == nil && p.State == 'Z'
	})
	if _, err := kernel.OpenProcess(pid, start); !errors.Is(err, kernel.ErrGone) {
		t.Errorf("a zombie was opened: %v", err)
	}
	if _, err := kernel.StatProc(pid); !errors.Is(err, kernel.ErrGone) {
		t.Errorf("the zombie is still there: %v", err)
	}
}

func TestStatReadsOddCommandNames(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	odd := filepath.Join(t.TempDir(), "a) R 1 (b")
	data, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(odd, data, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(odd, "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	p, err := kernel.StatProc(cmd.Process.Pid)
	if err != nil || p.Parent != os.Getpid() || p.StartTime == 0 {
		t.Errorf("%+v, %v; the parent is %d", p, err, os.Getpid())
	}
}

func TestWhoMayOpenANode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for mode, want := range map[os.FileMode]bool{0o600: true, 0o640: true, 0o644: true, 0o660: false, 0o606: false, 0o666: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if got := kernel.NodeShut(path); got != want {
			t.Errorf("%v: shut is %v, want %v", mode, got, want)
		}
	}
	if kernel.NodeShut(path + "/none") {
		t.Error("what is not there is shut")
	}
}

func TestProbesAnswerInSentences(t *testing.T) {
	for name, probe := range map[string]func() error{"/dev/kvm": kernel.KVM, "/dev/fuse": kernel.FUSE, "/dev/net/tun": kernel.TUN} {
		_, missing := os.Stat(name)
		err := probe()
		if missing != nil && (err == nil || !strings.Contains(err.Error(), name+" does not exist")) {
			t.Errorf("%s is missing and its probe says %v", name, err)
		}
		if err != nil && !strings.Contains(err.Error(), name) {
			t.Errorf("%q does not name %s", err, name)
		}
	}
	if v, err := kernel.CgroupVersion(); err == nil && v != 1 && v != 2 {
		t.Errorf("cgroup version %d", v)
	}
}
