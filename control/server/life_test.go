package server_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func TestLifeOfASandbox(t *testing.T) {
	r := newRig(t)
	ten := 10.0
	made, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{
		VCPUs: 2, MemMiB: 256, TimeoutSeconds: &ten, Env: map[string]string{"A": "b"},
		Metadata: map[string]string{"owner": "ann"}, Network: &api.Network{Internet: false},
	}, "")
	if err != nil {
		t.Fatal(err)
	}
	if made.State != "running" || made.Template != "base" || made.VCPUs != 2 || made.MemMiB != 256 || made.DiskMiB != 4096 ||
		made.Metadata["owner"] != "ann" || made.Network.Internet || len(made.Phases) == 0 {
		t.Errorf("created %+v", made)
	}
	if made.Deadline == nil || time.Until(*made.Deadline) > 11*time.Second || time.Until(*made.Deadline) < 5*time.Second {
		t.Errorf("deadline is %v, want in about 10 s", made.Deadline)
	}
	if got := r.host.Status(made.ID).GetSpec().GetDeadline().AsTime(); !got.Equal(*made.Deadline) {
		t.Errorf("the host's deadline is %v, the answer's %v", got, *made.Deadline)
	}
	made.Phases = nil
	if diff := cmp.Diff(made, r.get(made.ID)); diff != "" {
		t.Errorf("get differs from create (-create +get):\n%s", diff)
	}

	res, err := r.c.Exec(r.ctx(), made.ID, api.Exec{Shell: "echo hello there"})
	if err != nil || res.Stdout != "hello there\n" || res.ExitCode != 0 {
		t.Errorf("exec: %+v, %v", res, err)
	}
	if res, err := r.c.Exec(r.ctx(), made.ID, api.Exec{Command: []string{"exit", "3"}}); err != nil || res.ExitCode != 3 || res.Status != "exit status 3" {
		t.Errorf("exec exit 3: %+v, %v", res, err)
	}
	if _, err := r.c.Ping(r.ctx(), made.ID); err != nil {
		t.Errorf("ping: %v", err)
	}
	if _, err := r.c.Metrics(r.ctx(), made.ID); err != nil {
		t.Errorf("metrics: %v", err)
	}
	moved, err := r.c.SetTimeout(r.ctx(), made.ID, time.Hour)
	if err != nil || time.Until(*moved.Deadline) < 59*time.Minute {
		t.Errorf("timeout: deadline %v, %v", moved.Deadline, err)
	}
	data, next, err := r.c.Logs(r.ctx(), made.ID, client.LogOptions{TailBytes: 6})
	if err != nil || string(data) != "ready\n" || next != 22 {
		t.Errorf("logs: %q, %d, %v", data, next, err)
	}

	ended, err := r.c.Delete(r.ctx(), made.ID)
	if err != nil || ended.State != "gone" || ended.Cause != "user" || ended.EndedAt == nil {
		t.Fatalf("delete: %+v, %v", ended, err)
	}
	if again, err := r.c.Delete(r.ctx(), made.ID); err != nil || again.State != "gone" {
		t.Errorf("second delete: %+v, %v", again, err)
	}
	if len(r.host.Running()) != 0 {
		t.Errorf("the host still has %v", r.host.Running())
	}
	testkit.Eventually(t, limit, "the host forgot it", func() bool { return r.host.Status(made.ID) == nil })
	_, err = r.c.Exec(r.ctx(), made.ID, api.Exec{Shell: "echo"})
	r.wantKind(err, sandbox.KindConflict)
	if !strings.Contains(err.Error(), "gone") || !strings.Contains(err.Error(), "user") {
		t.Errorf("exec in a destroyed sandbox says %q, want its state and cause", err)
	}
	_, err = r.c.Get(r.ctx(), string(sandbox.NewID()))
	r.wantKind(err, sandbox.KindNotFound)
}

func TestListPagesAndFilters(t *testing.T) {
	r := newRig(t)
	var want []string // newest first
	for i := range 7 {
		s, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{Metadata: map[string]string{"n": fmt.Sprint(i % 2), "a]b=": "x y"}}, "")
		if err != nil {
			t.Fatal(err)
		}
		want = append([]string{s.ID}, want...)
	}
	list := func(o client.ListOptions) (ids []string) {
		t.Helper()
		for s, err := range r.c.Sandboxes(r.ctx(), o) {
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, s.ID)
		}
		return ids
	}
	if diff := cmp.Diff(want, list(client.ListOptions{Limit: 2})); diff != "" {
		t.Errorf("pages of 2 (-want +got):\n%s", diff)
	}
	if _, err := r.c.Delete(r.ctx(), want[0]); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want[1:], list(client.ListOptions{Limit: 3})); diff != "" {
		t.Errorf("without the ended one (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(want, list(client.ListOptions{All: true})); diff != "" {
		t.Errorf("all (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(want[:1], list(client.ListOptions{States: []string{"gone"}})); diff != "" {
		t.Errorf("gone (-want +got):\n%s", diff)
	}
	if got := list(client.ListOptions{Metadata: map[string]string{"n": "1", "a]b=": "x y"}}); len(got) != 3 {
		t.Errorf("n=1: %v, want 3", got)
	}
	if got := list(client.ListOptions{Template: "other"}); len(got) != 0 {
		t.Errorf("template other: %v", got)
	}
}

func TestACallEndsWhenItsSandboxDoes(t *testing.T) {
	r := newRig(t)
	id := r.create()
	failed := make(chan error, 1)
	ctx := r.ctx()
	go func() {
		_, err := r.c.Exec(ctx, id, api.Exec{Shell: "sleep"})
		failed <- err
	}()
	testkit.Eventually(t, limit, "running", func() bool { return r.host.Processes() == 1 })
	r.host.Crash(id, sandbox.CauseVMMCrash, "segfault")
	err := <-failed
	r.wantKind(err, sandbox.KindConflict)
	if !strings.Contains(err.Error(), "vmm_crash") {
		t.Errorf("the error is %q, want the cause in it", err)
	}
	if got := r.get(id); got.State != "failed" || got.Cause != "vmm_crash" || got.CauseDetail != "segfault" {
		t.Errorf("after the crash: %+v", got)
	}
}

func TestSilentHostIsUnreachableAndComesBack(t *testing.T) {
	r := newRig(t)
	id := r.create()
	r.host.SetHook(func(context.Context, string, string) error {
		return sandbox.Errorf(sandbox.KindTransient, "no route")
	})
	testkit.Eventually(t, limit, "unreachable", func() bool { return r.get(id).State == "unreachable" })
	_, err := r.c.Exec(r.ctx(), id, api.Exec{Shell: "echo"})
	r.wantKind(err, sandbox.KindTransient)
	_, err = r.c.CreateSandbox(r.ctx(), api.CreateSandbox{}, "")
	r.wantKind(err, sandbox.KindTransient)
	r.host.SetHook(nil)
	testkit.Eventually(t, limit, "running", func() bool { return r.get(id).State == "running" })
	if _, err := r.c.Exec(r.ctx(), id, api.Exec{Shell: "echo"}); err != nil {
		t.Error(err)
	}
}

func TestDeleteWithoutHostGoesOnLater(t *testing.T) {
	r := newRig(t)
	id := r.create()
	r.host.SetHook(func(_ context.Context, method, _ string) error {
		if method == "DestroySandbox" {
			return sandbox.Errorf(sandbox.KindTransient, "no route")
		}
		return nil
	})
	s, err := r.c.Delete(r.ctx(), id)
	if err != nil || s.State != "destroying" {
		t.Fatalf("delete: %+v, %v", s, err)
	}
	r.host.SetHook(nil)
	testkit.Eventually(t, limit, "gone", func() bool { return r.get(id).State == "gone" })
	if got := r.get(id).Cause; got != "user" {
		t.Errorf("cause is %s, want user", got)
	}
}

func TestWhatTheDatabaseDoesNotKnowIsLeftAlone(t *testing.T) {
	r := newRig(t)
	id := string(sandbox.NewID())
	r.host.Plant(&hostv1.SandboxStatus{Spec: &hostv1.SandboxSpec{Id: id}, State: hostv1.State_STATE_RUNNING})
	for range 3 {
		if err := r.srv.Reconcile(r.ctx()); err != nil {
			t.Fatal(err)
		}
	}
	if got := r.host.Running(); len(got) != 1 || got[0] != id {
		t.Errorf("the host has %v, want the stranger", got)
	}
}

func TestHostThatForgetsLosesItsSandboxes(t *testing.T) {
	r := newRig(t)
	id := r.create()
	r.host.Forget()
	testkit.Eventually(t, limit, "failed", func() bool { return r.get(id).State == "failed" })
	if got := r.get(id).Cause; got != "host_lost" {
		t.Errorf("cause is %s, want host_lost", got)
	}
}
