package main

import (
	"encoding/json"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// testSaved is a pause point with odd sizes.
func testSaved() *api.Saved {
	return &api.Saved{Generation: 3, MemoryBytes: 46 << 20, DiskBytes: 2 << 20, OwnBytes: 1536 << 10, Durability: "local", At: time.Now()}
}

func testPhases() []api.Phase {
	return []api.Phase{{Name: "freeze", Millis: 1.25}, {Name: "publish", Millis: 30}}
}

func testReport() *api.SaveReport {
	return &api.SaveReport{ChangedPages: 3, DirtyPages: 7, ChangedBlocks: 1, DirtyBlocks: 2, BytesWritten: 1536 << 10}
}

// pausing adds what the fake needs for pauses, forks and snapshots to its mux.
func (f *fakeServer) pausing(mux *http.ServeMux) {
	mux.HandleFunc("POST /v1/sandboxes/{id}/pause", f.withBox(func(w http.ResponseWriter, _ *http.Request, b *api.Sandbox) {
		f.mu.Lock()
		defer f.mu.Unlock()
		now := time.Now()
		b.State, b.Saved, b.PausedAt, b.PauseReason, b.Deadline, b.TimeoutSeconds = "paused", testSaved(), &now, "user", nil, 300
		out := *b
		out.Phases, out.Report = testPhases(), testReport()
		writeJSON(w, out)
	}))
	mux.HandleFunc("POST /v1/sandboxes/{id}/resume", f.withBox(func(w http.ResponseWriter, r *http.Request, b *api.Sandbox) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.resumed = api.Resume{}
		if err := json.NewDecoder(r.Body).Decode(&f.resumed); err != nil {
			refuse(w, sandbox.KindInvalid, err.Error())
			return
		}
		b.State, b.PausedAt, b.PauseReason, b.StartedBy = "running", nil, "", "resume"
		writeJSON(w, b)
	}))
	mux.HandleFunc("POST /v1/sandboxes/{id}/fork", f.withBox(f.fork))
	mux.HandleFunc("POST /v1/snapshots", func(w http.ResponseWriter, r *http.Request) {
		var req api.CreateSnapshot
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
			refuse(w, sandbox.KindInvalid, err.Error())
			return
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		s := api.Snapshot{
			Name: req.Name, State: "ready", Template: "base", SandboxID: req.SandboxID, VCPUs: 1, MemMiB: 512, DiskMiB: 4096,
			Saved: testSaved(), Metadata: req.Metadata, CreatedAt: time.Now(),
		}
		f.snapshots = append(f.snapshots, s)
		s.Phases, s.Report = testPhases(), testReport()
		w.WriteHeader(http.StatusCreated)
		writeJSON(w, s)
	})
	mux.HandleFunc("GET /v1/snapshots", func(w http.ResponseWriter, _ *http.Request) {
		f.mu.Lock()
		defer f.mu.Unlock()
		writeJSON(w, api.SnapshotList{Snapshots: append([]api.Snapshot{}, f.snapshots...)})
	})
	mux.HandleFunc("DELETE /v1/snapshots/{name}", func(w http.ResponseWriter, r *http.Request) {
		switch r.PathValue("name") {
		case "used":
			refuse(w, sandbox.KindConflict, "snapshot used is needed by sandboxes abc")
		case "stuck":
			w.WriteHeader(http.StatusAccepted)
			writeJSON(w, api.Snapshot{Name: "stuck", State: "deleting"})
		default:
			writeJSON(w, struct{}{})
		}
	})
	mux.HandleFunc("GET /v1/snapshots/{name}/tree", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, f.tree) })
	mux.HandleFunc("POST /v1/snapshots/{name}/verify", func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("name") == "damaged" {
			writeJSON(w, api.Verified{Files: 5, Bytes: 48 << 20, Damage: []api.Damage{
				{File: "layers/ab", Offset: 4096, Message: "its chunk is not what its digest says"}, {File: "devices\x1b", Offset: -1, Message: "it is missing"},
			}})
			return
		}
		writeJSON(w, api.Verified{Whole: true, Files: 5, Bytes: 48 << 20})
	})
}

// fork makes copies; the second of each fork fails, and of "-n 1" none.
func (f *fakeServer) fork(w http.ResponseWriter, r *http.Request, b *api.Sandbox) {
	var req api.Fork
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		refuse(w, sandbox.KindInvalid, err.Error())
		return
	}
	f.mu.Lock()
	f.forked = req
	f.forkKeys = append(f.forkKeys, r.Header.Get(api.HeaderIdempotencyKey))
	lost := f.loseFork
	f.loseFork = false
	f.mu.Unlock()
	if lost {
		panic(http.ErrAbortHandler)
	}
	out := api.Forked{Phases: testPhases(), Report: testReport()}
	for i := range *req.Count {
		if i == 1 {
			out.Copies = append(out.Copies, api.Copy{Error: &api.ErrorDetail{Code: "busy", Message: "the host is full", SandboxID: boxB}})
			continue
		}
		s := *b
		s.ID = string(sandbox.NewID())
		out.Copies = append(out.Copies, api.Copy{Sandbox: &s})
	}
	w.WriteHeader(http.StatusCreated)
	writeJSON(w, out)
}

// notYoung is an age that a slow machine may have made.
var notYoung = regexp.MustCompile(`[0-9]+s ago`)

// seconds are those of a span of minutes, in which a slow machine is free.
var seconds = regexp.MustCompile(`m[0-9]{2}s\b`)

func noSeconds(text string) string { return seconds.ReplaceAllString(text, "m00s") }

func TestPauseAndResume(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	f.add(boxB)
	if got := ask(t, "pause", "aaaab", "aaaaz"); got != (result{out: boxA + "\n" + boxB + "\n"}) {
		t.Errorf("pause: %+v", got)
	}
	want := "  freeze    1.2 ms\n  publish   30.0 ms\n  pages     3 changed of 7 that may have\n  blocks    1 changed of 2 that may have\n  written   1.5 MiB\n" +
		"  kept      generation 3, 46.0 MiB of memory and 2.0 MiB of disk, 1.5 MiB of that its own, durable: local\n"
	if got := ask(t, "pause", "-v", "aaaab"); got.out != boxA+"\n" || got.errOut != want {
		t.Errorf("pause -v: %q\n%s", got.out, cmp.Diff(want, got.errOut))
	}
	var list api.SandboxList
	if err := json.Unmarshal([]byte(ask(t, "pause", "aaaab", "--json").out), &list); err != nil || len(list.Sandboxes) != 1 || list.Sandboxes[0].Report == nil {
		t.Errorf("pause --json: %+v, %v", list, err)
	}
	header := "ID                         STATE    TEMPLATE   VCPUS   MEM       AGE     EXPIRES IN   GEN   ON DISK    OWN\n"
	if got := ask(t, "ls"); !strings.HasPrefix(got.out, header) || !strings.Contains(noSeconds(got.out), boxA+"   paused   base       1       512 MiB   1m00s   -            3     48.0 MiB   1.5 MiB\n") {
		t.Errorf("ls: %q", got.out)
	}
	for _, says := range []string{"paused", "by user", "generation 3, 46.0 MiB of memory"} {
		if got := ask(t, "get", "aaaab"); !strings.Contains(got.out, says) {
			t.Errorf("get does not say %q: %q", says, got.out)
		}
	}
	if got := ask(t, "timeout", "aaaab", "5m"); !strings.Contains(noSeconds(got.out), "expires in 5m00s") {
		t.Errorf("timeout: %+v", got)
	}
	if got := ask(t, "resume", "aaaab", "--timeout", "1h", "-e", "A=b"); got != (result{out: boxA + "\n"}) {
		t.Errorf("resume: %+v", got)
	}
	if f.resumed.TimeoutSeconds == nil || *f.resumed.TimeoutSeconds != 3600 || f.resumed.Env["A"] != "b" {
		t.Errorf("asked for %+v", f.resumed)
	}
	if got := ask(t, "resume", "aaaab", "nosuch"); got.code != 3 {
		t.Errorf("with one that does not exist: %+v", got)
	}
	for _, line := range [][]string{{"pause"}, {"resume"}, {"fork"}, {"fork", "aaaab", "-n", "0"}, {"fork", "aaaab", "-n", "101"}, {"snapshot", "create", "aaaab"}, {"timeout", "aaaab"}, {"timeout", "aaaab", "0"}} {
		if got := ask(t, line...); got.code != 2 || got.errOut == "" {
			t.Errorf("%v: %+v, want exit status 2 and a reason", line, got)
		}
	}
}

func TestFork(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	got := ask(t, "fork", "aaaab", "-n", "3", "-e", "A=b", "--metadata", "x=y", "--auto-pause", "10m", "--no-auto-resume", "-v")
	if got.code != 6 || len(strings.Fields(got.out)) != 2 || !strings.Contains(got.errOut, "1 of 3 copies failed: the host is full") || !strings.Contains(got.errOut, "  freeze ") {
		t.Errorf("fork -n 3: %+v", got)
	}
	if r := f.forked; *r.Count != 3 || r.Env["A"] != "b" || r.Metadata["x"] != "y" || *r.AutoPauseSeconds != 600 || *r.AutoResume || r.TimeoutSeconds != nil {
		t.Errorf("asked for %+v", r)
	}
	f.loseFork = true
	if got := ask(t, "fork", "aaaab"); got.code != 0 || len(strings.Fields(got.out)) != 1 {
		t.Errorf("an answer that was lost: %+v", got)
	}
	if n := len(f.forkKeys); n != 3 || f.forkKeys[1] != f.forkKeys[2] || f.forkKeys[0] == f.forkKeys[1] || f.forkKeys[1] == "" {
		t.Errorf("the idempotency keys are %q", f.forkKeys)
	}
	if f.forked.AutoResume != nil || f.forked.AutoPauseSeconds != nil {
		t.Errorf("asked for what was not given: %+v", f.forked)
	}
	var out api.Forked
	if err := json.Unmarshal([]byte(ask(t, "fork", "aaaab", "-n", "2", "--json").out), &out); err != nil || len(out.Copies) != 2 {
		t.Errorf("fork --json: %+v, %v", out, err)
	}
}

func TestSnapshots(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	if got := ask(t, "snapshot", "create", "aaaab", "with-deps", "--metadata", "a=b"); got != (result{out: "with-deps\n"}) || f.snapshots[0].Metadata["a"] != "b" {
		t.Errorf("create: %+v", got)
	}
	if got := ask(t, "snapshot", "create", "aaaab", "two", "-v"); got.out != "two\n" || !strings.Contains(got.errOut, "written") {
		t.Errorf("create -v: %+v", got)
	}
	f.snapshots = append(f.snapshots, api.Snapshot{Name: "young", State: "creating", Template: "base", MemMiB: 1024, VCPUs: 2, CreatedAt: time.Now()})
	want := "NAME        STATE      TEMPLATE   PARENT   VCPUS   MEM       GEN   ON DISK    OWN       TAKEN\n" +
		"with-deps   ready      base       -        1       512 MiB   3     48.0 MiB   1.5 MiB   0s ago\n" +
		"two         ready      base       -        1       512 MiB   3     48.0 MiB   1.5 MiB   0s ago\n" +
		"young       creating   base       -        2       1 GiB     -     -          -         0s ago\n"
	for _, line := range [][]string{{"snapshot"}, {"snapshot", "ls"}} {
		got := ask(t, line...)
		if diff := cmp.Diff(want, notYoung.ReplaceAllString(got.out, "0s ago")); diff != "" {
			t.Errorf("%v (-want +got):\n%s", line, diff)
		}
	}
	if got := ask(t, "snapshot", "rm", "two", "used", "stuck"); got.code != 5 || got.out != "two\nstuck (deleting: goes when its host answers again)\n" || !strings.Contains(got.errOut, "needed by sandboxes abc") {
		t.Errorf("rm: %+v", got)
	}
	if got := ask(t, "snapshot", "verify", "two"); got != (result{out: "two is whole: 5 files, 48.0 MiB\n"}) {
		t.Errorf("verify: %+v", got)
	}
	got := ask(t, "snapshot", "verify", "damaged")
	if got.code != 1 || !strings.Contains(got.errOut, "damaged in 2 places") || !strings.Contains(got.out, "layers/ab   byte 4096") || !strings.Contains(got.out, "all of it") || strings.Contains(got.out, "\x1b") {
		t.Errorf("verify of a damaged one: %+v", got)
	}
	if got := ask(t, "create", "with-deps", "--auto-pause", "90s", "--no-auto-resume"); got.code != 0 || f.lastReq.Template != "with-deps" || f.lastReq.AutoPauseSeconds != 90 || *f.lastReq.AutoResume {
		t.Errorf("create from it: %+v, asked for %+v", got, f.lastReq)
	}
}

func TestSnapshotTree(t *testing.T) {
	f := newFake(t)
	f.tree = api.SnapshotTree{Nodes: []api.SnapshotNode{
		{Digest: "i", Kind: "template", Name: "base", OwnBytes: 3 << 20},
		{Digest: "a", Parent: "i", Kind: "snapshot", Name: "one", Generation: 1, OwnBytes: 1 << 20, Running: []string{boxA}},
		{Digest: "b", Parent: "a", Kind: "snapshot", Name: "two\x1b", Generation: 2, OwnBytes: 2 << 20},
		{Digest: "p", Parent: "b", Kind: "pause", SandboxID: boxB, Generation: 3, OwnBytes: 1 << 10},
		{Digest: "x", Parent: "a", Kind: "point", Generation: 2},
		{Digest: "l", Parent: "l", Kind: "snapshot", Name: "its-own-parent"},
		{Digest: "c1", Parent: "c2", Kind: "snapshot", Name: "circle"},
		{Digest: "c2", Parent: "c1", Kind: "snapshot", Name: "circle too"},
	}}
	want := `base (template, 3.0 MiB)
└─ one (snapshot, generation 1, 1.0 MiB) ←
   ├─ ` + boxA + ` (sandbox, running)
   ├─ two  (snapshot, generation 2, 2.0 MiB)
   │  └─ ` + boxB + ` (sandbox, paused, generation 3, 1.0 KiB)
   └─ · (point, generation 2)
its-own-parent (snapshot, generation 0)
`
	got := ask(t, "snapshot", "tree", "one")
	if diff := cmp.Diff(want, got.out); diff != "" || got.code != 0 {
		t.Errorf("exit status %d (-want +got):\n%s", got.code, diff)
	}
	var tree api.SnapshotTree
	if err := json.Unmarshal([]byte(ask(t, "snapshot", "tree", "one", "--json").out), &tree); err != nil || len(tree.Nodes) != 8 {
		t.Errorf("tree --json: %+v, %v", tree, err)
	}
}

func TestIdlePolicyOnTheCommandLine(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	if got := ask(t, "timeout", "aaaab", "5m", "--auto-pause", "10m", "--auto-resume=false"); got.code != 0 {
		t.Errorf("timeout: %+v", got)
	}
	if l := f.limits; l.TimeoutSeconds != 300 || l.AutoPauseSeconds == nil || *l.AutoPauseSeconds != 600 || l.AutoResume == nil || *l.AutoResume {
		t.Errorf("asked for %+v", l)
	}
	s := api.Sandbox{ID: boxA, State: "paused", TimeoutSeconds: 90, AutoPauseSeconds: 60}
	if got := limitsText(s, time.Now()); got != boxA+" is paused; it expires 1m30s after its resume, pauses after 1m00s without activity" {
		t.Errorf("limits of a paused one: %q", got)
	}
	now := time.Now()
	s = api.Sandbox{ID: boxA, State: "running", Saved: testSaved(), AutoPauseSeconds: 60, AutoPauseError: "no space", StartedBy: "fork", ForkedFrom: boxB}
	text := jsonText(describePause(s, now))
	for _, says := range []string{"without activity", "no space", "fork", boxB, "generation 3"} {
		if !strings.Contains(text, says) {
			t.Errorf("get does not say %q: %s", says, text)
		}
	}
	s = api.Sandbox{ID: boxA, State: "paused", PausedAt: &now, PauseReason: "idle"}
	if text := jsonText(describePause(s, now)); !strings.Contains(text, "it was idle") || !strings.Contains(text, "dormouse resume "+boxA) || stateText(s) != "paused (idle)" {
		t.Errorf("paused for being idle: %s, %q", text, stateText(s))
	}
}

func TestCompletionKnowsStatesAndSnapshots(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	f.add(boxB).State = "paused"
	f.snapshots = []api.Snapshot{{Name: "with-deps", SandboxID: boxA}}
	for _, tt := range []struct {
		line   []string
		offers []string
	}{
		{[]string{"pause", ""}, []string{boxA}},
		{[]string{"pause", boxA, ""}, nil},
		{[]string{"resume", ""}, []string{boxB}},
		{[]string{"fork", ""}, []string{boxB, boxA}},
		{[]string{"snapshot", "rm", "w"}, []string{"with-deps"}},
		{[]string{"snapshot", "rm", "with-deps", ""}, nil},
		{[]string{"snapshot", "verify", ""}, []string{"with-deps"}},
		{[]string{"snapshot", "tree", "with-deps", ""}, nil},
		{[]string{"create", ""}, []string{"base", "with-deps"}},
		{[]string{"run", ""}, []string{"base", "with-deps"}},
		{[]string{"template", "rm", ""}, []string{"base"}},
	} {
		var got []string
		for line := range strings.Lines(ask(t, append([]string{"__complete"}, tt.line...)...).out) {
			word, _, _ := strings.Cut(strings.TrimSpace(line), "\t")
			if !strings.HasPrefix(word, ":") {
				got = append(got, word)
			}
		}
		if diff := cmp.Diff(tt.offers, got); diff != "" {
			t.Errorf("%v (-want +got):\n%s", tt.line, diff)
		}
	}
}
