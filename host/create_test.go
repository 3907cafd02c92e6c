package host_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// pointsOf lists the failpoints that fn passes, once each, in order.
func pointsOf(fn func()) []string {
	var mu sync.Mutex
	var seen []string
	fault.Observe(func(point string) {
		mu.Lock()
		defer mu.Unlock()
		if !slices.Contains(seen, point) {
			seen = append(seen, point)
		}
	})
	defer fault.Observe(nil)
	fn()
	mu.Lock()
	defer mu.Unlock()
	return slices.DeleteFunc(slices.Clone(seen), func(p string) bool { return strings.HasPrefix(p, "vmmfake/kill") })
}

func createPoints(t *testing.T) []string {
	r := newRig(t)
	r.open()
	points := pointsOf(func() { r.mustCreate() })
	if len(points) < 12 {
		t.Fatalf("a create passes only %v", points)
	}
	return points
}

// TestCreateFailsAt fails every step of a create in turn and asks what was left.
func TestCreateFailsAt(t *testing.T) {
	for _, point := range createPoints(t) {
		t.Run(point, func(t *testing.T) {
			r := newRig(t)
			r.open()
			defer fault.Set(point, fault.Fail)()
			req := r.request()
			status, err := r.agent.Create(t.Context(), req)
			if !errors.Is(err, fault.ErrInjected) {
				t.Fatalf("create: %v, want the injected fault", err)
			}
			fault.Set(point, nil) // what cannot be written down at once is tried again
			if status.ID == "" {
				t.Fatal("the failed create has no status")
			}
			testkit.Eventually(t, 5*time.Second, "ended with a cause", func() bool {
				s := r.status(req.ID)
				return s.State == "ended" && s.Cause == sandbox.CauseCreateFailed && strings.Contains(s.Detail, "injected")
			})
			if left := r.leftovers(); len(left) > 0 {
				t.Errorf("left on the host: %v", left)
			}
			r.mustCreate() // and the host still works
		})
	}
}

// TestCreateKilledAt kills the agent at every step of a create and asks what
// the next one makes of it.
func TestCreateKilledAt(t *testing.T) {
	for _, point := range createPoints(t) {
		t.Run(point, func(t *testing.T) {
			r := newRig(t)
			r.open()
			req := r.request()
			r.killAt(point, func(dying *host.Agent) {
				_, _ = dying.Create(context.Background(), req) // it died
			})
			if s := r.status(req.ID); s.ID != "" && s.State != "running" {
				if s.State != "ended" || s.Cause != sandbox.CauseAgentCrash {
					t.Errorf("after the restart: %s (%s)", s.State, s.Cause)
				}
				if left := r.leftovers(); len(left) > 0 {
					t.Errorf("left on the host: %v", left)
				}
			}
			r.mustCreate()
		})
	}
}

func TestCreateTwiceIsOne(t *testing.T) {
	r := newRig(t)
	r.open()
	req := r.request()
	for range 2 {
		if _, err := r.agent.Create(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	if n := r.vms.Starts(); n != 1 {
		t.Errorf("%d VMs were started", n)
	}
	req.Spec.MemMiB = 256
	if _, err := r.agent.Create(t.Context(), req); !sandbox.Is(err, sandbox.KindExists) {
		t.Errorf("create with another spec: %v", err)
	}
}

func TestCreateRefuses(t *testing.T) {
	r := newRig(t)
	r.open()
	for _, tt := range []struct {
		name   string
		change func(*host.CreateRequest)
		want   string
	}{
		{"an ID that climbs", func(q *host.CreateRequest) { q.ID = "../../etc" }, `sandbox ID "../../etc" is not 24 characters`},
		{"a template that climbs", func(q *host.CreateRequest) { q.Spec.Template = "../x" }, `template name "../x" must match`},
		{"an unknown template", func(q *host.CreateRequest) { q.Spec.Template = "nope" }, `no template "nope"`},
		{"no vCPU", func(q *host.CreateRequest) { q.Spec.VCPUs = 0 }, "vcpus is 0, must be from 1 to 32"},
		{"a thousand vCPUs", func(q *host.CreateRequest) { q.Spec.VCPUs = 1000 }, "vcpus is 1000, must be from 1 to 32"},
		{"more memory than the host has", func(q *host.CreateRequest) { q.Spec.MemMiB = 5000 }, "mem_mib is 5000, which takes up to 5000 MiB here; this host has 4096 MiB"},
		{"a deadline in the past", func(q *host.CreateRequest) { q.Deadline = time.Now().Add(-time.Hour) }, "deadline: timeout is -1h"},
		{"a host name that climbs", func(q *host.CreateRequest) { q.Hostname = "a/b" }, `host name "a/b" must match`},
		{"a variable with a space", func(q *host.CreateRequest) { q.Spec.Env = map[string]string{"A B": "x"} }, `env name "A B" must match`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req := r.request()
			tt.change(&req)
			_, err := r.agent.Create(t.Context(), req)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("create: %v, want %q in it", err, tt.want)
			}
			if kind := sandbox.KindOf(err); kind != sandbox.KindInvalid && kind != sandbox.KindNotFound {
				t.Errorf("kind %s", kind)
			}
		})
	}
	if diff := cmp.Diff([]host.Status{}, r.agent.List()); diff != "" {
		t.Errorf("a refused create is remembered:\n%s", diff)
	}
}

func TestCreateStopsAtTheHostsMemory(t *testing.T) {
	r := newRig(t)
	r.agentCfg = func(c *host.Config) { c.MaxMemMiB = 256 }
	r.open()
	r.mustCreate()
	id := r.mustCreate()
	_, err := r.agent.Create(t.Context(), r.request())
	if !sandbox.Is(err, sandbox.KindBusy) || !strings.Contains(err.Error(), "256 of this host's 256 MiB") {
		t.Fatalf("third create: %v", err)
	}
	if _, err := r.agent.Destroy(t.Context(), string(id), ""); err != nil {
		t.Fatal(err)
	}
	r.mustCreate()
}

func TestBootThatHangsIsKilled(t *testing.T) {
	r := newRig(t)
	r.mute = true
	r.agentCfg = func(c *host.Config) { c.BootTimeout = 2 * time.Second } // it has printed its line by then
	r.open()
	req := r.request()
	_, err := r.agent.Create(t.Context(), req)
	if !sandbox.Is(err, sandbox.KindTimeout) || !strings.Contains(err.Error(), "fake guest of "+string(req.ID)) {
		t.Fatalf("create: %v, want a timeout with the console in it", err)
	}
	if s := r.status(req.ID); s.Cause != sandbox.CauseBootTimeout || s.State != "ended" {
		t.Errorf("status: %+v", s)
	}
	if left := r.leftovers(); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
}

func TestDestroyDuringCreate(t *testing.T) {
	r := newRig(t)
	r.mute = true
	r.open()
	req := r.request()
	failed := make(chan error)
	go func() {
		_, err := r.agent.Create(context.Background(), req)
		failed <- err
	}()
	testkit.Eventually(t, 5*time.Second, "booting", func() bool { return len(r.vms.Running()) == 1 })
	status, err := r.agent.Destroy(t.Context(), string(req.ID), sandbox.CauseUser)
	if err != nil || status.State != "ended" || status.Cause != sandbox.CauseUser {
		t.Fatalf("destroy: %+v, %v", status, err)
	}
	if err := <-failed; !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("create: %v", err)
	}
	if left := r.leftovers(); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
}

// TestBootIsTriedAgain: a boot that failed for want of luck is repeated, not
// for ever, and nothing of the tries is left.
func TestBootIsTriedAgain(t *testing.T) {
	for _, tt := range []struct {
		bad, starts int
		state       string
		cause       sandbox.Cause
	}{
		{2, 3, "running", ""},
		{9, 3, "ended", sandbox.CauseVMMCrash},
	} {
		t.Run(fmt.Sprint(tt.bad, " bad boots"), func(t *testing.T) {
			r := newRig(t)
			bad := tt.bad
			r.onBoot = func(id sandbox.ID) {
				if bad--; bad >= 0 {
					if err := r.vms.FailBoot(id); err != nil {
						t.Error(err)
					}
				}
			}
			r.open()
			req := r.request()
			_, err := r.agent.Create(t.Context(), req)
			if (err == nil) != (tt.state == "running") {
				t.Errorf("create: %v", err)
			}
			if s := r.status(req.ID); s.State != tt.state || s.Cause != tt.cause {
				t.Errorf("it is %s (%s), want %s (%s)", s.State, s.Cause, tt.state, tt.cause)
			}
			if n := r.vms.Starts(); n != tt.starts {
				t.Errorf("%d starts, want %d", n, tt.starts)
			}
			if left := r.leftovers(); tt.state == "ended" && len(left) > 0 {
				t.Errorf("left on the host: %v", left)
			}
		})
	}
}
