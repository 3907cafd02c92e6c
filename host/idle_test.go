package host_test

import (
	"context"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func (r *rig) mustCreateIdle(after time.Duration) sandbox.ID {
	r.t.Helper()
	req := r.request()
	req.AutoPause = after
	if _, err := r.agent.Create(r.t.Context(), req); err != nil {
		r.t.Fatal(err)
	}
	return req.ID
}

// TestIdleOnesArePaused: what nobody uses, and nobody else.
func TestIdleOnesArePaused(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	never := r.mustCreate()
	idle := r.mustCreateIdle(20 * time.Millisecond)
	testkit.Eventually(t, 20*time.Second, "paused", func() bool { return r.status(idle).State == "paused" })
	if s := r.status(idle); s.PausedBy != sandbox.PauseIdle || s.PausedAt.IsZero() {
		t.Errorf("status %+v", s)
	}
	if s := r.status(never); s.State != "running" || s.IdleSince.IsZero() {
		t.Errorf("one that is never paused is %s, idle since %v", s.State, s.IdleSince)
	}
}

// TestWhatIsUsedIsNotIdle: a download that goes on, a connection to a port, and
// a call that is on its way.
func TestWhatIsUsedIsNotIdle(t *testing.T) {
	for name, use := range map[string]func(t *testing.T, r *snapshotRig, id sandbox.ID) (end func()){
		"a download": func(t *testing.T, r *snapshotRig, id sandbox.ID) func() {
			ctx, cancel := context.WithCancel(t.Context())
			begun, over := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(over)
				_ = r.agent.ReadFile(ctx, host.FileRef{ID: string(id), Path: "/x"}, // it is cut off
					func(int64) error { close(begun); return nil }, func([]byte) error { return nil })
			}()
			<-begun
			return func() { cancel(); <-over }
		},
		"a connection to a port": func(t *testing.T, r *snapshotRig, id sandbox.ID) func() {
			r.listen(8000, echo)
			c, err := r.agent.OpenPort(t.Context(), string(id), 8000)
			if err != nil {
				t.Fatal(err)
			}
			return func() { _ = c.Close() }
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newSnapshotRig(t)
			r.open()
			id := r.mustCreateIdle(time.Hour)
			end := use(t, r, id)
			soon := time.Millisecond
			if err := r.agent.SetLimits(string(id), host.Limits{AutoPause: &soon}); err != nil {
				t.Fatal(err)
			}
			r.agent.PauseIdle()
			if s := r.status(id); s.State != "running" || !s.IdleSince.IsZero() {
				t.Errorf("while it is used it is %s, idle since %v", s.State, s.IdleSince)
			}
			end()
			testkit.Eventually(t, 20*time.Second, "paused", func() bool { return r.status(id).State == "paused" })
		})
	}
	t.Run("a call on its way", func(t *testing.T) {
		r := newSnapshotRig(t)
		r.open()
		id := r.mustCreateIdle(time.Hour)
		if err := r.agent.Touch(t.Context(), string(id), time.Minute); err != nil {
			t.Fatal(err)
		}
		soon := time.Millisecond
		if err := r.agent.SetLimits(string(id), host.Limits{AutoPause: &soon}); err != nil {
			t.Fatal(err)
		}
		r.agent.PauseIdle()
		if s := r.status(id); s.State != "running" {
			t.Errorf("while it is held it is %s", s.State)
		}
		if err := r.agent.Touch(t.Context(), string(id), time.Hour); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("held for an hour: %v", err)
		}
	})
}

// TestWhoOnlyLooksIsNoActivity, or whoever draws curves would keep everything awake.
func TestWhoOnlyLooksIsNoActivity(t *testing.T) {
	r := newRig(t)
	r.open()
	id := r.mustCreate()
	since := r.status(id).IdleSince
	if u, err := r.agent.Metrics(t.Context(), string(id)); err != nil || u.Guest.CPUCount != 1 {
		t.Fatalf("metrics %+v, %v", u, err)
	}
	if _, _, err := r.agent.Console(string(id), 100, 0); err != nil {
		t.Fatal(err)
	}
	if now := r.status(id).IdleSince; since.IsZero() || !now.Equal(since) {
		t.Errorf("idle since %v, after a look since %v", since, now)
	}
	if _, err := r.agent.Ping(t.Context(), string(id)); err != nil {
		t.Fatal(err)
	}
	if now := r.status(id).IdleSince; !now.After(since) {
		t.Errorf("idle since %v, after a use since %v", since, now)
	}
}

// TestAnAutoPauseThatFailsEndsNothing, says why, and is tried again.
func TestAnAutoPauseThatFailsEndsNothing(t *testing.T) {
	r := newSnapshotRig(t)
	r.open()
	defer fault.Set("host/capture/disk", fault.Fail)()
	id := r.mustCreateIdle(time.Millisecond)
	testkit.Eventually(t, 20*time.Second, "it says why it runs on", func() bool {
		s := r.status(id)
		return s.State == "running" && s.AutoPauseError != ""
	})
	fault.Set("host/capture/disk", nil)
	r.agent.ForgetFailedPauses()
	testkit.Eventually(t, 20*time.Second, "paused", func() bool { return r.status(id).State == "paused" })
}
