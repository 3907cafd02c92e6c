package host_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/host"
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
	image    string
	bootID   string
	agent    *host.Agent
	agentCfg func(*host.Config)

	mu   sync.Mutex
	mute bool // guests that boot do not answer
	// onBoot is called by each guest before it answers.
	onBoot func(sandbox.ID)
	inits  int
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), bootID: "fake-boot"}
	r.networks = &networks{rig: r, used: map[int]*network{}}
	r.disks = &disks{}
	r.vms = &machineRoom{Driver: vmmfake.New(r.guest), held: map[sandbox.ID]bool{}}
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
		VMM: r.vms, Disks: r.disks, Networks: r.networks, Templates: r,
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
	if mute || ctx.Err() != nil {
		<-ctx.Done()
		return nil
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("POST /init", func(w http.ResponseWriter, _ *http.Request) {
		r.mu.Lock()
		r.inits++
		r.mu.Unlock()
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET /files", func(w http.ResponseWriter, req *http.Request) {
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-req.Context().Done() // a download that never goes on
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	_ = server.Serve(m.Listener) // until the machine ends
	return nil
}

func (r *rig) Get(name string) (template.Template, error) {
	if name != "base" {
		return template.Template{}, sandbox.Errorf(sandbox.KindNotFound, "no template %q", name)
	}
	return template.Template{Name: "base", Image: r.image, ImageBytes: 4096, DefaultUser: "user"}, nil
}

func (r *rig) List() ([]template.Template, error) { return nil, nil }

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

	mu   sync.Mutex
	held map[sandbox.ID]bool
}

func (m *machineRoom) Start(ctx context.Context, spec vmm.Spec) (vmm.Machine, error) {
	vm, err := m.Driver.Start(ctx, spec)
	m.hold(spec.ID, err == nil)
	return vm, err
}

func (m *machineRoom) Adopt(ctx context.Context, record vmm.Record) (vmm.Machine, error) {
	vm, err := m.Driver.Adopt(ctx, record)
	m.hold(record.ID, err == nil)
	return vm, err
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

// networks are slots that lead to fake machines.
type networks struct {
	rig *rig

	mu        sync.Mutex
	used      map[int]*network
	addresses map[string]string // namespace → where its guest listens
	adoptErr  error
	openErr   error
	sweepErr  error
	swept     int
}

type network struct {
	all   *networks
	index int
	owned bool // by this agent: not for the sweep
}

func (n *networks) reach(ns, address string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.addresses == nil {
		n.addresses = map[string]string{}
	}
	n.addresses[ns] = address
}

func (n *networks) inUse() []int {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []int
	for i := range n.used {
		out = append(out, i)
	}
	return out
}

func (n *networks) failAdopt(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.adoptErr = err
}

func (n *networks) failOpen(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.openErr = err
}

func (n *networks) failSweep(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sweepErr = err
}

func (n *networks) Acquire(context.Context) (host.Network, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i := 0; ; i++ {
		if n.used[i] == nil {
			n.used[i] = &network{all: n, index: i, owned: true}
			return n.used[i], nil
		}
	}
}

func (n *networks) Adopt(_ context.Context, index int) (host.Network, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.adoptErr != nil {
		return nil, n.adoptErr
	}
	slot := n.used[index]
	if slot == nil {
		return nil, sandbox.Errorf(sandbox.KindNotFound, "no slot %d", index)
	}
	if slot.owned {
		return nil, sandbox.Errorf(sandbox.KindConflict, "slot %d is in use", index)
	}
	slot.owned = true
	return slot, nil
}

// crash forgets who owns what, as the death of the process does.
func (n *networks) crash() {
	n.rig.vms.crash()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, slot := range n.used {
		slot.owned = false
	}
}

func (n *networks) Sweep(context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.swept++
	if n.sweepErr != nil {
		return n.sweepErr
	}
	for i, slot := range n.used {
		if !slot.owned {
			delete(n.used, i)
		}
	}
	return nil
}

func (s *network) Index() int                 { return s.index }
func (s *network) NetNS() string              { return fmt.Sprint("fake-ns-", s.index) }
func (s *network) OpenTap() (*os.File, error) { return os.Open(os.DevNull) }
func (s *network) MAC() string                { return "02:00:00:00:00:01" }
func (s *network) Guest() netip.Prefix        { return netip.MustParsePrefix("100.127.255.2/30") }

func (s *network) Gateway() netip.Addr { return netip.MustParseAddr("100.127.255.1") }

func (s *network) SetInternet(context.Context, bool) error {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	return s.all.openErr
}

func (s *network) Dial(ctx context.Context, _, _ string) (net.Conn, error) {
	s.all.mu.Lock()
	address, ok := s.all.addresses[s.NetNS()]
	s.all.mu.Unlock()
	if !ok {
		return nil, errors.New("no guest yet")
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", address)
}

func (s *network) Close(context.Context) error {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	delete(s.all.used, s.index)
	delete(s.all.addresses, s.NetNS())
	return nil
}

// disks are plain files.
type disks struct{}

type fakeDisk struct{ path string }

func (disks) Create(_ context.Context, c disk.Config) (disk.Disk, error) {
	path := filepath.Join(c.Dir, "disk")
	return &fakeDisk{path}, os.WriteFile(path, nil, 0o600)
}

func (disks) Restore(_ context.Context, c disk.Config) (disk.Disk, error) {
	path := filepath.Join(c.Dir, "disk")
	if _, err := os.Stat(path); err != nil {
		return nil, sandbox.WithKind(sandbox.KindNotFound, err)
	}
	return &fakeDisk{path}, nil
}

func (d *fakeDisk) Path() string                { return d.path }
func (d *fakeDisk) Format() string              { return "raw" }
func (d *fakeDisk) Allocated() (int64, error)   { return 0, nil }
func (d *fakeDisk) Close(context.Context) error { return nil }
func (d *fakeDisk) Remove(context.Context) error {
	return errors.Join(ignoreMissing(os.Remove(d.path)))
}

func ignoreMissing(err error) error {
	if os.IsNotExist(err) {
		return nil
	}
	return err
}
