package host_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process/processconnect"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
)

// programs is an agent in whose guest these programs are: each prints, and returns
// its exit status. One that is negative runs until it is killed.
type programs struct {
	processconnect.UnimplementedProcessHandler
	known map[string]func(print func(string)) int

	mu      sync.Mutex
	started []string // as "program|argument|…", with the record in brackets
	running map[uint32]chan struct{}
}

// serve puts it into the guests of a rig.
func (g *programs) serve(r *rig) {
	g.running = map[uint32]chan struct{}{}
	mux := http.NewServeMux()
	mux.Handle(processconnect.NewProcessHandler(g))
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	hostile(r, mux)
}

func (g *programs) log() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.started)
}

func (g *programs) alive() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.running)
}

func (g *programs) Start(ctx context.Context, req *connect.Request[process.StartRequest], stream *connect.ServerStream[process.StartResponse]) error {
	config := req.Msg.GetProcess()
	program, ok := g.known[config.GetCmd()]
	if !ok {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("command not found: %q", config.GetCmd()))
	}
	pid, killed := g.begin(config, req.Header().Get(guestapi.HeaderRecord))
	send := func(e *process.ProcessEvent) { _ = stream.Send(&process.StartResponse{Event: e}) } // whoever has left is not told
	send(&process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: pid}}})
	code := program(func(text string) {
		send(&process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: &process.ProcessEvent_DataEvent{
			Output: &process.ProcessEvent_DataEvent_Stdout{Stdout: []byte(text)},
		}}})
	})
	end := &process.ProcessEvent_EndEvent{ExitCode: int32(code), Exited: true, Status: fmt.Sprintf("exit status %d", code)}
	if code < 0 {
		select {
		case <-killed:
			end.Exited, end.Status = false, "signal: killed"
		case <-ctx.Done(): // who goes away kills nothing
			return ctx.Err()
		}
	}
	g.end(pid)
	send(&process.ProcessEvent{Event: &process.ProcessEvent_End{End: end}})
	return nil
}

func (g *programs) begin(config *process.ProcessConfig, record string) (uint32, chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	line := strings.Join(append([]string{config.GetCmd()}, config.GetArgs()...), "|")
	if record != "" {
		line += " [" + record + "]"
	}
	g.started = append(g.started, line)
	pid, killed := uint32(len(g.started)), make(chan struct{})
	g.running[pid] = killed
	return pid, killed
}

func (g *programs) end(pid uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.running, pid)
}

func (g *programs) SendSignal(_ context.Context, req *connect.Request[process.SendSignalRequest]) (*connect.Response[process.SendSignalResponse], error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if killed := g.running[req.Msg.GetProcess().GetPid()]; killed != nil {
		close(killed)
	}
	return connect.NewResponse(&process.SendSignalResponse{}), nil
}

// guestPrograms are those of most tests here. "third" is well when it is asked for
// the third time.
func guestPrograms() *programs {
	asked := 0
	exits := func(code int, says string) func(func(string)) int {
		return func(print func(string)) int {
			if says != "" {
				print(says)
			}
			return code
		}
	}
	return &programs{known: map[string]func(func(string)) int{
		"server": exits(-1, "listening\n"), "bash": exits(0, ""), "daemon": exits(0, "in the background\n"), "broken": exits(3, "no configuration\n"),
		"well": exits(0, ""), "ill": exits(1, "connection refused\n"), "hangs": exits(-1, "asking\n"), "/bin/sh": exits(0, ""), "/bin/zsh": exits(0, ""),
		"third": func(print func(string)) int {
			if asked++; asked < 3 {
				print("not yet\n")
				return 1
			}
			return 0
		},
	}}
}

func check(words ...string) *template.Healthcheck {
	return &template.Healthcheck{Test: words, Interval: 20 * time.Millisecond, Timeout: 5 * time.Second, Retries: 2}
}

func TestStartUp(t *testing.T) {
	hanging := check("CMD", "hangs")
	hanging.Timeout = 50 * time.Millisecond
	later := check("CMD", "third")
	later.Retries = 100
	endless := check("CMD", "third") // 292 years each
	endless.StartPeriod, endless.Interval, endless.Timeout, endless.Retries = math.MaxInt64, math.MaxInt64, math.MaxInt64, math.MaxInt
	patient := check("CMD", "ill")
	patient.StartPeriod = time.Hour
	for _, tt := range []struct {
		name   string
		config *template.ImageConfig
		change func(*host.CreateRequest)
		ran    []string // what the guest ran, repetitions left out
		cause  sandbox.Cause
		kind   sandbox.Kind
		says   []string
	}{
		{name: "an image that wants nothing", config: &template.ImageConfig{}},
		{name: "a server", config: &template.ImageConfig{Start: []string{"server", "--port", "80"}}, ran: []string{"server|--port|80 [start]"}},
		{name: "a shell, which finds no input", config: &template.ImageConfig{Start: []string{"bash"}}, ran: []string{"bash [start]"}},
		{
			name: "a server that is not asked for", config: &template.ImageConfig{Start: []string{"server"}, Healthcheck: check("CMD", "ill")},
			change: func(r *host.CreateRequest) { r.NoStart = true },
		},
		{
			name: "a program that is not there", config: &template.ImageConfig{Start: []string{"nothing"}},
			cause: sandbox.CauseStartFailed, kind: sandbox.KindInvalid, says: []string{`the start command "nothing" cannot be started: command not found`},
		},
		{name: "a server that is well", config: &template.ImageConfig{Start: []string{"server"}, Healthcheck: check("CMD", "well", "-q")}, ran: []string{"server [start]", "well|-q"}},
		{name: "a server that is well later", config: &template.ImageConfig{Start: []string{"server"}, Healthcheck: later}, ran: []string{"server [start]", "third"}},
		{name: "a line for a shell", config: &template.ImageConfig{Healthcheck: check("CMD-SHELL", "curl -f x || exit 1")}, ran: []string{"/bin/sh|-c|curl -f x || exit 1"}},
		{
			name: "a line for another shell", config: &template.ImageConfig{Shell: []string{"/bin/zsh", "-ec"}, Healthcheck: check("CMD-SHELL", "true")},
			ran: []string{"/bin/zsh|-ec|true"},
		},
		{name: "a check that has all the time there is", config: &template.ImageConfig{Healthcheck: endless}, ran: []string{"third"}},
		{name: "no check", config: &template.ImageConfig{Start: []string{"server"}, Healthcheck: check("NONE")}, ran: []string{"server [start]"}},
		{name: "a check without words", config: &template.ImageConfig{Start: []string{"server"}, Healthcheck: check()}, ran: []string{"server [start]"}},
		{name: "a check of an unknown kind", config: &template.ImageConfig{Start: []string{"server"}, Healthcheck: check("ASK", "ill")}, ran: []string{"server [start]"}},
		{name: "one that leaves a daemon behind", config: &template.ImageConfig{Start: []string{"daemon"}, Healthcheck: later}, ran: []string{"daemon [start]", "third"}},
		{
			name: "a server that is never well", config: &template.ImageConfig{Start: []string{"server"}, Healthcheck: check("CMD", "ill")}, ran: []string{"server [start]", "ill"},
			cause: sandbox.CauseNotReady, kind: sandbox.KindTimeout,
			says: []string{"the health check has failed 2 times; at last: exit status 1, its output ends with:\nconnection refused\nthe output of the start command ends with:\nlistening"},
		},
		{
			name: "a check that hangs", config: &template.ImageConfig{Start: []string{"daemon"}, Healthcheck: hanging}, ran: []string{"daemon [start]", "hangs"},
			cause: sandbox.CauseNotReady, kind: sandbox.KindTimeout,
			says: []string{"at last: it took longer than 50ms, its output ends with:\nasking", "the start command has ended: exit status 0"},
		},
		{
			name: "a check that is not there", config: &template.ImageConfig{Healthcheck: check("CMD", "curl")},
			cause: sandbox.CauseNotReady, kind: sandbox.KindTimeout, says: []string{`at last: command not found: "curl"`},
		},
		{
			name: "a start period that is longer than anybody waits", config: &template.ImageConfig{Healthcheck: patient}, ran: []string{"ill"},
			cause: sandbox.CauseNotReady, kind: sandbox.KindTimeout, says: []string{"the health check has not succeeded within 1s, the most that a create waits"},
		},
		{
			name: "a command that fails before it is ready", config: &template.ImageConfig{Start: []string{"broken"}, Healthcheck: check("CMD", "hangs")}, ran: []string{"broken [start]", "hangs"},
			cause: sandbox.CauseStartFailed, kind: sandbox.KindInvalid,
			says: []string{"the start command ended before it was ready: exit status 3; its output ends with:\nno configuration"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, g := newRig(t), guestPrograms()
			g.serve(r)
			r.config = tt.config
			r.agentCfg = func(c *host.Config) { c.ReadyTimeout = 2 * time.Minute }
			if tt.config.Healthcheck == patient {
				r.agentCfg = func(c *host.Config) { c.ReadyTimeout = time.Second }
			}
			r.open()
			req := r.request()
			if tt.change != nil {
				tt.change(&req)
			}
			_, err := r.agent.Create(t.Context(), req)
			s := r.status(req.ID)
			if ran := slices.Compact(g.log()); !slices.Equal(ran, tt.ran) && !(tt.cause == sandbox.CauseStartFailed && len(ran) > 0 && ran[0] == tt.ran[0]) {
				t.Errorf("the guest ran %q, want %q", ran, tt.ran)
			}
			if tt.cause == "" {
				if err != nil || s.State != "running" {
					t.Errorf("it is %s, %v", s.State, err)
				}
				return
			}
			if !sandbox.Is(err, tt.kind) || s.State != "ended" || s.Cause != tt.cause {
				t.Errorf("it is %s (%s), error of kind %s: %v", s.State, s.Cause, sandbox.KindOf(err), err)
			}
			for _, says := range tt.says {
				if !strings.Contains(err.Error(), says) || !strings.Contains(s.Detail, says) {
					t.Errorf("%q is not in the error or in the record:\n%v\n%s", says, err, s.Detail)
				}
			}
			if left := r.leftovers(); len(left) > 0 {
				t.Errorf("left on the host: %v", left)
			}
		})
	}
}

// TestStartCommandOutlivesItsCreator: it is nobody's call that a stopped agent
// would end.
func TestStartCommandOutlivesItsCreator(t *testing.T) {
	r, g := newRig(t), guestPrograms()
	g.serve(r)
	r.config = &template.ImageConfig{Start: []string{"server"}, Healthcheck: check("CMD", "well")}
	r.open()
	r.mustCreate()
	if err := r.agent.Close(); err != nil {
		t.Fatal(err)
	}
	if n := g.alive(); n != 1 {
		t.Errorf("%d of its processes are left", n)
	}
}

// startPoints are the failpoints of a create that starts something.
func startPoints(t *testing.T, config *template.ImageConfig) []string {
	r, g := newRig(t), guestPrograms()
	g.serve(r)
	r.config = config
	r.open()
	points := pointsOf(func() { r.mustCreate() })
	for _, p := range []string{"host/create/start", "host/create/ready"} {
		if !slices.Contains(points, p) {
			t.Fatalf("a create passes %v, and not %s", points, p)
		}
	}
	return []string{"host/create/start", "host/create/ready", "host/create/publish"}
}

func TestStartUpFailsAt(t *testing.T) {
	config := &template.ImageConfig{Start: []string{"server"}, Healthcheck: check("CMD", "well")}
	for _, point := range startPoints(t, config) {
		t.Run(point, func(t *testing.T) {
			r, g := newRig(t), guestPrograms()
			g.serve(r)
			r.config = config
			r.open()
			defer fault.Set(point, fault.Fail)()
			req := r.request()
			if _, err := r.agent.Create(t.Context(), req); !errors.Is(err, fault.ErrInjected) {
				t.Errorf("create: %v", err)
			}
			if s := r.status(req.ID); s.State != "ended" || s.Cause != sandbox.CauseCreateFailed {
				t.Errorf("it is %s (%s)", s.State, s.Cause)
			}
			if left := r.leftovers(); len(left) > 0 {
				t.Errorf("left on the host: %v", left)
			}
		})
	}
}

func TestStartUpKilledAt(t *testing.T) {
	config := &template.ImageConfig{Start: []string{"server"}, Healthcheck: check("CMD", "well")}
	for _, point := range startPoints(t, config) {
		t.Run(point, func(t *testing.T) {
			r, g := newRig(t), guestPrograms()
			g.serve(r)
			r.config = config
			r.open()
			req := r.request()
			r.killAt(point, func(dying *host.Agent) {
				_, _ = dying.Create(context.Background(), req) // it died
			})
			if s := r.status(req.ID); s.State != "ended" || s.Cause != sandbox.CauseAgentCrash {
				t.Errorf("after the restart: %s (%s)", s.State, s.Cause)
			}
			if left := r.leftovers(); len(left) > 0 {
				t.Errorf("left on the host: %v", left)
			}
		})
	}
}

// TestEndWhileItIsAwaited: a create that waits for a health check ends with its
// sandbox, whoever ends that, and has the cause.
func TestEndWhileItIsAwaited(t *testing.T) {
	for _, tt := range []struct {
		name  string
		test  string
		end   func(*rig, sandbox.ID) error
		cause sandbox.Cause
	}{
		{"it is destroyed between two questions", "ill", func(r *rig, id sandbox.ID) error {
			_, err := r.agent.Destroy(t.Context(), string(id), "")
			return err
		}, sandbox.CauseUser},
		{"its VM dies", "ill", func(r *rig, id sandbox.ID) error { return r.vms.Crash(id) }, sandbox.CauseVMMCrash},
		{"the host's disk is nearly full", "hangs", func(r *rig, _ sandbox.ID) error { r.free.Store(100 << 20); return nil }, sandbox.CauseCreateFailed},
		{"its VM dies while it is asked", "hangs", func(r *rig, id sandbox.ID) error { return r.vms.Crash(id) }, sandbox.CauseVMMCrash},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, g := newRig(t), guestPrograms()
			g.serve(r)
			waits := check("CMD", tt.test)
			waits.StartPeriod = time.Hour
			r.config = &template.ImageConfig{Start: []string{"server"}, Healthcheck: waits}
			r.open()
			req, failed := r.request(), make(chan error, 1)
			go func() {
				_, err := r.agent.Create(context.Background(), req)
				failed <- err
			}()
			testkit.Eventually(t, 10*time.Second, "asked", func() bool { return len(g.log()) > 1 })
			if err := tt.end(r, req.ID); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-failed:
				if err == nil {
					t.Error("the create has succeeded")
				}
			case <-time.After(30 * time.Second):
				t.Fatal("the create goes on")
			}
			testkit.Eventually(t, 10*time.Second, "ended", func() bool { return r.status(req.ID).State == "ended" })
			if s := r.status(req.ID); s.Cause != tt.cause {
				t.Errorf("it ended with %s (%s), want %s", s.Cause, s.Detail, tt.cause)
			}
			if left := r.leftovers(); len(left) > 0 {
				t.Errorf("left on the host: %v", left)
			}
		})
	}
}
