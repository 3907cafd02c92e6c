package qemu

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/vmm"
)

// standInMachine is a handle on a process that only sleeps, with a control
// socket that is played by serve.
func standInMachine(t *testing.T, serve func(conn net.Conn, lines *bufio.Scanner)) *machine {
	t.Helper()
	m := unattended(t, serve)
	m.begin()
	t.Cleanup(func() {
		_ = m.Kill(context.Background()) // gone already in some tests
		_ = m.Release()
	})
	return m
}

// unattended is one that nobody watches or cares for yet.
func unattended(t *testing.T, serve func(conn net.Conn, lines *bufio.Scanner)) *machine {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid, err := kernel.OpenPidFD(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Release(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := fakeQEMU(t, hello, serve)
	if err := os.Symlink(path, filepath.Join(dir, socketName)); err != nil {
		t.Fatal(err)
	}
	var u undo.Stack // the handle takes everything over
	d := &Driver{config: withDefaults(Config{}), held: map[string]int{}}
	m := d.newMachine(vmm.Record{ID: "stand-in", Driver: Name, Dir: dir}, &u)
	m.pid = pid
	if _, err := m.openLogs(dir, nil, &fds{}, &inherit{}, &u); err != nil {
		t.Fatal(err)
	}
	if err := m.identify(); err != nil {
		t.Fatal(err)
	}
	if err := m.connect(limited(t), &u); err != nil {
		t.Fatal(err)
	}
	return m
}

// stops plays a QEMU that stops its VM and then says why.
func stops(state string, asked chan<- struct{}) func(conn net.Conn, lines *bufio.Scanner) {
	return func(conn net.Conn, lines *bufio.Scanner) {
		negotiate(conn, lines)
		_, _ = fmt.Fprintln(conn, `{"event": "STOP"}`)
		for {
			r, ok := next(lines)
			if !ok {
				return
			}
			reply(conn, r.ID, fmt.Sprintf(`"return": {"status": %q}`, state))
			asked <- struct{}{}
		}
	}
}

func TestAVMThatCannotGoOnIsEnded(t *testing.T) {
	m := standInMachine(t, stops("internal-error", make(chan struct{}, 1)))
	select {
	case <-m.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("it stands still for ever")
	}
	if e := m.Exit(); e.Cause != sandbox.CauseVMMCrash || !strings.Contains(e.Detail, "internal-error") {
		t.Errorf("%+v", e)
	}
}

func TestAVMThatSomebodyPausedIsLeftAlone(t *testing.T) {
	asked := make(chan struct{}, 1)
	m := standInMachine(t, stops("paused", asked))
	<-asked
	if _, err := m.state(limited(t)); err != nil { // the answer was taken in before this one
		t.Error(err)
	}
	select {
	case <-m.Done():
		t.Errorf("it was ended: %+v", m.Exit())
	default:
	}
}
