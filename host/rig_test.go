package host_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/vmm"
	"github.com/dormouse-sandbox/dormouse/vmm/vmmfake"
)

// rig is a machine for agents to run on, made of fakes. It outlives them.
type rig struct {
	t        *testing.T
	dir      string
	vms      *machineRoom
	networks *networks
	disks    *disks
	groups   *groups
	free     atomic.Int64 // bytes of the host's disk
	image    string
	config   *template.ImageConfig // of the template
	bootID   string
	agent    *host.Agent
	agentCfg func(*host.Config)

	mu   sync.Mutex
	mute bool // guests that boot do not answer
	// onBoot is called by each guest before it answers.
	onBoot func(sandbox.ID)
	inits  int
	// insides are the guests that run, or ran last, and standing is whose processes
	// are frozen.
	insides  map[sandbox.ID]vmmfake.Inside
	standing map[sandbox.ID]bool
	origins  map[sandbox.ID]string // who they were before they were told
	ports    map[int]string        // where the ports of guests lead; others are closed
	sick     atomic.Bool           // guests are not well
	forgets  atomic.Bool           // its guests fail their rehearsal
}

func newRig(t *testing.T) *rig {
	t.Helper()
	if testkit.InLab() {
		testkit.Long(t, "over fakes, which are the same on the machine itself")
	}
	r := &rig{
		t: t, dir: t.TempDir(), bootID: "fake-boot",
		insides: map[sandbox.ID]vmmfake.Inside{}, standing: map[sandbox.ID]bool{}, origins: map[sandbox.ID]string{},
	}
	r.networks = &networks{rig: r, used: map[int]*network{}}
	r.disks = &disks{sizes: map[string]int64{}, copies: t.TempDir()}
	r.groups = &groups{made: map[string]*group{}}
	r.free.Store(100 << 30)
	r.vms = &machineRoom{Driver: vmmfake.New(r.guest), held: map[sandbox.ID]bool{}, cgroups: map[sandbox.ID]string{}}
	r.image = filepath.Join(r.dir, "root.ext4")
	if err := os.WriteFile(r.image, make([]byte, 4096), 0o444); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kernel", "initrd"} {
		if err := os.WriteFile(filepath.Join(r.dir, name), []byte(name), 0o444); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if r.agent != nil {
			_ = r.agent.Close()
		}
		r.vms.Reboot("end of test")
	})
	return r
}

// open starts an agent on the rig.
func (r *rig) open() *host.Agent {
	r.t.Helper()
	cfg := host.Config{
		Dir: filepath.Join(r.dir, "host"), RunDir: filepath.Join(r.dir, "run"), Instance: "test1",
		VMM: r.vms, Disks: []disk.Driver{r.disks}, Networks: r.networks, Templates: r,
		Groups: r.groups, FreeBytes: func(string) (int64, error) { return r.free.Load(), nil },
		Kernel: filepath.Join(r.dir, "kernel"), Initrd: filepath.Join(r.dir, "initrd"),
		BootTimeout: 10 * time.Second, RetryEvery: 20 * time.Millisecond, BootID: r.bootID,
		MaxMemMiB: 4096, MinFreeMiB: 1,
	}
	if r.agentCfg != nil {
		r.agentCfg(&cfg)
	}
	a, err := host.Open(r.t.Context(), cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.agent = a
	return a
}

// kill ends the agent as SIGKILL would: nothing is rolled back, released or
// written, and nobody holds its VMs and networks any more.
func (r *rig) kill() {
	r.agent.Abandon()
	r.networks.crash()
}

// restart kills the agent and starts the next one.
func (r *rig) restart() *host.Agent {
	r.t.Helper()
	r.kill()
	return r.open()
}

// killAt kills the agent in the middle of what do asks of it, at a point that
// this passes, and starts the next one. What was under way goes on only when the
// test is over, and then ends.
func (r *rig) killAt(point string, do func(dying *host.Agent)) {
	r.t.Helper()
	act, reached, goOn := wait(r.t)
	disarm := fault.Set(point, act)
	done, dying := make(chan struct{}), r.agent
	go func() {
		defer close(done)
		do(dying)
	}()
	<-reached
	r.t.Cleanup(func() {
		disarm()
		_ = r.agent.Close() // the thread of the dead one must find nobody at work
		r.agent = nil
		goOn <- fault.ErrInjected
		<-done
	})
	r.restart()
}

// wait makes a failpoint that waits for the test, the first time it is passed.
func wait(t *testing.T) (act fault.Action, reached <-chan struct{}, goOn chan<- error) {
	there, on := make(chan struct{}), make(chan error, 2)
	t.Cleanup(func() { on <- nil }) // also when the test has failed
	return fault.Nth(1, func(context.Context, string) error {
		close(there)
		return <-on
	}), there, on
}

// guest answers health and init, and prints a line on its console.
func (r *rig) guest(ctx context.Context, m vmmfake.Inside) error {
	_, _ = fmt.Fprintln(m.Console, "fake guest of", m.Spec.ID)
	r.networks.reach(m.Spec.NetNS, m.Listener.Addr().String())
	r.mu.Lock()
	mute := r.mute
	r.mu.Unlock()
	if r.onBoot != nil {
		r.onBoot(m.Spec.ID)
	}
	r.mu.Lock()
	r.insides[m.Spec.ID] = m
	r.mu.Unlock()
	if !m.Restored {
		_, _ = m.Memory.WriteAt([]byte("booted as "+m.Spec.ID), 0) // it never fails
	}
	if mute || ctx.Err() != nil {
		<-ctx.Done()
		return nil
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		if r.sick.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /init", func(w http.ResponseWriter, req *http.Request) {
		if !r.told(m, w, req) {
			return
		}
		r.mu.Lock()
		r.inits++
		r.mu.Unlock()
	})
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(guestapi.Metrics{CPUCount: m.Spec.VCPUs}) // whoever asks sees it
	})
	mux.HandleFunc("POST /freeze", func(w http.ResponseWriter, _ *http.Request) { r.stand(m.Spec.ID, true, w) })
	mux.HandleFunc("POST /thaw", func(w http.ResponseWriter, _ *http.Request) {
		if r.sick.Load() {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		r.stand(m.Spec.ID, false, w)
	})
	mux.HandleFunc("GET /files", func(w http.ResponseWriter, req *http.Request) {
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-req.Context().Done() // a download that never goes on
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	_ = server.Serve(m.Listener) // until the machine ends
	return nil
}

func (r *rig) Get(name string) (template.Template, error) {
	if name != "base" {
		return template.Template{}, sandbox.Errorf(sandbox.KindNotFound, "no template %q", name)
	}
	return template.Template{Name: "base", Image: r.image, ImageBytes: 4096, DefaultUser: "user", Config: r.config}, nil
}

func (r *rig) List() ([]template.Template, error) { return nil, nil }

func (r *rig) Log(name string) ([]byte, error) {
	_, err := r.Get(name)
	return []byte("the log of " + name + "\n"), err
}

// request is a create that should work.
func (r *rig) request() host.CreateRequest {
	return host.CreateRequest{
		ID: sandbox.NewID(), Deadline: time.Now().Add(time.Hour),
		Spec: sandbox.Spec{Template: "base", VCPUs: 1, MemMiB: 128, DiskMiB: 64},
	}
}

// mustCreate creates one.
func (r *rig) mustCreate() sandbox.ID {
	r.t.Helper()
	req := r.request()
	status, err := r.agent.Create(r.t.Context(), req)
	if err != nil {
		r.t.Fatal(err)
	}
	if status.State != "running" {
		r.t.Fatalf("state after create: %s", status.State)
	}
	return req.ID
}

// status finds what the agent says of a sandbox.
func (r *rig) status(id sandbox.ID) host.Status {
	for _, s := range r.agent.List() {
		if s.ID == id {
			return s
		}
	}
	return host.Status{}
}

// leftovers lists what is on the rig that belongs to sandboxes.
func (r *rig) leftovers() []string {
	r.t.Helper()
	var out []string
	for _, id := range r.vms.Running() {
		out = append(out, "vm "+string(id))
	}
	for _, name := range r.groups.names() {
		out = append(out, "control group "+name)
	}
	for _, i := range r.networks.inUse() {
		out = append(out, fmt.Sprint("network ", i))
	}
	for _, dir := range []string{"host/sandboxes", "run", "host/journal"} {
		entries, err := os.ReadDir(filepath.Join(r.dir, dir))
		if err != nil {
			r.t.Fatal(err)
		}
		for _, e := range entries {
			if filepath.Ext(e.Name()) != ".json" { // the record of why stays
				out = append(out, filepath.Join(dir, e.Name()))
			}
		}
	}
	return out
}

// machineRoom adds what a real driver finds out from the process table: which
// machines run that nobody of this agent holds.
type machineRoom struct {
	*vmmfake.Driver

	failFreeze atomic.Bool
	freezes    atomic.Int64

	mu      sync.Mutex
	held    map[sandbox.ID]bool
	cgroups map[sandbox.ID]string
}

func (m *machineRoom) cgroupOf(id sandbox.ID) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cgroups[id]
}

// freezable is a machine that may refuse to freeze.
type freezable struct {
	vmm.Machine
	room *machineRoom
}

func (f freezable) Freeze(ctx context.Context) error {
	f.room.freezes.Add(1)
	if f.room.failFreeze.Load() {
		return errors.New("it does not listen")
	}
	return f.Machine.Freeze(ctx)
}

func (m *machineRoom) Start(ctx context.Context, spec vmm.Spec) (vmm.Machine, error) {
	vm, err := m.Driver.Start(ctx, spec)
	m.hold(spec.ID, err == nil)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cgroups[spec.ID] = spec.Cgroup
	if err != nil {
		return nil, err
	}
	return freezable{vm, m}, nil
}

func (m *machineRoom) Adopt(ctx context.Context, record vmm.Record) (vmm.Machine, error) {
	vm, err := m.Driver.Adopt(ctx, record)
	m.hold(record.ID, err == nil)
	if err != nil {
		return nil, err
	}
	return freezable{vm, m}, nil
}

func (m *machineRoom) hold(id sandbox.ID, held bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.held[id] = held
}

func (m *machineRoom) crash() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.held)
}

func (m *machineRoom) Sweep(_ context.Context, root string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range m.Running() {
		if all := filepath.Base(root) == "run"; !m.held[id] && (all || filepath.Base(root) == string(id)) {
			_ = m.Crash(id) // gone already is as good
		}
	}
	return nil
}
