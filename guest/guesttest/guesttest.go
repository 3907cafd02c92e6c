// Package guesttest runs a guest agent inside a test, as a plain part of the
// test's process. What it serves is what a VM's agent serves, without a VM.
package guesttest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	"github.com/dormouse-sandbox/dormouse/guest/agent"
	"github.com/dormouse-sandbox/dormouse/guest/exec"
	"github.com/dormouse-sandbox/dormouse/guest/files"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem/filesystemconnect"
	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process/processconnect"
	"github.com/dormouse-sandbox/dormouse/guest/identity"
	"github.com/dormouse-sandbox/dormouse/guest/reap"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// User is the name that the agent knows the test's own user by.
const User = "tester"

// Options change what Start starts. The zero value is an agent without a token.
type Options struct {
	Verifier *guestapi.Verifier
	Machine  agent.Machine
	Freezer  agent.Freezer
	Hooks    func(context.Context, identity.Identity) []guestapi.Hook
	PowerOff func()
	Token    string // the agent's and the clients'
	// ClientToken is the clients' alone: the agent gets it by an /init of the test.
	ClientToken string
	Reaper      *reap.Reaper
	Cgroup      string // see exec.Config
	Log         *slog.Logger
	Records     string // see exec.Config
}

// Guest is a running agent and clients for it.
type Guest struct {
	URL        string
	Home       string       // the user's home and the default working directory
	Handler    http.Handler // the agent itself
	Client     *http.Client
	Process    processconnect.ProcessClient
	Filesystem filesystemconnect.FilesystemClient

	transport *http.Transport
}

// Start runs an agent until the test ends.
func Start(t testing.TB, opts Options) *Guest {
	t.Helper()
	home := t.TempDir()
	current := identity.New(etc(t, home), User, "")
	if err := current.Apply(guestapi.Init{AccessToken: opts.Token}, false); err != nil {
		t.Fatal(err)
	}
	fileServer := files.New(current, nil)
	a := agent.New(agent.Config{
		Identity: current, Verifier: opts.Verifier, Machine: opts.Machine, Freezer: opts.Freezer, Hooks: opts.Hooks, PowerOff: opts.PowerOff,
		Exec:  exec.New(exec.Config{Identity: current, Reaper: opts.Reaper, Cgroup: opts.Cgroup, Records: opts.Records, Log: opts.Log}),
		Files: fileServer, Log: opts.Log,
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- a.Serve(ctx, listener) }()

	g := &Guest{URL: "http://" + listener.Addr().String(), Home: home, Handler: a}
	transport := &http.Transport{DisableCompression: true} // as the host's
	g.transport = transport
	g.Client = &http.Client{Transport: tokened{transport, cmp.Or(opts.ClientToken, opts.Token)}}
	g.Process = processconnect.NewProcessClient(g.Client, g.URL, connect.WithProtoJSON())
	g.Filesystem = filesystemconnect.NewFilesystemClient(g.Client, g.URL, connect.WithProtoJSON())
	t.Cleanup(func() {
		cancel()
		transport.CloseIdleConnections()
		if err := errors.Join(<-served, fileServer.Close()); err != nil {
			t.Error(err)
		}
	})
	return g
}

// Watch notes what the process has open now. The function it returns fails the
// test if that, once all calls are over, has grown: descriptors, goroutines, and
// memory by more than growth bytes.
func (g *Guest) Watch(t testing.TB, growth uint64) (done func()) {
	t.Helper()
	g.transport.CloseIdleConnections()
	fds, goroutines, heap := testkit.OpenFDs(t), runtime.NumGoroutine(), Heap()
	return func() {
		t.Helper()
		var haveFDs, haveGoroutines int
		defer func() {
			if t.Failed() {
				t.Logf("%d descriptors (before: %d), %d goroutines (%d)", haveFDs, fds, haveGoroutines, goroutines)
			}
		}()
		testkit.Eventually(t, 10*time.Second, "rid of all that was opened", func() bool {
			g.transport.CloseIdleConnections()
			haveFDs, haveGoroutines = testkit.OpenFDs(t), runtime.NumGoroutine()
			return haveFDs <= fds && haveGoroutines <= goroutines
		})
		if now := Heap(); now > heap+growth {
			t.Errorf("the heap grew from %d to %d KiB, at most %d KiB more are allowed", heap>>10, now>>10, growth>>10)
		}
	}
}

// Heap is what is in use, of client and agent together, in bytes.
func Heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // pools let go of what they hold at the second
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// etc makes a passwd and a group file in which the test's user is User.
func etc(t testing.TB, home string) account.Dir {
	t.Helper()
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	passwd := fmt.Sprintf("%s:x:%s:%s:Test User:%s:/bin/sh\nother:x:12345:12345::/nonexistent:/bin/sh\n", User, me.Uid, me.Gid, home)
	group := fmt.Sprintf("testers:x:%s:\nothers:x:12345:\nextra:x:12346:x,other\n", me.Gid)
	for name, text := range map[string]string{"passwd": passwd, "group": group} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return account.Dir(dir)
}

type tokened struct {
	next  http.RoundTripper
	token string
}

func (t tokened) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.token != "" {
		r = r.Clone(r.Context())
		r.Header.Set(guestapi.HeaderToken, t.token)
	}
	return t.next.RoundTrip(r)
}

// Result is what a command gave.
type Result struct {
	PID                 uint32
	Stdout, Stderr, PTY []byte
	End                 *processv1.ProcessEvent_EndEvent // nil if the stream broke off
}

// Shell is a request to run a script with /bin/sh.
func Shell(script string) *processv1.StartRequest {
	return &processv1.StartRequest{Process: &processv1.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", script}}}
}

// Run starts a command and collects everything until its stream ends.
func (g *Guest) Run(ctx context.Context, req *processv1.StartRequest) (Result, error) {
	stream, err := g.Process.Start(ctx, connect.NewRequest(req))
	if err != nil {
		return Result{}, err
	}
	defer func() { _ = stream.Close() }() // its error is stream.Err
	var res Result
	for stream.Receive() {
		res.Take(stream.Msg().GetEvent())
	}
	return res, stream.Err()
}

// Take adds one event.
func (r *Result) Take(event *processv1.ProcessEvent) {
	switch e := event.GetEvent().(type) {
	case *processv1.ProcessEvent_Start:
		r.PID = e.Start.GetPid()
	case *processv1.ProcessEvent_Data:
		r.Stdout = append(r.Stdout, e.Data.GetStdout()...)
		r.Stderr = append(r.Stderr, e.Data.GetStderr()...)
		r.PTY = append(r.PTY, e.Data.GetPty()...)
	case *processv1.ProcessEvent_End:
		r.End = e.End
	}
}

// Output is Stdout as a text without the last newline.
func (r Result) Output() string { return string(bytes.TrimRight(r.Stdout, "\n")) }
