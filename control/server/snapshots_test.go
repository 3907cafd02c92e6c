package server_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/hostfake"
	"github.com/dormouse-sandbox/dormouse/control/server"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// snapshot takes one.
func (r *rig) snapshot(id, name string) api.Snapshot {
	r.t.Helper()
	s, err := r.c.CreateSnapshot(r.ctx(), api.CreateSnapshot{Name: name, SandboxID: id})
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func TestLifeOfASnapshot(t *testing.T) {
	r := newRig(t)
	id := r.createWith(api.CreateSandbox{VCPUs: 2, MemMiB: 256, DiskMiB: 1024})
	r.write(id, "/a", "before")
	one, err := r.c.CreateSnapshot(r.ctx(), api.CreateSnapshot{Name: "one", SandboxID: id, Metadata: map[string]string{"of": "me"}})
	if err != nil || one.State != "ready" || one.VCPUs != 2 || one.MemMiB != 256 || one.DiskMiB != 1024 || one.Template != "base" ||
		one.SandboxID != id || one.Parent != "" || one.Metadata["of"] != "me" || one.Report == nil || len(one.Phases) != len(sandbox.SavePhases()) {
		t.Fatalf("made: %+v, %v", one, err)
	}
	if s := one.Saved; s == nil || s.Generation != 1 || s.OwnBytes == 0 || s.Durability != "local" {
		t.Errorf("it has %+v", s)
	}
	r.write(id, "/a", "after")
	if got := r.get(id).State; got != "running" {
		t.Errorf("the sandbox is %s", got)
	}
	kept, err := r.c.Snapshot(r.ctx(), "one")
	if err != nil || kept.Name != "one" || kept.Saved == nil || *kept.Saved != *one.Saved {
		t.Errorf("get: %+v, %v", kept, err)
	}

	from, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{Template: "one"}, "")
	if err != nil || from.VCPUs != 2 || from.MemMiB != 256 || from.DiskMiB != 1024 || from.StartedBy != "snapshot" || from.Template != "one" {
		t.Fatalf("a sandbox made from it: %+v, %v", from, err)
	}
	if got := r.read(from.ID, "/a"); got != "before" {
		t.Errorf("its file has %q", got)
	}
	if got := r.read(id, "/a"); got != "after" {
		t.Errorf("the original's file has %q", got)
	}
	two := r.snapshot(from.ID, "two")
	if two.Parent != "one" || two.Template != "base" || two.Saved.Generation != 2 {
		t.Errorf("a snapshot of that: %+v", two)
	}

	_, err = r.c.DeleteSnapshot(r.ctx(), "one")
	r.wantKind(err, sandbox.KindConflict)
	for _, part := range []string{from.ID, "two"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("deleting what is needed: %v, want %s in it", err, part)
		}
	}
	r.wantKind(r.c.DeleteTemplate(r.ctx(), "base"), sandbox.KindConflict)
	r.wantKind(r.c.DeleteTemplate(r.ctx(), "one"), sandbox.KindConflict)
	if _, err := r.c.Delete(r.ctx(), from.ID); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"two", "one"} {
		if done, err := r.c.DeleteSnapshot(r.ctx(), name); err != nil || !done {
			t.Fatalf("delete %s: %v, %v", name, done, err)
		}
	}
	if got := r.host.Snapshots(); len(got) > 0 {
		t.Errorf("the host still has %v", got)
	}
	_, err = r.c.DeleteSnapshot(r.ctx(), "one")
	r.wantKind(err, sandbox.KindNotFound)
	_, err = r.c.CreateSandbox(r.ctx(), api.CreateSandbox{Template: "one"}, "")
	r.wantKind(err, sandbox.KindNotFound)
	r.snapshot(id, "one") // the name is free again
}

func TestTheShapeIsLocked(t *testing.T) {
	r := newRig(t)
	id := r.createWith(api.CreateSandbox{VCPUs: 2, MemMiB: 256})
	r.snapshot(id, "shot")
	for body, says := range map[string]string{
		`{"template":"shot","vcpus":4}`:        "vcpus is 4, snapshot shot was taken with 2",
		`{"template":"shot","mem_mib":512}`:    "mem_mib is 512, snapshot shot was taken with 256 MiB",
		`{"template":"shot","disk_mib":10000}`: "disk_mib is 10000, snapshot shot was taken with 4096 MiB",
	} {
		resp, d := r.send("POST", "/v1/sandboxes", body)
		if resp.StatusCode != 400 || !strings.Contains(d.Message, says) {
			t.Errorf("%s: %d %q, want 400 with %q", body, resp.StatusCode, d.Message, says)
		}
	}
	if _, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{Template: "shot", VCPUs: 2, MemMiB: 256, DiskMiB: 4096}, ""); err != nil {
		t.Errorf("the same shape: %v", err)
	}
	resp, d := r.send("POST", "/v1/sandboxes", `{"template":"shott"}`)
	if resp.StatusCode != 404 || !strings.Contains(d.Message, "there are: base, shot") {
		t.Errorf("an unknown template: %d %q", resp.StatusCode, d.Message)
	}
}

func TestTemplatesAndSnapshotsShareTheirNames(t *testing.T) {
	r := newRig(t)
	id := r.create()
	_, err := r.c.CreateSnapshot(r.ctx(), api.CreateSnapshot{Name: "base", SandboxID: id})
	r.wantKind(err, sandbox.KindExists)
	r.snapshot(id, "shot")
	_, err = r.c.CreateSnapshot(r.ctx(), api.CreateSnapshot{Name: "shot", SandboxID: id})
	r.wantKind(err, sandbox.KindExists)
	_, err = r.c.BuildTemplate(r.ctx(), api.BuildTemplate{Name: "shot", Image: "x"}, nil, nil)
	r.wantKind(err, sandbox.KindExists)
	// What only the host knows.
	r.host.SetHook(func(_ context.Context, method, _ string) error {
		if method == "CreateSnapshot.save" {
			r.host.KeepSnapshot(&hostv1.Snapshot{Name: "late", Template: "base"})
		}
		return nil
	})
	_, err = r.c.CreateSnapshot(r.ctx(), api.CreateSnapshot{Name: "late", SandboxID: id})
	r.wantKind(err, sandbox.KindExists)
	r.host.SetHook(nil)
	if n := r.host.Count("CreateSnapshot"); n != 2 {
		t.Errorf("the host was asked %d times, want for the free name and for the one that only it knows", n)
	}
}

func TestOneNameOneSnapshot(t *testing.T) {
	r := newRig(t)
	id := r.create()
	var won, lost atomic.Int32
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			_, err := r.c.CreateSnapshot(r.ctx(), api.CreateSnapshot{Name: "same", SandboxID: id})
			switch {
			case err == nil:
				won.Add(1)
			case sandbox.Is(err, sandbox.KindExists), sandbox.Is(err, sandbox.KindConflict):
				lost.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 || lost.Load() != 9 || r.host.Count("CreateSnapshot") != 1 {
		t.Errorf("%d won, %d lost, the host was asked %d times", won.Load(), lost.Load(), r.host.Count("CreateSnapshot"))
	}
}

func TestPausedSandboxesAndSnapshotsKeepTheirTemplate(t *testing.T) {
	r := newRig(t)
	if _, err := r.c.BuildTemplate(r.ctx(), api.BuildTemplate{Name: "mine", Image: "x"}, nil, nil); err != nil {
		t.Fatal(err)
	}
	id := r.createWith(api.CreateSandbox{Template: "mine"})
	r.snapshot(id, "shot")
	r.pause(id)
	for _, needs := range []string{id, "shot"} {
		err := r.c.DeleteTemplate(r.ctx(), "mine")
		r.wantKind(err, sandbox.KindConflict)
		if !strings.Contains(err.Error(), needs) {
			t.Errorf("%v, want %s in it", err, needs)
		}
		if needs == id {
			if _, err := r.c.Delete(r.ctx(), id); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := r.c.DeleteSnapshot(r.ctx(), "shot"); err != nil {
		t.Fatal(err)
	}
	if err := r.c.DeleteTemplate(r.ctx(), "mine"); err != nil {
		t.Errorf("with nothing on it: %v", err)
	}
}

func TestVerifyAndTree(t *testing.T) {
	r := newRig(t)
	id := r.create()
	r.snapshot(id, "one")
	from := r.createWith(api.CreateSandbox{Template: "one"})
	r.snapshot(from, "two")
	v, err := r.c.VerifySnapshot(r.ctx(), "two")
	if err != nil || !v.Whole || v.Files == 0 || v.Bytes == 0 || len(v.Damage) > 0 {
		t.Errorf("a whole one: %+v, %v", v, err)
	}
	r.host.Damage("two", "layers/abc", 4096, "its chunk is not what its digest says")
	v, err = r.c.VerifySnapshot(r.ctx(), "two")
	if err != nil || v.Whole || len(v.Damage) != 1 || v.Damage[0] != (api.Damage{File: "layers/abc", Offset: 4096, Message: "its chunk is not what its digest says"}) {
		t.Errorf("a damaged one: %+v, %v", v, err)
	}
	r.pause(from)
	tree, err := r.c.SnapshotTree(r.ctx(), "one")
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	seen := map[string]bool{"": true}
	for _, n := range tree.Nodes {
		kinds = append(kinds, n.Kind+" "+n.Name)
		if !seen[n.Parent] {
			t.Errorf("%s comes before its parent", n.Digest)
		}
		seen[n.Digest] = true
	}
	if want := []string{"template base", "snapshot one", "snapshot two", "pause "}; !slices.Equal(kinds, want) {
		t.Errorf("the tree is %q, want %q", kinds, want)
	}
	for _, path := range []string{"", "/tree"} {
		resp, _ := r.send("GET", "/v1/snapshots/none"+path, "")
		if resp.StatusCode != 404 {
			t.Errorf("an unknown snapshot%s: %d", path, resp.StatusCode)
		}
	}
	resp, _ := r.send("POST", "/v1/snapshots/..%2fimages/verify", "")
	if resp.StatusCode != 400 {
		t.Errorf("a path for a name: %d", resp.StatusCode)
	}
}

func TestASnapshotGoesOnWithoutItsClient(t *testing.T) {
	r := newRig(t)
	id := r.create()
	gate := make(chan struct{})
	r.host.SetHook(func(_ context.Context, method, _ string) error {
		if method == "CreateSnapshot.save" {
			<-gate
		}
		return nil
	})
	ctx, cancel := context.WithCancel(r.ctx())
	left := make(chan struct{})
	go func() {
		defer close(left)
		_, _ = r.c.CreateSnapshot(ctx, api.CreateSnapshot{Name: "shot", SandboxID: id}) // it never gets an answer
	}()
	testkit.Eventually(t, limit, "asked", func() bool { return r.host.Count("CreateSnapshot") == 1 })
	if s, err := r.c.Snapshot(r.ctx(), "shot"); err != nil || s.State != "creating" || s.Saved != nil {
		t.Errorf("while it is made: %+v, %v", s, err)
	}
	_, err := r.c.DeleteSnapshot(r.ctx(), "shot")
	r.wantKind(err, sandbox.KindConflict)
	_, err = r.c.CreateSandbox(r.ctx(), api.CreateSandbox{Template: "shot"}, "")
	r.wantKind(err, sandbox.KindConflict)
	cancel()
	<-left
	close(gate)
	testkit.Eventually(t, limit, "ready", func() bool { s, err := r.c.Snapshot(r.ctx(), "shot"); return err == nil && s.State == "ready" })
}

// states says which snapshots there are, and how.
func (r *rig) states() map[string]string {
	r.t.Helper()
	list, err := r.c.Snapshots(r.ctx())
	if err != nil {
		r.t.Fatal(err)
	}
	out := map[string]string{}
	for _, s := range list {
		out[s.Name] = s.State
	}
	return out
}

// Each step of making and of deleting a snapshot fails once: it is ready or it is
// not there, on both sides.
func TestSnapshotStepsFailAt(t *testing.T) {
	route := sandbox.Errorf(sandbox.KindTransient, "no route")
	full := sandbox.Errorf(sandbox.KindNoSpace, "the host's disk is full")
	for _, tt := range []struct {
		name   string
		point  string
		host   string // or a method of the host's
		err    error
		delete bool
		there  bool // in the end
	}{
		{"before the host was asked", "control/snapshot/recorded", "", nil, false, false},
		{"after the host has made it", "control/snapshot/made", "", nil, false, true},
		{"the host refuses", "", "CreateSnapshot", full, false, false},
		{"the host fails in the middle", "", "CreateSnapshot.save", full, false, false},
		{"the host cannot be reached", "", "CreateSnapshot", route, false, false},
		{"before the host was asked to delete", "control/snapshot/deleting", "", nil, true, false},
		{"after the host has deleted it", "control/snapshot/deleted", "", nil, true, false},
		{"the host cannot be reached for a deletion", "", "DeleteSnapshot", route, true, false},
		{"the host refuses to delete", "", "DeleteSnapshot", sandbox.Errorf(sandbox.KindConflict, "a stranger needs it"), true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, func(c *server.Config) { c.ChangeLimit = time.Second })
			id := r.create()
			if tt.delete {
				r.snapshot(id, "shot")
			}
			disarm := func() { r.host.SetHook(nil) }
			if tt.point != "" {
				disarm = fault.Set(tt.point, fault.Nth(1, fault.Fail))
			} else {
				var once sync.Once
				r.host.SetHook(func(_ context.Context, method, _ string) (err error) {
					if method == tt.host {
						once.Do(func() { err = tt.err })
					}
					return err
				})
			}
			if tt.delete {
				_, err := r.c.DeleteSnapshot(r.ctx(), "shot")
				if (err != nil) != (tt.there || tt.point == "control/snapshot/deleting") {
					t.Errorf("delete: %v", err)
				}
			} else if _, err := r.c.CreateSnapshot(r.ctx(), api.CreateSnapshot{Name: "shot", SandboxID: id}); err == nil {
				t.Error("nothing failed")
			}
			disarm()
			want := map[string]string{}
			if tt.there {
				want["shot"] = "ready"
			}
			testkit.Eventually(t, limit, "settled", func() bool {
				got := r.states()
				return len(got) == len(want) && got["shot"] == want["shot"] && slices.Contains(r.host.Snapshots(), "shot") == tt.there
			})
			if got := r.get(id).State; got != "running" {
				t.Errorf("the sandbox is %s", got)
			}
			if !tt.there {
				r.snapshot(id, "shot")
			}
		})
	}
}

// TestSnapshotsThatOneSideLost: what the host has lost is told and comes back with
// it; what only the host has is recorded.
func TestSnapshotsThatOneSideLost(t *testing.T) {
	r := newRig(t)
	id := r.create()
	r.snapshot(id, "shot")
	was := &hostv1.Snapshot{Name: "shot", Template: "base", Sandbox: id, Saved: &hostv1.Saved{
		Vcpus: 1, MemMib: 512, DiskMib: 4096, Generation: 1, Compat: hostfake.Compat, At: timestamppb.Now(), Durability: "local",
	}}
	r.host.LoseSnapshot("shot")
	testkit.Eventually(t, limit, "lost", func() bool { return r.states()["shot"] == "lost" })
	_, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{Template: "shot"}, "")
	r.wantKind(err, sandbox.KindConflict)
	_, err = r.c.VerifySnapshot(r.ctx(), "shot")
	r.wantKind(err, sandbox.KindConflict)
	r.host.KeepSnapshot(was)
	testkit.Eventually(t, limit, "back", func() bool { return r.states()["shot"] == "ready" })
	r.host.LoseSnapshot("shot")
	testkit.Eventually(t, limit, "lost again", func() bool { return r.states()["shot"] == "lost" })
	if done, err := r.c.DeleteSnapshot(r.ctx(), "shot"); err != nil || !done {
		t.Errorf("deleting what is lost: %v, %v", done, err)
	}
	r.host.KeepSnapshot(&hostv1.Snapshot{Name: "found", Template: "base", Sandbox: id, Saved: was.Saved, Labels: map[string]string{"a": "b"}})
	testkit.Eventually(t, limit, "found", func() bool { return r.states()["found"] == "ready" })
	if s, err := r.c.Snapshot(r.ctx(), "found"); err != nil || s.MemMiB != 512 || s.Metadata["a"] != "b" || s.SandboxID != id {
		t.Errorf("what was found: %+v, %v", s, err)
	}
	r.createWith(api.CreateSandbox{Template: "found"})
}
