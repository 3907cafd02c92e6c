package host_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"

	"github.com/dormouse-sandbox/dormouse/cgroup"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// networks are slots that lead to fake machines.
type networks struct {
	rig *rig

	mu        sync.Mutex
	used      map[int]*network
	addresses map[string]string // namespace → where its guest listens
	everybody string            // who answers for every guest, gone or not; empty: each for itself
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

func (s *network) Dial(ctx context.Context, to string) (net.Conn, error) {
	s.all.mu.Lock()
	address, ok := s.all.addresses[s.NetNS()]
	if s.all.everybody != "" {
		address, ok = s.all.everybody, true
	}
	s.all.mu.Unlock()
	if !ok {
		return nil, errors.New("no guest yet")
	}
	if port := netip.MustParseAddrPort(to).Port(); port != guestapi.Port {
		if address = s.all.rig.port(int(port)); address == "" {
			return nil, fmt.Errorf("dial %s: %w", to, syscall.ECONNREFUSED)
		}
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

// groups are control groups that the test looks into.
type groups struct {
	mu     sync.Mutex
	made   map[string]*group
	limits map[string]cgroup.Limits
}

type group struct {
	all  *groups
	name string
}

func (g *groups) Create(name string, l cgroup.Limits) (host.Group, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.made[name] != nil {
		return nil, os.ErrExist
	}
	if g.limits == nil {
		g.limits = map[string]cgroup.Limits{}
	}
	g.made[name], g.limits[name] = &group{g, name}, l
	return g.made[name], nil
}

func (g *groups) Find(name string) host.Group { return &group{g, name} }

func (g *groups) Sweep(_ context.Context, keep func(string) bool) error {
	for _, name := range g.names() {
		if !keep(name) {
			_ = g.Find(name).Remove(context.Background()) // it never fails
		}
	}
	return nil
}

func (g *groups) names() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Sorted(maps.Keys(g.made))
}

func (g *group) Path() string { return "/fake-cgroup/" + g.name }

// OOMKilled: what a test calls oom, the kernel has killed.
func (g *group) OOMKilled() (bool, error) {
	g.all.mu.Lock()
	defer g.all.mu.Unlock()
	return g.all.limits[g.name].PIDs == oomPIDs && g.all.made[g.name] != nil, nil
}

const oomPIDs = -1

// oomKill marks a group as one in which the kernel has killed.
func (g *groups) oomKill(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.limits[name] = cgroup.Limits{PIDs: oomPIDs}
}

func (g *group) Remove(context.Context) error {
	g.all.mu.Lock()
	defer g.all.mu.Unlock()
	delete(g.all.made, g.name)
	return nil
}
