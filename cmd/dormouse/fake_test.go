package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/coder/websocket/wsjson"
	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const testKey = "dm_test"

// fakeServer speaks as much of the public API as the verbs need. Commands are
// played by run.
type fakeServer struct {
	t   *testing.T
	url string

	mu      sync.Mutex
	boxes   []*api.Sandbox // newest first
	files   map[string]string
	liar    string // what a hostile guest says a file's path is
	lastReq api.CreateSandbox
	creates int
	logs    string
	trees   fakeTrees

	deleting    atomic.Bool
	stuckDelete chan struct{} // a delete waits for it

	stuck    bool                                                    // a delete fails
	onCreate func()                                                  // called before a create answers
	run      func(ctx context.Context, p *fakeProcess) (int, string) // nil: echo
	tty      func(ctx context.Context, p *fakeTerminal) (int, string)
	built    fakeBuild // the last one

	snapshots []api.Snapshot
	tree      api.SnapshotTree
	resumed   api.Resume // the last requests
	forked    api.Fork
	limits    api.Timeout
	forkKeys  []string
	loseFork  bool // the next fork's answer is lost
}

// fakeProcess is one command.
type fakeProcess struct {
	exec   api.Exec
	stdin  io.Reader // nil without input
	stdout io.Writer
	stderr io.Writer
}

func newFake(t *testing.T) *fakeServer {
	t.Helper()
	f := &fakeServer{t: t, files: map[string]string{}}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/sandboxes", f.create)
	mux.HandleFunc("GET /v1/sandboxes", f.list)
	mux.HandleFunc("GET /v1/sandboxes/{id}", f.withBox(func(w http.ResponseWriter, _ *http.Request, b *api.Sandbox) { writeJSON(w, b) }))
	mux.HandleFunc("DELETE /v1/sandboxes/{id}", f.withBox(f.remove))
	mux.HandleFunc("POST /v1/sandboxes/{id}/exec", f.withBox(f.exec))
	mux.HandleFunc("GET /v1/sandboxes/{id}/exec/stream", f.withBox(f.stream))
	mux.HandleFunc("GET /v1/sandboxes/{id}/pty", f.withBox(f.pty))
	mux.HandleFunc("GET /v1/sandboxes/{id}/tcp/{port}", f.withBox(f.tcp))
	mux.HandleFunc("POST /v1/sandboxes/{id}/ports", f.withBox(f.openPort))
	mux.HandleFunc("POST /v1/sandboxes/{id}/timeout", f.withBox(f.timeout))
	mux.HandleFunc("POST /v1/sandboxes/{id}/ping", f.withBox(func(w http.ResponseWriter, _ *http.Request, _ *api.Sandbox) { writeJSON(w, api.Ping{Millis: 2.34}) }))
	mux.HandleFunc("GET /v1/sandboxes/{id}/logs", f.withBox(f.console))
	mux.HandleFunc("GET /v1/sandboxes/{id}/files/{what}", f.withBox(f.file))
	mux.HandleFunc("PUT /v1/sandboxes/{id}/files/write", f.withBox(f.write))
	mux.HandleFunc("GET /v1/sandboxes/{id}/files/tree", f.withBox(f.readTree))
	mux.HandleFunc("PUT /v1/sandboxes/{id}/files/tree", f.withBox(f.writeTree))
	mux.HandleFunc("GET /v1/host", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, api.Host{Name: "here", Accelerator: "tcg"}) })
	mux.HandleFunc("GET /v1/templates", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, api.TemplateList{Templates: []api.Template{{Name: "base", SizeBytes: 3 << 20, MinDiskMiB: 1024, BuiltAt: time.Now()}}})
	})
	mux.HandleFunc("POST /v1/templates", f.buildTemplate)
	mux.HandleFunc("GET /v1/templates/{name}", func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, api.Template{
			Name: r.PathValue("name"), SizeBytes: 3 << 20, MinDiskMiB: 1024, BuiltAt: time.Now(), Start: []string{"/bin/sh", "-c", "serve it"},
			Healthcheck: &api.Healthcheck{Test: []string{"CMD", "ok"}, IntervalSeconds: 1.5, Retries: 4},
		})
	})
	mux.HandleFunc("GET /v1/templates/{name}/log", func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("name") == "other" {
			refuse(w, sandbox.KindNotFound, "template other does not exist")
			return
		}
		_, _ = io.WriteString(w, "make image\n  evil\x1b[31m\n") // a recorder of a test
	})
	mux.HandleFunc("DELETE /v1/templates/{name}", func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("name") == "used" {
			refuse(w, sandbox.KindConflict, "template used has 1 sandboxes that lie on it: abc")
			return
		}
		writeJSON(w, struct{}{})
	})
	f.pausing(mux)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+testKey {
			refuse(w, sandbox.KindUnauthorized, "the key is wrong")
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	f.url = server.URL
	t.Setenv("DORMOUSE_URL", server.URL)
	t.Setenv("DORMOUSE_API_KEY", testKey)
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	return f
}

func writeJSON(w http.ResponseWriter, v any) {
	_ = json.NewEncoder(w).Encode(v) // the client sees what is missing
}

func refuse(w http.ResponseWriter, kind sandbox.Kind, message string) {
	w.WriteHeader(api.Status(kind))
	writeJSON(w, api.Error{Error: api.ErrorDetail{Code: string(kind), Message: message}})
}

// slack is what is added to a limit: on a slow machine it is shown a while after it
// was set, and seconds says how to compare that.
const slack = 30 * time.Second

// add puts a running sandbox there.
func (f *fakeServer) add(id string) *api.Sandbox {
	f.mu.Lock()
	defer f.mu.Unlock()
	deadline := time.Now().Add(5*time.Minute + slack)
	b := &api.Sandbox{
		ID: id, State: "running", Template: "base", VCPUs: 1, MemMiB: 512, DiskMiB: 4096,
		CreatedAt: time.Now().Add(-90 * time.Second), Deadline: &deadline, Network: api.Network{Internet: true},
	}
	f.boxes = append([]*api.Sandbox{b}, f.boxes...)
	return b
}

// end ends a sandbox.
func (f *fakeServer) end(b *api.Sandbox, cause sandbox.Cause) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	b.State, b.Cause, b.EndedAt = string(cause.End()), string(cause), &now
}

func (f *fakeServer) states() (out []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, b := range f.boxes {
		out = append(out, b.State)
	}
	return out
}

// wantStates checks what became of the sandboxes that were made.
func (f *fakeServer) wantStates(t *testing.T, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, f.states()); diff != "" {
		t.Error(diff)
	}
}

// yes is a command that prints for as long as somebody takes it.
func yes(ctx context.Context, p *fakeProcess) (int, string) {
	for ctx.Err() == nil {
		if _, err := io.WriteString(p.stdout, "y\n"); err != nil {
			break
		}
	}
	return -1, "signal: killed"
}

func (f *fakeServer) create(w http.ResponseWriter, r *http.Request) {
	var req api.CreateSandbox
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		refuse(w, sandbox.KindInvalid, err.Error())
		return
	}
	if req.Template == "nosuch" {
		refuse(w, sandbox.KindNotFound, `there is no template "nosuch"`)
		return
	}
	b := f.add(string(sandbox.NewID()))
	f.mu.Lock()
	f.lastReq = req
	f.creates++
	hook := f.onCreate
	f.mu.Unlock()
	if hook != nil {
		hook()
	}
	writeJSON(w, b)
}

func (f *fakeServer) list(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := api.SandboxList{Sandboxes: []api.Sandbox{}}
	for _, b := range f.boxes {
		if r.URL.Query().Get("all") == "true" || !sandbox.State(b.State).Ended() {
			out.Sandboxes = append(out.Sandboxes, *b)
		}
	}
	writeJSON(w, out)
}

func (f *fakeServer) withBox(handle func(http.ResponseWriter, *http.Request, *api.Sandbox)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		var found *api.Sandbox
		for _, b := range f.boxes {
			if b.ID == r.PathValue("id") {
				found = b
			}
		}
		f.mu.Unlock()
		if found == nil {
			refuse(w, sandbox.KindNotFound, "there is no sandbox "+r.PathValue("id"))
			return
		}
		handle(w, r, found)
	}
}

func (f *fakeServer) remove(w http.ResponseWriter, _ *http.Request, b *api.Sandbox) {
	f.deleting.Store(true)
	f.mu.Lock()
	stuck := f.stuckDelete
	f.mu.Unlock()
	if stuck != nil {
		<-stuck
	}
	if f.stuck {
		refuse(w, sandbox.KindInternal, "the disk does not let go")
		return
	}
	f.end(b, sandbox.CauseUser)
	writeJSON(w, b)
}

func (f *fakeServer) timeout(w http.ResponseWriter, r *http.Request, b *api.Sandbox) {
	var req api.Timeout
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil || req.TimeoutSeconds < 1 {
		refuse(w, sandbox.KindInvalid, "timeout must be at least 1s")
		return
	}
	deadline := time.Now().Add(time.Duration(req.TimeoutSeconds*float64(time.Second)) + slack)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.limits = req
	b.Deadline = &deadline
	writeJSON(w, b)
}

// runs sets what a command does, for clients that are processes of their own.
func (f *fakeServer) runs(run func(context.Context, *fakeProcess) (int, string)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.run = run
}

func (f *fakeServer) play(ctx context.Context, p *fakeProcess) (int, string) {
	f.mu.Lock()
	run := f.run
	f.mu.Unlock()
	if run != nil {
		return run(ctx, p)
	}
	_, _ = io.WriteString(p.stdout, strings.Join(p.exec.Command, " ")+"\n") // a client that left sees nothing
	return 0, "exit status 0"
}

func (f *fakeServer) exec(w http.ResponseWriter, r *http.Request, _ *api.Sandbox) {
	var req api.Exec
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		refuse(w, sandbox.KindInvalid, err.Error())
		return
	}
	var stdout, stderr bytes.Buffer
	code, status := f.play(r.Context(), &fakeProcess{req, strings.NewReader(req.Stdin), &stdout, &stderr})
	writeJSON(w, api.ExecResult{ExitCode: code, Status: status, Stdout: stdout.String(), Stderr: stderr.String()})
}

// channel writes one channel of an exec stream.
type channel struct {
	ctx  context.Context
	conn *websocket.Conn
	name byte
}

func (c channel) Write(p []byte) (int, error) {
	return len(p), c.conn.Write(c.ctx, websocket.MessageBinary, append([]byte{c.name}, p...))
}

func (f *fakeServer) stream(w http.ResponseWriter, r *http.Request, _ *api.Sandbox) {
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer func() { _ = conn.CloseNow() }()
	conn.SetReadLimit(api.MaxStreamMessage + 1)
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	var start api.StreamMessage
	if err := wsjson.Read(ctx, conn, &start); err != nil {
		return
	}
	if start.Exec.Command[0] == "missing" {
		_ = wsjson.Write(ctx, conn, api.StreamMessage{Type: api.StreamError, Error: &api.ErrorDetail{Code: "not_found", Message: `there is no program "missing"`}})
		return
	}
	input, feed := io.Pipe()
	go func() {
		defer cancel() // whoever goes away takes its command along
		readInput(ctx, conn, feed)
	}()
	_ = wsjson.Write(ctx, conn, api.StreamMessage{Type: api.StreamStarted, PID: 7})
	p := &fakeProcess{exec: *start.Exec, stdout: channel{ctx, conn, api.ChannelStdout}, stderr: channel{ctx, conn, api.ChannelStderr}}
	if start.Stdin {
		p.stdin = input
	}
	code, status := f.play(ctx, p)
	if ctx.Err() != nil {
		return
	}
	_ = wsjson.Write(ctx, conn, api.StreamMessage{Type: api.StreamExit, ExitCode: &code, Status: status})
	_ = conn.Close(websocket.StatusNormalClosure, "")
}

func readInput(ctx context.Context, conn *websocket.Conn, feed *io.PipeWriter) {
	var total int64
	for {
		typ, data, err := conn.Read(ctx)
		if err != nil {
			_ = feed.CloseWithError(err)
			return
		}
		if typ == websocket.MessageText {
			_ = feed.Close() // close_stdin is the only one these tests send
			continue
		}
		n, _ := feed.Write(data[1:])
		total += int64(n)
		_ = wsjson.Write(ctx, conn, api.StreamMessage{Type: api.StreamStdinAck, Bytes: total})
	}
}

// tcp is an echo on port 8000, and nothing anywhere else.
func (f *fakeServer) tcp(w http.ResponseWriter, r *http.Request, _ *api.Sandbox) {
	if r.PathValue("port") != "8000" {
		refuse(w, sandbox.KindUnanswered, "nothing listens on port "+r.PathValue("port"))
		return
	}
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer func() { _ = conn.CloseNow() }()
	for {
		kind, data, err := conn.Read(r.Context())
		if err != nil {
			return
		}
		if err := conn.Write(r.Context(), kind, data); err != nil {
			return
		}
		if kind == websocket.MessageText { // the end of a half
			_ = conn.Close(websocket.StatusNormalClosure, "")
			return
		}
	}
}

func (f *fakeServer) openPort(w http.ResponseWriter, r *http.Request, b *api.Sandbox) {
	var req api.OpenPort
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		refuse(w, sandbox.KindInvalid, err.Error())
		return
	}
	url := fmt.Sprintf("http://%d-%s.localhost/", req.Port, b.ID)
	writeJSON(w, api.Port{Port: req.Port, URL: url, Link: url + "?dormouse_link=x", Token: "dmt_x", ExpiresAt: time.Now()})
}

func (f *fakeServer) console(w http.ResponseWriter, r *http.Request, _ *api.Sandbox) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var from int
	if err := json.Unmarshal([]byte(r.URL.Query().Get("offset")+" "), &from); err != nil {
		from = 0
	}
	w.Header().Set(api.HeaderNextOffset, jsonText(len(f.logs)))
	_, _ = io.WriteString(w, f.logs[from:])
}

func jsonText(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func (f *fakeServer) file(w http.ResponseWriter, r *http.Request, _ *api.Sandbox) {
	f.mu.Lock()
	defer f.mu.Unlock()
	path := r.URL.Query().Get("path")
	if f.trees.stat(w, r) {
		return
	}
	text, isFile := f.files[path]
	isDir := path == "/tmp" || path == "/tmp/"
	switch {
	case !isFile && !isDir:
		refuse(w, sandbox.KindNotFound, "there is no file "+path)
	case r.PathValue("what") == "read":
		_, _ = io.WriteString(w, text)
	case isDir:
		writeJSON(w, api.File{Path: "/tmp", Type: "directory"})
	default:
		if f.liar != "" {
			path = f.liar
		}
		writeJSON(w, api.File{Path: path, Type: "file", Size: int64(len(text)), Mode: 0o755})
	}
}

func (f *fakeServer) write(w http.ResponseWriter, r *http.Request, _ *api.Sandbox) {
	data, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	path := r.URL.Query().Get("path")
	f.files[path] = string(data)
	writeJSON(w, api.Written{Path: path, Size: int64(len(data))})
}

// result is what a command line did.
type result struct {
	code        int
	out, errOut string
}

// dormouse runs a command line as main does, with input as standard input.
func dormouse(t *testing.T, ctx context.Context, input io.Reader, line ...string) result {
	t.Helper()
	var out, errOut bytes.Buffer
	root := newRootCommand()
	root.SetIn(input)
	root.SetOut(&out)
	root.SetErr(&errOut)
	root.SetArgs(line)
	err := root.ExecuteContext(ctx)
	complain(&errOut, ctx, err)
	return result{exitCode(ctx, err), out.String(), errOut.String()}
}

// ask runs a command line without input.
func ask(t *testing.T, line ...string) result {
	t.Helper()
	return dormouse(t, t.Context(), strings.NewReader(""), line...)
}
