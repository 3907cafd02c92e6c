package host_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem/filesystemconnect"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process/processconnect"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/host/server"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmfake"
)

// TestLastWordsOfAGuest: a guest chooses the text of the kernel panic that it
// ends with. Whatever it is, the host can still say what it has: one that could
// not be encoded would cut control off from every other sandbox of the host.
func TestLastWordsOfAGuest(t *testing.T) {
	for name, words := range map[string]string{
		"no UTF-8":         "kernel panic: \xff\xfe",
		"orders":           "kernel panic: \x1b]0;owned\x07\x1b[2J",
		"cut in two":       "a" + strings.Repeat("€", 2000),
		"half a character": strings.Repeat("\xe2\x82", 3000),
		"a megabyte":       strings.Repeat("\x01\"", 1<<20),
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			panics := make(chan struct{})
			r.vms.Driver = vmmfake.New(func(ctx context.Context, m vmmfake.Inside) error {
				inner, cancel := context.WithCancel(ctx)
				defer cancel()
				go func() { <-panics; cancel() }()
				_ = r.guest(inner, m) // ends with inner
				return errors.New(words)
			})
			agent := r.open()
			id, other := r.mustCreate(), r.mustCreate()
			close(panics)
			testkit.Eventually(t, 5*time.Second, "both have ended", func() bool {
				return r.status(id).State == "ended" && r.status(other).State == "ended"
			})
			detail := r.status(id).Detail
			if !utf8.ValidString(detail) || strings.ContainsAny(detail, "\x1b\x07\x01") || len(detail) > 4100 {
				t.Errorf("the detail has %d bytes: %.200q", len(detail), detail)
			}
			_, handler := server.New(agent)
			local := hostapi.NewLocal(handler)
			defer func() { _ = local.Close() }() // the test's own
			list, err := hostapi.NewClient(local.Client(), local.BaseURL()).ListSandboxes(t.Context(), connect.NewRequest(&hostv1.ListSandboxesRequest{}))
			if err != nil || len(list.Msg.GetSandboxes()) != 2 {
				t.Fatalf("list: %v, %v", list, err)
			}
		})
	}
}

// hostile is a guest whose root has put a server of his own in the agent's place.
func hostile(r *rig, handler http.Handler) {
	r.vms.Driver = vmmfake.New(func(ctx context.Context, m vmmfake.Inside) error {
		r.networks.reach(m.Spec.NetNS, m.Listener.Addr().String())
		return vmmfake.Serve(handler)(ctx, m)
	})
}

// TestListThatExplodes: 16 MiB of entries of two bytes each are gigabytes once
// they are decoded, on the host and in control.
func TestListThatExplodes(t *testing.T) {
	entries := []byte(strings.Repeat("\x0a\x00", 4<<20))
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+filesystemconnect.FilesystemListDirProcedure, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/proto")
		_, _ = w.Write(entries)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	r := newRig(t)
	hostile(r, mux)
	agent := r.open()
	id := r.mustCreate()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	list, err := agent.ListDir(t.Context(), host.FileRef{ID: string(id), Path: "/"}, 1)
	runtime.ReadMemStats(&after)
	if err == nil || len(list) > 0 || !strings.Contains(err.Error(), "50000") {
		t.Errorf("a list of %d entries, %v", len(list), err)
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 64<<20 {
		t.Errorf("the answer of %d MiB took %d MiB to refuse", len(entries)>>20, used>>20)
	}
}

// deaf are networks of guests that answer no SYN.
type deaf struct {
	*networks
	now, most atomic.Int64
	silent    atomic.Bool
}

type deafNetwork struct {
	host.Network
	all *deaf
}

func (d *deaf) Acquire(ctx context.Context) (host.Network, error) {
	n, err := d.networks.Acquire(ctx)
	return deafNetwork{n, d}, err
}

func (n deafNetwork) Dial(ctx context.Context, address string) (net.Conn, error) {
	if !n.all.silent.Load() {
		return n.Network.Dial(ctx, address)
	}
	at := n.all.now.Add(1)
	defer n.all.now.Add(-1)
	for most := n.all.most.Load(); at > most && !n.all.most.CompareAndSwap(most, at); most = n.all.most.Load() {
	}
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestGuestThatAnswersNoSYN: each attempt to connect keeps a descriptor of the
// host, so there are only so many to one guest.
func TestGuestThatAnswersNoSYN(t *testing.T) {
	r := newRig(t)
	d := &deaf{networks: r.networks}
	r.agentCfg = func(c *host.Config) { c.Networks = d }
	agent := r.open()
	id := string(r.mustCreate())
	d.silent.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			if _, err := agent.Stat(ctx, host.FileRef{ID: id, Path: "/"}); err == nil {
				t.Error("a guest that is deaf has answered")
			}
		})
	}
	wg.Wait()
	if most := d.most.Load(); most > 8 {
		t.Errorf("%d attempts to connect at the same time", most)
	}
}

// immortal is an agent that starts everything, ends nothing, and keeps saying
// that it lives.
type immortal struct {
	processconnect.UnimplementedProcessHandler
}

func (immortal) Start(ctx context.Context, _ *connect.Request[process.StartRequest], stream *connect.ServerStream[process.StartResponse]) error {
	started := &process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: 7}}}
	alive := &process.ProcessEvent{Event: &process.ProcessEvent_Keepalive{Keepalive: &process.ProcessEvent_KeepAlive{}}}
	err := stream.Send(&process.StartResponse{Event: started})
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for err == nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			err = stream.Send(&process.StartResponse{Event: alive})
		}
	}
	return err
}

func (immortal) SendSignal(context.Context, *connect.Request[process.SendSignalRequest]) (*connect.Response[process.SendSignalResponse], error) {
	return connect.NewResponse(&process.SendSignalResponse{}), nil
}

// TestTimeoutHoldsAgainstTheAgent: a command's timeout ends the call also when
// the agent takes the signal and goes on.
func TestTimeoutHoldsAgainstTheAgent(t *testing.T) {
	const silence = 2 * time.Second // a busy machine is as silent as the guest
	defer host.SetSilence(silence)()
	mux := http.NewServeMux()
	mux.Handle(processconnect.NewProcessHandler(immortal{}))
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	r := newRig(t)
	hostile(r, mux)
	agent := r.open()
	id := string(r.mustCreate())
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	command := host.Command{Cmd: "sleep", Timeout: 2 * silence} // signs of life count until then
	start := time.Now()
	_, err := agent.Exec(ctx, id, command, nil, 0)
	if took := time.Since(start); err == nil || ctx.Err() != nil || took < command.Timeout {
		t.Errorf("after %v: %v", took, err)
	}
}
