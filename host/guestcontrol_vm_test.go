package host_test

import (
	"bytes"
	"crypto/rand"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// witness is a program of the user: it counts, serves port 8000, talks to its own
// port through the loopback, and has a timer on the wall clock.
const witness = `
import ctypes, errno, os, signal, socket, threading, time

def tell(name, text):
    with open("/home/user/" + name, "a") as f:
        f.write(text)

def echo(conn, peer):
    try:
        while True:
            data = conn.recv(100)
            if not data:
                tell("ends", "end of file\n")
                return
            conn.sendall(data)
    except OSError as e:
        tell("ends", errno.errorcode[e.errno] + "\n")

def serve(listener):
    while True:
        threading.Thread(target=echo, args=listener.accept(), daemon=True).start()

def inner():
    conn = socket.create_connection(("127.0.0.1", 8000))
    while True:
        conn.sendall(b"x")
        if conn.recv(1) != b"x":
            tell("inner-ends", "it has ended\n")
            return
        tell("inner", "x")
        time.sleep(0.01)

alarms = 0
def alarm(*_):
    global alarms
    alarms += 1

class Timer(ctypes.Structure):
    _fields_ = [(n, ctypes.c_long) for n in ("every_s", "every_ns", "first_s", "first_ns")]

signal.signal(signal.SIGALRM, alarm)
libc = ctypes.CDLL(None)
timer = ctypes.c_void_p()
assert libc.timer_create(0, None, ctypes.byref(timer)) == 0
at = Timer(0, 20_000_000, int(time.time()), 0)
assert libc.timer_settime(timer, 1, ctypes.byref(at), None) == 0

listener = socket.create_server(("0.0.0.0", 8000))
threading.Thread(target=serve, args=(listener,), daemon=True).start()
threading.Thread(target=inner, daemon=True).start()
told = 0
while True:
    tell("ticks", "x")
    now = alarms
    tell("alarms", "x" * (now - told))
    told = now
    time.sleep(0.005)
`

// onResume is a hook of the image. It sees the new identity, and that the witness
// stands still.
const onResume = `#!/bin/sh
echo "$DORMOUSE_SANDBOX_ID $(hostname) $(id -u)"
before=$(stat -c %s /home/user/ticks); sleep 0.3; after=$(stat -c %s /home/user/ticks)
[ "$before" = "$after" ] && echo still
`

// realGuest is a sandbox in a real VM, with the witness in it.
type realGuest struct {
	t     *testing.T
	agent *host.Agent
	id    string
	ended chan error // the stream of a command that sleeps
}

func startRealGuest(t *testing.T) *realGuest {
	t.Helper()
	g := &realGuest{t: t, agent: realHost(t), id: string(sandbox.NewID()), ended: make(chan error, 1)}
	_, err := g.agent.Create(t.Context(), host.CreateRequest{
		ID: sandbox.ID(g.id), Deadline: time.Now().Add(20 * time.Minute),
		Spec: sandbox.Spec{Template: "base", VCPUs: 1, MemMiB: 512, DiskMiB: 4096},
	})
	if err != nil {
		t.Fatal(err)
	}
	g.write("/home/user/witness.py", witness)
	g.run("setsid python3 /home/user/witness.py > /home/user/errors 2>&1 < /dev/null &")
	go func() {
		_, err := g.agent.Exec(t.Context(), g.id, host.Command{Cmd: "sleep", Args: []string{"3600"}}, nil, 1<<16)
		g.ended <- err
	}()
	g.goesOn("ticks")
	g.goesOn("inner")
	return g
}

func (g *realGuest) write(path, text string) {
	g.t.Helper()
	if _, _, err := g.agent.WriteFile(g.t.Context(), host.FileRef{ID: g.id, Path: path}, strings.NewReader(text)); err != nil {
		g.t.Fatal(err)
	}
}

// read reads a file of the witness. The agent does it: it works while user
// processes stand still.
func (g *realGuest) read(name string) string {
	g.t.Helper()
	var data bytes.Buffer
	err := g.agent.ReadFile(g.t.Context(), host.FileRef{ID: g.id, Path: "/home/user/" + name},
		func(int64) error { return nil }, func(b []byte) error { data.Write(b); return nil })
	if err != nil && !sandbox.Is(err, sandbox.KindNotFound) {
		g.t.Fatal(err)
	}
	return data.String()
}

func (g *realGuest) goesOn(name string) {
	g.t.Helper()
	before := len(g.read(name))
	if !testkit.Poll(60*time.Second, func() bool { return len(g.read(name)) > before }) {
		g.t.Fatalf("%s do not go on; the witness says: %s", name, g.read("errors"))
	}
}

func (g *realGuest) standsStill() {
	g.t.Helper()
	before := g.read("ticks")
	for range 20 { // each takes longer than a tick
		if g.read("ticks") != before {
			g.t.Error("the witness runs")
			return
		}
	}
}

func (g *realGuest) run(shell string) string {
	g.t.Helper()
	res, err := g.agent.Exec(g.t.Context(), g.id, host.Command{Cmd: "/bin/sh", Args: []string{"-c", shell}}, nil, 1<<20)
	if err != nil || res.End.ExitCode != 0 {
		g.t.Fatalf("%s: %+v %s, %v", shell, res.End, res.Stderr, err)
	}
	return strings.TrimRight(string(res.Stdout), "\n")
}

// connect connects to the witness from outside.
func (g *realGuest) connect() *host.PortConn {
	g.t.Helper()
	conn, err := g.agent.OpenPort(g.t.Context(), g.id, 8000)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = conn.Close() }) // nothing was written
	if _, err := conn.Write([]byte("hello")); err != nil {
		g.t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 5)); err != nil {
		g.t.Fatal(err)
	}
	return conn
}

// TestARealGuest freezes one and lets it go on, as itself and as if it were a copy.
func TestARealGuest(t *testing.T) {
	if testkit.Accelerator() != "tcg" {
		testkit.Long(t, "minutes where KVM is emulated")
	}
	g := startRealGuest(t)
	g.isFrozenAndThawed(t)
	g.isToldThatItIsACopy(t)
}

func (g *realGuest) isFrozenAndThawed(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	for range 2 {
		began := time.Now()
		if err := g.agent.FreezeGuest(ctx, g.id, sandbox.ID(g.id), guestapi.Freeze{}); err != nil {
			t.Fatal(err)
		}
		t.Logf("freeze: %v", time.Since(began))
		g.standsStill()
	}
	began := time.Now()
	if err := g.agent.ThawGuest(ctx, g.id); err != nil {
		t.Fatal(err)
	}
	t.Logf("thaw: %v", time.Since(began))
	g.goesOn("ticks")
	g.goesOn("inner")

	// A host that is not heard of again. The agent has to know for this that the
	// machine has not been restored: it asks the disk.
	if err := g.agent.FreezeGuest(ctx, g.id, sandbox.ID(g.id), guestapi.Freeze{ThawAfterMs: 1000}); err != nil {
		t.Fatal(err)
	}
	g.goesOn("ticks")
	select {
	case err := <-g.ended:
		t.Errorf("the stream of a command has ended: %v", err)
	default:
	}
}

func (g *realGuest) isToldThatItIsACopy(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	g.write("/home/user/hook", onResume)
	oldID := g.run(`sudo mkdir -p /etc/dormouse/on-resume.d
sudo install -m 755 /home/user/hook /etc/dormouse/on-resume.d/10-witness
sudo sh -c 'test -s /etc/machine-id || echo 0123456789abcdef0123456789abcdef > /etc/machine-id'
cat /etc/machine-id; sudo date -s '-1 day' > /dev/null`) // a copy's clock stands where it was saved
	outside := g.connect()
	if err := g.agent.FreezeGuest(ctx, g.id, sandbox.ID(g.id), guestapi.Freeze{}); err != nil {
		t.Fatal(err)
	}
	alarms := len(g.read("alarms"))

	got := g.identify(sandbox.ID(g.id), guestapi.Init{SandboxID: "copy", Hostname: "copy", NewMachineID: true})
	if !got.Frozen || got.Dropped != 1 || len(got.Warnings) > 0 {
		t.Errorf("%+v", got)
	}
	if len(got.Hooks) != 1 || got.Hooks[0].Output != "copy copy 0\nstill\n" || got.Hooks[0].Error != "" {
		t.Errorf("the hook: %+v", got.Hooks)
	}
	g.goesOn("ticks")

	if _, err := outside.Read(make([]byte, 1)); err == nil {
		t.Error("a connection of the past lives")
	}
	testkit.Eventually(t, 60*time.Second, "told", func() bool { return g.read("ends") != "" })
	if ends := g.read("ends"); ends != "ECONNABORTED\n" {
		t.Errorf("the server's connection ended by %q", ends)
	}
	g.goesOn("inner")
	if ended := g.read("inner-ends"); ended != "" {
		t.Errorf("the connection within the guest: %s", ended)
	}
	_ = g.connect().Close() // who listens goes on
	select {
	case err := <-g.ended:
		if !sandbox.Is(err, sandbox.KindTransient) || !strings.Contains(err.Error(), "from a snapshot") {
			t.Errorf("the stream of a command: %v", err)
		}
	case <-time.After(testkit.Patience(60 * time.Second)):
		t.Error("the stream of a command goes on")
	}

	if day, err := time.Parse(time.RFC3339, g.run("date -u +%FT%TZ")); err != nil || time.Since(day).Abs() > 12*time.Hour {
		t.Errorf("user processes see %v, %v", day, err)
	}
	if id := g.run("cat /etc/machine-id"); id == oldID || len(id) != 32 {
		t.Errorf("the machine ID was %q and is %q", oldID, id)
	}
	if names := g.run("hostname; cat /etc/hostname; getent hosts copy | cut -d' ' -f1; echo $DORMOUSE_SANDBOX_ID"); names != "copy\ncopy\n127.0.1.1\ncopy" {
		t.Errorf("%q", names)
	}
	// Once more, and nobody in the way.
	g.run("sudo rm -r /etc/dormouse; sudo date -s '-1 day' > /dev/null")
	if err := g.agent.FreezeGuest(ctx, g.id, "copy", guestapi.Freeze{}); err != nil {
		t.Fatal(err)
	}
	if got := g.identify("copy", guestapi.Init{}); !got.Frozen || len(got.Hooks) > 0 {
		t.Errorf("%+v", got)
	}
	g.goesOn("ticks")

	// A day of a timer that ends 50 times a second would be more than four million.
	if now := len(g.read("alarms")); now-alarms > 20_000 {
		t.Errorf("a timer has ended %d times", now-alarms)
	}
}

// identify tells the guest who it is, and checks its clock: right within 100 ms, as
// far as the time of the call lets anybody see it.
func (g *realGuest) identify(before sandbox.ID, init guestapi.Init) guestapi.Identified {
	g.t.Helper()
	init.Entropy = make([]byte, 64)
	_, _ = rand.Read(init.Entropy)
	began := time.Now()
	got, err := g.agent.IdentifyGuest(g.t.Context(), g.id, before, init)
	ended := time.Now()
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Logf("identify: %v, %+v", ended.Sub(began), got)
	const allowed = 100 * time.Millisecond
	clock, err := time.Parse(time.RFC3339Nano, got.Clock)
	if err != nil || clock.Before(began.Add(-allowed)) || clock.After(ended.Add(allowed)) {
		g.t.Errorf("the guest's clock says %v between %v and %v: %v", clock, began, ended, err)
	}
	return got
}
