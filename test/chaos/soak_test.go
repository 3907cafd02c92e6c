package chaos_test

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// TestSoak does what users, operators and bad luck do, in an order that a seed
// decides, and asks after each step whether every sandbox that should live does.
// At the end the server is as it was at the beginning.
func TestSoak(t *testing.T) {
	testkit.Long(t, "it runs for five minutes, or for DORMOUSE_SOAK")
	length := 5 * time.Minute
	if d, err := time.ParseDuration(os.Getenv("DORMOUSE_SOAK")); err == nil {
		length = d
	}
	seed := uint64(time.Now().UnixNano())
	if n, err := strconv.ParseUint(os.Getenv("DORMOUSE_SEED"), 10, 64); err == nil {
		seed = n
	}
	t.Logf("DORMOUSE_SEED=%d", seed)

	k := &soak{t: t, s: rig.Start(t, rig.Options{}), rand: rand.New(rand.NewPCG(seed, 0)), counts: map[string]int{}}
	onlyThese(t, k.s)
	for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); {
		k.step()
	}
	t.Logf("%v", k.counts)
	k.destroyAll()
	k.flat()
	k.mounts()
}

// mostAtOnce bounds the sandboxes of a soak.
const mostAtOnce = 4

// soak is what the test knows to be true.
type soak struct {
	t      *testing.T
	s      *rig.Server
	rand   *rand.Rand
	alive  []*witness
	counts map[string]int
}

func (k *soak) step() {
	for _, deed := range []struct {
		name   string
		chance float64
		do     func()
	}{
		{"kill the server in a create", 0.08, k.killInCreate},
		{"kill the server", 0.08, func() { k.s.Kill(); k.s.Up() }},
		{"stop the server", 0.04, func() { k.s.Stop(); k.s.Up() }},
		{"kill a vm", 0.1, k.killVM},
		{"destroy", 0.2, k.destroy},
		{"create", 0.5, k.create},
		{"look", 1, func() {}},
	} {
		if k.rand.Float64() < deed.chance {
			k.counts[deed.name]++
			deed.do()
			break
		}
	}
	for _, w := range k.alive {
		w.check(k.t, k.s)
	}
}

func (k *soak) ids() []string {
	var ids []string
	for _, w := range k.alive {
		ids = append(ids, w.id)
	}
	return ids
}

func (k *soak) create() {
	if len(k.alive) < mostAtOnce {
		k.alive = append(k.alive, leave(k.t, k.s, create(k.t, k.s)))
	}
}

// pick takes a sandbox out of those that should live.
func (k *soak) pick() *witness {
	if len(k.alive) == 0 {
		return nil
	}
	i := k.rand.IntN(len(k.alive))
	w := k.alive[i]
	k.alive = slices.Delete(k.alive, i, i+1)
	return w
}

func (k *soak) destroy() {
	if w := k.pick(); w != nil {
		if sb, err := remove(k.t, k.s, w.id); err != nil || sb.State != "gone" {
			k.t.Errorf("destroy %s: %s, %v", w.id, sb.State, err)
		}
	}
}

func (k *soak) destroyAll() {
	for len(k.alive) > 0 {
		k.destroy()
	}
	onlyThese(k.t, k.s)
}

func (k *soak) killVM() {
	w := k.pick()
	if w == nil {
		return
	}
	for _, pid := range k.s.VMs() {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && strings.Contains(string(line), w.id) {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				k.t.Error(err)
			}
		}
	}
	wantEnd(k.t, ended(k.t, k.s, w.id), "failed", "vmm_crash")
}

// killInCreate kills the server at any moment of a create. What comes of the
// sandbox may be either; it is one of them, and soon.
func (k *soak) killInCreate() {
	known := all(k.t, k.s)
	ctx, cancel := context.WithCancel(k.t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = k.s.Client.CreateSandbox(ctx, small(time.Hour), "") // killed, or just before
	})
	moment := time.Duration(k.rand.Float64() * float64(6*time.Second))
	select {
	case <-time.After(moment): // not a wait for anything: it is the moment
	case <-k.s.Ended():
	}
	k.s.Kill()
	cancel()
	wg.Wait()
	k.s.Up()
	for id := range all(k.t, k.s) {
		if _, ok := known[id]; ok {
			continue
		}
		if sb := settled(k.t, k.s, id); sb.State == "running" {
			k.alive = append(k.alive, leave(k.t, k.s, id))
		} else {
			wantEnd(k.t, sb, "failed", "agent_crash")
		}
	}
	onlyThese(k.t, k.s, k.ids()...)
}

// flat compares one server process with itself before and after many calls.
func (k *soak) flat() {
	k.s.Kill()
	k.s.Up()
	round := func() {
		id := create(k.t, k.s)
		for range 10 {
			sh(k.t, k.s, id, "true")
		}
		if _, err := remove(k.t, k.s, id); err != nil {
			k.t.Error(err)
		}
		onlyThese(k.t, k.s)
		k.s.Client.CloseIdle()
	}
	round() // what is made once is made now
	before := k.uses()
	for range 5 {
		round()
	}
	// Slack for a connection that is about to be closed and a slot that is being
	// prepared; the runtime keeps threads that system calls once needed.
	const slack = 4
	var after usage
	ok := testkit.Poll(settleLimit, func() bool {
		after = k.uses()
		return after.fds <= before.fds+slack && after.goroutines <= before.goroutines+slack && after.threads <= before.threads+2*slack
	})
	k.t.Logf("before %+v, after %+v", before, after)
	if !ok {
		k.t.Errorf("the server grows from %+v to %+v", before, after)
	}
}

// usage is what the server process has of what leaks.
type usage struct{ fds, threads, goroutines int }

func (k *soak) uses() usage {
	proc := fmt.Sprintf("/proc/%d/", k.s.PID())
	return usage{len(entries(k.t, proc+"fd")), len(entries(k.t, proc+"task")), k.goroutines()}
}

// goroutines reads the server's own figure.
func (k *soak) goroutines() int {
	req, err := http.NewRequestWithContext(k.t.Context(), http.MethodGet, k.s.URL+"/metrics", nil)
	if err != nil {
		k.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+k.s.Key())
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		k.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }() // read only
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), "go_goroutines "); ok {
			n, err := strconv.Atoi(value)
			if err != nil {
				k.t.Fatal(err)
			}
			return n
		}
	}
	k.t.Fatal("/metrics has no go_goroutines")
	return 0
}

// mounts wants nothing of the server mounted but its namespaces and, once, what
// its page server composes.
func (k *soak) mounts() {
	known, images := k.s.Namespaces(), 0
	for _, line := range testkit.Mounts(k.t, k.s.Instance, k.s.Data) {
		where := strings.Fields(line)[1]
		if where == "/run/dormouse-"+k.s.Instance+".pages/images" {
			images++
			continue
		}
		if !slices.Contains(known, strings.Replace(where, "/var/run", "/run", 1)) {
			k.t.Errorf("left mounted: %s", line)
		}
	}
	if images != 1 {
		k.t.Errorf("the page server's mount is there %d times", images)
	}
}
