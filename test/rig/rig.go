// Package rig runs whole servers for tests: the real binaries, as processes, on
// data directories of their own. It can kill them, start them again, and say
// what they left on the machine.
package rig

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// Binaries are the programs under test, built once per test process.
type Binaries struct{ Dormouse, Guest string }

var build = sync.OnceValues(func() (Binaries, error) {
	dir, err := os.MkdirTemp("", "dormouse-bin-")
	if err != nil {
		return Binaries{}, err
	}
	root, err := moduleRoot()
	if err != nil {
		return Binaries{}, err
	}
	b := Binaries{Dormouse: filepath.Join(dir, "dormouse"), Guest: filepath.Join(dir, "dormouse-guest")}
	for out, pkg := range map[string]string{b.Dormouse: "./cmd/dormouse", b.Guest: "./cmd/dormouse-guest"} {
		cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -X main.version=test", "-o", out, pkg)
		cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
		if text, err := cmd.CombinedOutput(); err != nil {
			return Binaries{}, fmt.Errorf("build %s: %w\n%s", pkg, err, text)
		}
	}
	return b, nil
})

// Build builds the binaries, or finds those that DORMOUSE_BIN names a folder of.
func Build(t testing.TB) Binaries {
	t.Helper()
	if dir := os.Getenv("DORMOUSE_BIN"); dir != "" {
		return Binaries{Dormouse: filepath.Join(dir, "dormouse"), Guest: filepath.Join(dir, "dormouse-guest")}
	}
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// RemoveBinaries deletes what Build built; TestMain calls it at the end.
func RemoveBinaries() {
	if os.Getenv("DORMOUSE_BIN") != "" {
		return
	}
	if b, err := build(); err == nil {
		_ = os.RemoveAll(filepath.Dir(b.Dormouse)) // temporary either way
	}
}

func moduleRoot() (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	return strings.TrimSpace(string(out)), err
}

// Options change how a server is run.
type Options struct {
	Args  []string // further arguments of up
	Env   []string // further environment, such as DORMOUSE_FAULT
	NetNS string   // run it in this named network namespace
}

// Server is one server on its own data directory. The directory outlives its
// processes.
type Server struct {
	t    testing.TB
	bin  Binaries
	opts Options

	Data     string
	Instance string // in the name of everything that it has on the machine
	URL      string
	Client   *client.Client

	cmd    *exec.Cmd
	ended  chan struct{}
	output *tape
}

// New makes a server that is not started. When the test ends it is taken down,
// and whatever it left on the machine fails the test.
func New(t testing.TB, opts Options) *Server {
	t.Helper()
	if _, shared := t.(*processLife); !shared { // For has asked the test
		require(t)
	}
	// Short, and open to the VMs' own users: sockets and disks are below it.
	data, err := os.MkdirTemp("", "dm-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(data, 0o711); err != nil {
		t.Fatal(err)
	}
	s := &Server{t: t, bin: Build(t), opts: opts, Data: data, Instance: instanceOf(data)}
	t.Cleanup(s.end)
	return s
}

// require skips a test on a machine that cannot run servers.
func require(t testing.TB) {
	t.Helper()
	testkit.Root(t)
	for _, tool := range []string{"qemu-system-x86_64", "mmdebstrap", "qemu-img"} {
		testkit.Tool(t, tool)
	}
}

// Start makes a server and starts it.
func Start(t testing.TB, opts Options) *Server {
	t.Helper()
	s := New(t, opts)
	s.Up()
	return s
}

// With changes the environment of the next start.
func (s *Server) With(env ...string) { s.opts.Env = env }

// Up starts the server and waits until it answers.
func (s *Server) Up() {
	s.t.Helper()
	s.Launch()
	s.await(testkit.Patience(3 * time.Minute))
}

// Launch starts the server's process and does not wait.
func (s *Server) Launch() {
	s.t.Helper()
	_ = os.Remove(filepath.Join(s.Data, "server.json")) // of the process before
	args := append([]string{"up", "--data", s.Data, "--listen", "127.0.0.1:0", "--accel", testkit.Accelerator()}, testkit.UpFlags()...)
	args = append(args, s.opts.Args...)
	argv := append([]string{s.bin.Dormouse}, args...)
	if s.opts.NetNS != "" {
		argv = append([]string{"ip", "netns", "exec", s.opts.NetNS}, argv...)
	}
	s.cmd = exec.Command(argv[0], argv[1:]...)
	s.cmd.Env = append(os.Environ(), s.opts.Env...)
	s.output = &tape{}
	s.cmd.Stdout, s.cmd.Stderr = s.output, s.output
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.ended = make(chan struct{})
	go func(cmd *exec.Cmd, ended chan struct{}) {
		_ = cmd.Wait() // the tests look at what it did, not at its status
		close(ended)
	}(s.cmd, s.ended)
}

// await waits for the server's own word that it listens, and makes a client.
func (s *Server) await(limit time.Duration) {
	s.t.Helper()
	deadline := time.Now().Add(limit)
	for {
		if s.readState() {
			break
		}
		select {
		case <-s.ended:
			s.t.Fatalf("the server ended:\n%s", s.Log())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the server does not come up within %v:\n%s", limit, s.Log())
		}
	}
	if s.Client == nil || s.opts.NetNS == "" {
		s.connect()
	}
}

func (s *Server) readState() bool {
	data, err := os.ReadFile(filepath.Join(s.Data, "server.json"))
	if err != nil {
		return false
	}
	var state struct {
		PID int    `json:"pid"`
		URL string `json:"url"`
	}
	if json.Unmarshal(data, &state) != nil || state.PID != s.cmd.Process.Pid {
		return false
	}
	s.URL = state.URL
	return true
}

// Log is what the server wrote since its last start.
func (s *Server) Log() string {
	if s.output == nil {
		return ""
	}
	return s.output.String()
}

// PID is the server's process.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Kill ends the server as kill -9 does.
func (s *Server) Kill() {
	s.t.Helper()
	_ = s.cmd.Process.Kill() // it may have killed itself already
	<-s.ended
}

// Ended is closed when the server's process is gone.
func (s *Server) Ended() <-chan struct{} { return s.ended }

// Stop ends the server as its operator does.
func (s *Server) Stop() {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
	select {
	case <-s.ended:
	case <-time.After(testkit.Patience(time.Minute)):
		s.t.Fatalf("the server does not stop:\n%s", s.Log())
	}
}

// Down runs dormouse down.
func (s *Server) Down() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience(3*time.Minute))
	defer cancel()
	argv := []string{s.bin.Dormouse, "down", "--data", s.Data}
	if s.opts.NetNS != "" {
		argv = append([]string{"ip", "netns", "exec", s.opts.NetNS}, argv...)
	}
	if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
		s.t.Errorf("dormouse down: %v\n%s", err, out)
	}
}

// end takes the server down and looks for leftovers.
func (s *Server) end() {
	if s.cmd != nil {
		if s.t.Failed() {
			s.t.Logf("the server's log:\n%s", s.Log())
		}
		s.Down()
		<-s.ended
		if left := s.Leftovers(); len(left) > 0 {
			s.t.Errorf("left on the machine after down:\n%s", strings.Join(left, "\n"))
		}
	}
	if err := os.RemoveAll(s.Data); err != nil {
		s.t.Error(err)
	}
}

// CLI runs the command line against this server, with input on its stdin.
func (s *Server) CLI(stdin string, args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience(2*time.Minute))
	defer cancel()
	cmd := exec.CommandContext(ctx, s.bin.Dormouse, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	cmd.Env = append(os.Environ(), "DORMOUSE_URL="+s.URL, "DORMOUSE_API_KEY="+s.Key())
	err := cmd.Run()
	if err != nil && cmd.ProcessState == nil {
		s.t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}
