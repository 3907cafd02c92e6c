package server_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/coder/websocket"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/server"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1/hostv1connect"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// wrongClock is a host that passes on the times that a guest made up.
type wrongClock struct {
	hostv1connect.HostServiceClient
	at *timestamppb.Timestamp
}

func (h wrongClock) StatFile(context.Context, *connect.Request[hostv1.StatFileRequest]) (*connect.Response[hostv1.StatFileResponse], error) {
	return connect.NewResponse(&hostv1.StatFileResponse{Entry: &hostv1.FileEntry{Name: "x", Path: "/x", ModifiedAt: h.at}}), nil
}

func (h wrongClock) GetMetrics(context.Context, *connect.Request[hostv1.GetMetricsRequest]) (*connect.Response[hostv1.GetMetricsResponse], error) {
	return connect.NewResponse(&hostv1.GetMetricsResponse{At: h.at}), nil
}

// TestTimesThatJSONDoesNotKnow: a guest sets its clock, and the times of its
// files, to whatever it likes.
func TestTimesThatJSONDoesNotKnow(t *testing.T) {
	for _, seconds := range []int64{253402300800, 1 << 62, -1 << 62} {
		r := newRig(t, func(c *server.Config) {
			c.Host = wrongClock{c.Host, &timestamppb.Timestamp{Seconds: seconds}}
		})
		id := r.create()
		if f, err := r.c.Stat(r.ctx(), id, "/x", ""); err != nil || f.Path != "/x" {
			t.Errorf("stat of a file from %d: %+v, %v", seconds, f, err)
		}
		if _, err := r.c.Metrics(r.ctx(), id); err != nil {
			t.Errorf("metrics at %d: %v", seconds, err)
		}
	}
}

// TestBodyThatNeverComes: whoever announces a body and does not send it holds a
// connection for some seconds, not for ever. It needs no key to try.
func TestBodyThatNeverComes(t *testing.T) {
	r := newRig(t)
	for _, line := range []string{
		"GET /healthz", "GET //healthz", "GET /v1/../healthz", "DELETE /healthz", "GET /openapi.json", "GET /nowhere", "POST /v1/sandboxes",
		"PUT /v1/sandboxes/" + string(sandbox.NewID()) + "/files/write?path=/x",
	} {
		t.Run(line, func(t *testing.T) {
			t.Parallel()
			c, err := net.Dial("tcp", r.http.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }() // the test's own
			if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
				t.Fatal(err)
			}
			if _, err := fmt.Fprintf(c, "%s HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n", line); err != nil {
				t.Fatal(err)
			}
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }() // the status is what counts
			if !resp.Close {
				t.Errorf("status %d, and the connection stays open", resp.StatusCode)
			}
		})
	}
}

// TestStrangersSayLittle: before a client has said who it is, the server keeps
// next to nothing of what it says.
func TestStrangersSayLittle(t *testing.T) {
	r := newRig(t)
	id := r.create()
	long := strings.Repeat("x", 100<<10)
	say := func(c *websocket.Conn, m api.StreamMessage) error {
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return c.Write(r.ctx(), websocket.MessageText, b)
	}
	stranger, _, err := r.dial(id, nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = say(stranger, api.StreamMessage{Type: api.StreamAuth, Key: long}) // it may hang up before it has heard all
	if _, _, err := stranger.Read(r.ctx()); websocket.CloseStatus(err) != websocket.StatusMessageTooBig {
		t.Errorf("100 KiB from a stranger: %v", err)
	}

	known, _, err := r.dial(id, nil)
	if err != nil {
		t.Fatal(err)
	}
	start := api.StreamMessage{Type: api.StreamStart, Exec: &api.Exec{Command: []string{"echo", long}}}
	for _, m := range []api.StreamMessage{{Type: api.StreamAuth, Key: r.key}, start} {
		if err := say(known, m); err != nil {
			t.Fatal(err)
		}
	}
	if _, b, err := known.Read(r.ctx()); err != nil || !strings.Contains(string(b), api.StreamStarted) {
		t.Errorf("100 KiB after the key: %s, %v", b, err)
	}
}

// requests counts a log's lines about requests.
type requests struct {
	mu sync.Mutex
	n  int
}

func (l *requests) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.n += strings.Count(string(p), "msg=request ")
	return len(p), nil
}

func (l *requests) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.n
}

// TestStrangersFillNoLog: without a key nobody makes the server write to its disk.
func TestStrangersFillNoLog(t *testing.T) {
	log := &requests{}
	r := newRig(t, func(c *server.Config) { c.Log = slog.New(slog.NewTextHandler(log, nil)) })
	id := r.create()
	testkit.Eventually(t, limit, "the create is in the log", func() bool { return log.count() == 1 })
	for _, path := range []string{"/healthz", "/openapi.json", "/nowhere", "//healthz", "/v1/host", "/v1/sandboxes/" + id + "/exec/stream"} {
		resp, err := http.Get(r.http.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close() // the log is what counts
	}
	stranger, _, err := r.dial(id, nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = stranger.Write(r.ctx(), websocket.MessageText, []byte(`{"type":"auth","key":"dm_x"}`)) // it is sent away
	_, _, _ = stranger.Read(r.ctx())
	_ = stranger.CloseNow()
	r.get(id) // its line comes after theirs
	testkit.Eventually(t, limit, "the call with a key is in the log", func() bool { return log.count() >= 2 })
	if n := log.count(); n != 2 {
		t.Errorf("%d lines about requests, 2 of them with a key", n)
	}
}
