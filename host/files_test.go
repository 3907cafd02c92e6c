package host_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/internal/tree"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// endless is a source that never ends.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestAgentThatAnswersBeforeTheUpload: its answer is what the caller is told, and
// not that the connection broke under the rest of the body.
func TestAgentThatAnswersBeforeTheUpload(t *testing.T) {
	const tries = 50 // the answer and the broken connection race
	const full = "the sandbox's disk is full"
	mux := http.NewServeMux()
	var answering sync.WaitGroup
	defer answering.Wait() // the end of the machine would close their connections
	full507 := func(w http.ResponseWriter, _ *http.Request) {
		answering.Add(1)
		defer answering.Done()
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		body := fmt.Sprintf(`{"code":507,"message":%q}`, full)
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 507 Insufficient Storage\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		arrived(t, conn.(syscall.Conn))
		_ = conn.(interface{ CloseRead() error }).CloseRead() // what was not read makes the kernel reset the connection
		_ = conn.Close()                                      // the caller is to hear the answer all the same
	}
	mux.HandleFunc("POST /files", full507)
	mux.HandleFunc("POST /files/tree", full507)
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	defer host.SetAnswerGrace(30 * time.Second)() // the answer is there, however late a busy machine reads it
	r := newRig(t)
	hostile(r, mux)
	agent := r.open()
	ref := host.FileRef{ID: string(r.mustCreate()), Path: "/x"}
	for range tries {
		for _, size := range []int64{1 << 10, 1 << 20, 1 << 40} {
			_, _, err := agent.WriteFile(t.Context(), ref, io.LimitReader(endless{}, size))
			if !sandbox.Is(err, sandbox.KindNoSpace) || err.Error() != full {
				t.Fatalf("write of %d bytes: %v, want %s", size, err, full)
			}
			_, err = agent.WriteTree(t.Context(), ref, io.LimitReader(endless{}, size))
			if !sandbox.Is(err, sandbox.KindNoSpace) || err.Error() != full {
				t.Fatalf("write of a tree of %d bytes: %v, want %s", size, err, full)
			}
		}
	}
}

// arrived waits until the other kernel has what was written. Where the writer's
// thread moves to another processor, loopback lets a reset overtake it.
func arrived(t *testing.T, conn syscall.Conn) {
	var unacknowledged int
	var err error
	ask := func(fd int) (err error) { unacknowledged, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ); return err }
	all := func() bool {
		err = kernel.WithFD(conn, ask)
		return err != nil || unacknowledged == 0
	}
	if !testkit.Poll(10*time.Second, all) || err != nil {
		t.Errorf("%d bytes of the answer have not arrived: %v", unacknowledged, err)
	}
}

// TestTrees: a tree passes as it is, and one whose agent dies is an error.
func TestTrees(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /files/tree", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.URL.RawQuery) // a stream like any other
		if r.URL.Query().Get("path") == "/dies" {
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
	})
	mux.HandleFunc("POST /files/tree", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil || r.Header.Get("Content-Type") != "application/x-tar" {
			t.Errorf("%v of %v", err, r.Header)
		}
		_, _ = fmt.Fprintf(w, `{"path":%q,"files":2,"directories":1,"bytes":%d,"skipped":1,"first_skipped":"p"}`, r.URL.Query().Get("path"), n)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	r := newRig(t)
	hostile(r, mux)
	agent := r.open()
	id := string(r.mustCreate())
	read := func(path string) (text string, begun bool, err error) {
		err = agent.ReadTree(t.Context(), host.FileRef{ID: id, Path: path, User: "u"},
			func() error { begun = true; return nil },
			func(b []byte) error { text += string(b); return nil })
		return text, begun, err
	}
	if text, begun, err := read("/d e"); text != "path=%2Fd+e&username=u" || !begun || err != nil {
		t.Errorf("read: %q, %v, %v", text, begun, err)
	}
	if text, _, err := read("/dies"); text == "" || !sandbox.Is(err, sandbox.KindTransient) {
		t.Errorf("of an agent that dies: %q, %v", text, err)
	}
	if _, begun, err := read("a\x00"); begun || !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("a path with a NUL byte: %v", err)
	}
	made, err := agent.WriteTree(t.Context(), host.FileRef{ID: id, Path: "/d"}, io.LimitReader(endless{}, 1<<20))
	want := guestapi.Tree{Path: "/d", Report: tree.Report{Files: 2, Directories: 1, Bytes: 1 << 20, Skipped: 1, FirstSkipped: "p"}}
	if err != nil || made != want {
		t.Errorf("write: %+v, %v", made, err)
	}
}

// TestAWriteAsControlSendsIt arrives whole at its place, in pieces as they come.
func TestAWriteAsControlSendsIt(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /files", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || string(body) != "hello, world" {
			t.Errorf("%q, %v", body, err)
		}
		_, _ = fmt.Fprintf(w, `[{"path":%q}]`, r.URL.RawQuery)
	})
	mux.HandleFunc("POST /files/tree", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			t.Error(err)
		}
		_, _ = fmt.Fprintf(w, `{"path":%q,"bytes":%d}`, r.URL.RawQuery, n)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	r := newRig(t)
	hostile(r, mux)
	c := remote(t, r.open())
	id := string(r.mustCreate())
	const where = "path=%2Fx&username=u"

	file := c.WriteFile(t.Context())
	err := file.Send(&hostv1.WriteFileRequest{Message: &hostv1.WriteFileRequest_Start_{Start: &hostv1.WriteFileRequest_Start{Id: id, Path: "/x", User: "u"}}})
	for _, piece := range []string{"hello", "", ", world"} {
		err = errors.Join(err, file.Send(&hostv1.WriteFileRequest{Message: &hostv1.WriteFileRequest_Data{Data: []byte(piece)}}))
	}
	if err != nil {
		t.Fatal(err)
	}
	written, err := file.CloseAndReceive()
	if err != nil || written.Msg.GetPath() != where || written.Msg.GetSize() != 12 {
		t.Errorf("a file: %v, %v", written, err)
	}

	whole := c.WriteTree(t.Context())
	err = whole.Send(&hostv1.WriteTreeRequest{Message: &hostv1.WriteTreeRequest_Start_{Start: &hostv1.WriteTreeRequest_Start{Id: id, Path: "/x", User: "u"}}})
	err = errors.Join(err, whole.Send(&hostv1.WriteTreeRequest{Message: &hostv1.WriteTreeRequest_Data{Data: make([]byte, 100<<10)}}))
	if err != nil {
		t.Fatal(err)
	}
	made, err := whole.CloseAndReceive()
	if err != nil || made.Msg.GetPath() != where || made.Msg.GetBytes() != 100<<10 {
		t.Errorf("a tree: %v, %v", made, err)
	}
}

// TestAWriteThatDoesNotBegin says what is missing.
func TestAWriteThatDoesNotBegin(t *testing.T) {
	r := newRig(t)
	c := remote(t, r.open())
	for want, message := range map[string]*hostv1.WriteFileRequest{
		"a write needs a first message":              nil,
		"the first message of a write must be start": {Message: &hostv1.WriteFileRequest_Data{Data: []byte("x")}},
	} {
		stream := c.WriteFile(t.Context())
		if message != nil {
			_ = stream.Send(message) // the answer has the reason
		}
		_, err := stream.CloseAndReceive()
		if err = hostapi.FromConnect(err); !sandbox.Is(err, sandbox.KindInvalid) || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// TestTreesAndTheAgent: there and back through the agent of a guest itself.
func TestTreesAndTheAgent(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	r := newRig(t)
	hostile(r, g.Handler)
	agent := r.open()
	ref := host.FileRef{ID: string(r.mustCreate()), Path: g.Home + "/d", User: guesttest.User}
	source := t.TempDir()
	if err := errors.Join(os.Mkdir(source+"/empty", 0o700), os.WriteFile(source+"/f", make([]byte, 3<<20), 0o640), os.Symlink("f", source+"/l")); err != nil {
		t.Fatal(err)
	}
	from, err := os.OpenRoot(source)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = from.Close() }() // read only
	var stream bytes.Buffer
	packed, err := tree.Pack(t.Context(), &stream, from, nil)
	if err != nil {
		t.Fatal(err)
	}
	pulled := errors.New("the plug was pulled")
	if _, err := agent.WriteTree(t.Context(), ref, io.MultiReader(bytes.NewReader(stream.Bytes()[:1<<20]), failing{pulled})); !errors.Is(err, pulled) {
		t.Errorf("a source that fails: %v", err)
	}
	if _, err := agent.WriteTree(t.Context(), ref, bytes.NewReader(stream.Bytes()[:stream.Len()-1024])); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("a stream without its end: %v", err)
	}
	made, err := agent.WriteTree(t.Context(), ref, bytes.NewReader(stream.Bytes()))
	if want := (guestapi.Tree{Path: ref.Path, Report: packed}); err != nil || made != want {
		t.Errorf("written: %+v, %v, want %+v", made, err, want)
	}
	var back bytes.Buffer
	if err := agent.ReadTree(t.Context(), ref, func() error { return nil }, func(b []byte) error { back.Write(b); return nil }); err != nil {
		t.Fatal(err)
	}
	if report, err := tree.Relay(io.Discard, &back, nil); err != nil || report != packed {
		t.Errorf("read: %+v, %v, want %+v", report, err, packed)
	}
	ref.Path += "/f"
	if err := agent.ReadTree(t.Context(), ref, nil, nil); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("of a file: %v", err)
	}
	if _, err := agent.WriteTree(t.Context(), ref, &stream); !sandbox.Is(err, sandbox.KindConflict) {
		t.Errorf("onto a file: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }
