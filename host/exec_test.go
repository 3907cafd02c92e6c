package host_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process/processconnect"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// commands is an agent whose commands run until they are killed.
type commands struct {
	processconnect.UnimplementedProcessHandler
	starting func() // called for each, before it has a PID; nil does nothing
	deaf     bool   // takes no signal, and does not answer one

	mu      sync.Mutex
	running map[uint32]chan struct{}
	last    uint32
}

// serve puts it into the guests of a rig.
func (c *commands) serve(r *rig) {
	c.running = map[uint32]chan struct{}{}
	mux := http.NewServeMux()
	mux.Handle(processconnect.NewProcessHandler(c))
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	hostile(r, mux)
}

func (c *commands) alive() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.running)
}

func (c *commands) Start(ctx context.Context, _ *connect.Request[process.StartRequest], stream *connect.ServerStream[process.StartResponse]) error {
	killed := make(chan struct{})
	c.mu.Lock()
	c.last++
	pid := c.last
	c.running[pid] = killed
	c.mu.Unlock()
	if c.starting != nil {
		c.starting()
	}
	started := &process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: pid}}}
	if err := stream.Send(&process.StartResponse{Event: started}); err != nil {
		return err
	}
	select {
	case <-killed:
		ended := &process.ProcessEvent{Event: &process.ProcessEvent_End{End: &process.ProcessEvent_EndEvent{ExitCode: -1}}}
		return stream.Send(&process.StartResponse{Event: ended})
	case <-ctx.Done(): // who goes away kills nothing
		return ctx.Err()
	}
}

func (c *commands) SendSignal(ctx context.Context, req *connect.Request[process.SendSignalRequest]) (*connect.Response[process.SendSignalResponse], error) {
	if c.deaf {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if pid := req.Msg.GetProcess().GetPid(); c.running[pid] != nil {
		close(c.running[pid])
		delete(c.running, pid)
	}
	return connect.NewResponse(&process.SendSignalResponse{}), nil
}

// follow starts a command and reads its output to the end, as a stream does. Once
// the host knows of the command it calls started.
func follow(ctx context.Context, a *host.Agent, id sandbox.ID, started func()) error {
	p, err := a.Start(ctx, string(id), host.Command{Cmd: "sleep"}, false)
	if err != nil {
		return err
	}
	started()
	_, err = p.Output(func(_, _ []byte) error { return nil })
	p.Finish(err == nil)
	return err
}

// TestCommandOfACallerThatLeftEarly: he goes away when the agent has started his
// command, and before it has said so.
func TestCommandOfACallerThatLeftEarly(t *testing.T) {
	defer host.SetStartGrace(30 * time.Second)() // also on a busy machine he says it in time
	r := newRig(t)
	ctx, leave := context.WithCancel(t.Context())
	guest := &commands{starting: leave}
	guest.serve(r)
	agent := r.open()
	id := r.mustCreate()
	if err := follow(ctx, agent, id, func() {}); !errors.Is(err, context.Canceled) {
		t.Errorf("he was told %v", err)
	}
	if n := guest.alive(); n > 0 {
		t.Errorf("%d commands run on", n)
	}
	if err := follow(ctx, agent, id, func() {}); !errors.Is(err, context.Canceled) || guest.last != 1 {
		t.Errorf("a command was started for somebody who had left, %v", err)
	}
}

// TestCommandWhoseVMDiesBeforeItIsSaidToRun: its caller is told of that, and not of a
// connection that broke.
func TestCommandWhoseVMDiesBeforeItIsSaidToRun(t *testing.T) {
	r := newRig(t)
	var id sandbox.ID
	guest := &commands{starting: func() {
		if err := r.vms.Crash(id); err != nil {
			t.Error(err)
		}
	}}
	guest.serve(r)
	agent := r.open()
	id = r.mustCreate()
	if err := follow(t.Context(), agent, id, func() {}); err == nil || !strings.Contains(err.Error(), string(sandbox.CauseVMMCrash)) {
		t.Errorf("he was told %v", err)
	}
}

// TestNoCommandOutlivesAGracefulStop: those that somebody follows are killed
// when Close returns, and their followers are told why.
func TestNoCommandOutlivesAGracefulStop(t *testing.T) {
	const many = 20
	defer host.SetStartGrace(30 * time.Second)()
	defer host.SetStopLimit(30 * time.Second)()
	r, guest := newRig(t), &commands{}
	guest.serve(r)
	agent := r.open()
	id := r.mustCreate()
	ended := make(chan error, many)
	for range many {
		go func() { ended <- follow(context.Background(), agent, id, func() {}) }()
	}
	testkit.Eventually(t, 10*time.Second, "all run", func() bool { return guest.alive() == many })
	if err := agent.Close(); err != nil {
		t.Fatal(err)
	}
	if n := guest.alive(); n > 0 {
		t.Errorf("%d commands run on", n)
	}
	for range many {
		if err := <-ended; !sandbox.Is(err, sandbox.KindTransient) {
			t.Errorf("a follower was told %v", err)
		}
	}
	if _, err := agent.Start(t.Context(), string(id), host.Command{Cmd: "sleep"}, false); !sandbox.Is(err, sandbox.KindTransient) {
		t.Errorf("a start after the stop: %v", err)
	}
}

// TestNoGuestHoldsUpAStop: one that takes no signal is not waited for.
func TestNoGuestHoldsUpAStop(t *testing.T) {
	r, guest := newRig(t), &commands{deaf: true}
	guest.serve(r)
	agent := r.open()
	id := r.mustCreate()
	ended, started := make(chan error, 1), make(chan struct{})
	go func() { ended <- follow(context.Background(), agent, id, func() { close(started) }) }()
	select {
	case <-started:
	case err := <-ended:
		t.Fatalf("it does not run: %v", err)
	}
	start := time.Now()
	if err := agent.Close(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took > 10*time.Second { // it is 2 s; killing is given up after 30
		t.Errorf("the stop took %v", took)
	}
	r.vms.Reboot("the guest ends") // and with it the attempt to kill
	if err := <-ended; err == nil {
		t.Error("a command that was not killed has ended well")
	}
}

// TestWhoFollowsIsToldAtOnceOfTheEnd: where a VM was, nobody answers, and nobody
// waits for that.
func TestWhoFollowsIsToldAtOnceOfTheEnd(t *testing.T) {
	r, guest := newRig(t), &commands{}
	guest.serve(r)
	agent := r.open()
	id := r.mustCreate()
	ended, started := make(chan error, 1), make(chan struct{})
	go func() { ended <- follow(context.Background(), agent, id, func() { close(started) }) }()
	select {
	case <-started: // before that the host only knows that a call broke
	case err := <-ended:
		t.Fatalf("it does not run: %v", err)
	}
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = mute.Close() }() // nobody answers who calls
	r.networks.mu.Lock()
	r.networks.everybody = mute.Addr().String()
	r.networks.mu.Unlock()
	if err := r.vms.Crash(id); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err == nil || !strings.Contains(err.Error(), string(sandbox.CauseVMMCrash)) {
			t.Errorf("he was told %v", err)
		}
	case <-time.After(10 * time.Second): // killing is given up after 30
		t.Fatal("he is not told")
	}
}
