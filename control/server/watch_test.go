package server_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/control/hostfake"
	"github.com/dormouse-sandbox/dormouse/control/server"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// watch opens one that goes with the test.
func (r *rig) watch(id, path string, opts client.WatchOptions) *client.Watch {
	r.t.Helper()
	w, err := r.c.Watch(r.ctx(), id, path, opts)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = w.Close() })
	return w
}

// All events arrive, once and in order, with names as bad as they can be.
func TestWatchTellsEverything(t *testing.T) {
	const many = 10_000
	r := newRig(t)
	name := func(i int) string {
		return fmt.Sprintf("a\nevent: error\ndata: %d\r\n\n\"\\é\u2028 %s", i, strings.Repeat("x", i%100))
	}
	r.host.SetWatch(func(_ context.Context, req *hostv1.WatchDirRequest, tell func(kind, name string) error) error {
		if req.GetPath() != "/srv" || !req.GetRecursive() || req.GetUser() != "ann" {
			return sandbox.Errorf(sandbox.KindInternal, "asked for %v", req)
		}
		for i := range many {
			if err := tell("create", name(i)); err != nil {
				return err
			}
		}
		return hostfake.ErrLost
	})
	w := r.watch(r.create(), "/srv", client.WatchOptions{Recursive: true, User: "ann"})
	for i := range many {
		if e, err := w.Next(); err != nil || e != (api.FileEvent{Type: "create", Name: name(i)}) {
			t.Fatalf("event %d: %+v, %v", i, e, err)
		}
	}
	for range 2 {
		if _, err := w.Next(); !errors.Is(err, client.ErrOverflow) {
			t.Errorf("at the end: %v", err)
		}
	}
}

// A client that does not read holds the host back, and nothing piles up on the way.
func TestSlowReaderHoldsAWatchBack(t *testing.T) {
	r := newRig(t)
	told := make(chan int, 1)
	tell := func(ctx context.Context, _ *hostv1.WatchDirRequest, tell func(kind, name string) error) error {
		n := 0
		for ; tell("write", strings.Repeat("n", 4000)) == nil && n < 1e6; n++ {
		}
		told <- n
		return ctx.Err()
	}
	r.host.SetWatch(tell)
	before := heap()
	w := r.watch(r.create(), "/", client.WatchOptions{})
	held := time.After(time.Second) // long enough for thousands of events, were it not held back
	<-held
	if grown := int64(heap()) - int64(before); grown > flat {
		t.Errorf("the heap grew by %d MiB while nobody read", grown>>20)
	}
	select {
	case n := <-told:
		t.Errorf("%d events were told to a client that does not read", n)
	default:
	}
	for range 1000 {
		if e, err := w.Next(); err != nil || e.Type != "write" {
			t.Fatalf("%+v, %v", e, err)
		}
	}
	_ = w.Close() // it never fails
	if n := <-told; n < 1000 {
		t.Errorf("only %d events were told", n)
	}
}

// However a watch ends, its client is told why, and nothing is left of it.
func TestEndsOfAWatch(t *testing.T) {
	for name, tt := range map[string]struct {
		watch hostfake.Watch
		end   func(r *rig, id, key string) error
		kind  sandbox.Kind
		says  string
	}{
		"the directory is gone": {
			watch: func(context.Context, *hostv1.WatchDirRequest, func(kind, name string) error) error {
				return sandbox.Errorf(sandbox.KindNotFound, "the watched directory is gone")
			},
			kind: sandbox.KindNotFound, says: "is gone",
		},
		"the sandbox ends": {
			end:  func(r *rig, id, _ string) error { r.host.Crash(id, sandbox.CauseOOMGuest, ""); return nil },
			kind: sandbox.KindConflict, says: "oom_guest",
		},
		"the key is revoked": {
			end:  func(r *rig, _, key string) error { return r.c.DeleteKey(r.ctx(), key) },
			kind: sandbox.KindUnauthorized, says: "revoked",
		},
		"the server stops": {
			end:  func(r *rig, _, _ string) error { return r.srv.Close() },
			kind: sandbox.KindTransient, says: "stopping",
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.host.SetWatch(tt.watch)
			id := r.create()
			key, err := r.c.CreateKey(r.ctx(), "second")
			if err != nil {
				t.Fatal(err)
			}
			second := r.client(key.Secret)
			defer second.CloseIdle()
			settled := runtime.NumGoroutine()
			w, err := second.Watch(r.ctx(), id, "/", client.WatchOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = w.Close() }() // it never fails
			if tt.end != nil {
				if err := tt.end(r, id, key.ID); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := w.Next(); !sandbox.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("it ended with %v (%s)", err, sandbox.KindOf(err))
			}
			testkit.Eventually(t, limit, "without goroutines left", func() bool {
				r.c.CloseIdle()
				second.CloseIdle()
				return runtime.NumGoroutine() <= settled+4 // of kept connections
			})
		})
	}
}

// A client that has stopped reading is let go when its key is revoked.
func TestStuckReaderOfAWatchIsLetGo(t *testing.T) {
	r := newRig(t)
	ended := make(chan struct{})
	r.host.SetWatch(func(ctx context.Context, _ *hostv1.WatchDirRequest, tell func(kind, name string) error) error {
		defer close(ended)
		for tell("write", strings.Repeat("n", 4000)) == nil {
		}
		return ctx.Err()
	})
	id := r.create()
	key, err := r.c.CreateKey(r.ctx(), "second")
	if err != nil {
		t.Fatal(err)
	}
	second := r.client(key.Secret)
	w, err := second.Watch(r.ctx(), id, "/", client.WatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Close() }() // it never fails
	if err := r.c.DeleteKey(r.ctx(), key.ID); err != nil {
		t.Fatal(err)
	}
	<-ended
	testkit.Eventually(t, limit, "over in the server", func() bool { return strings.Contains(r.metrics(), "\ndormouse_http_requests_under_way 1\n") })
}

func TestWatchRefuses(t *testing.T) {
	r := newRig(t)
	id := r.create()
	for query, status := range map[string]int{
		"path=/":                            http.StatusOK,
		"":                                  http.StatusBadRequest,
		"path=/&recursive=yes":              http.StatusBadRequest,
		"path=/&recursive=":                 http.StatusBadRequest,
		"path=/&depth=2":                    http.StatusBadRequest,
		"path=/&user=../x":                  http.StatusBadRequest,
		"path=%00":                          http.StatusBadRequest,
		"path=/&path=/":                     http.StatusBadRequest,
		"path=/&key=" + r.key:               http.StatusBadRequest,
		"path=" + strings.Repeat("a", 5000): http.StatusBadRequest,
	} {
		if resp := r.raw("GET", "/v1/sandboxes/"+id+"/files/watch?"+query); resp.StatusCode != status {
			t.Errorf("%.80s: %s, want %d", query, resp.Status, status)
		}
	}
	r.host.SetHook(func(_ context.Context, method, _ string) error {
		if method == "WatchDir" {
			return sandbox.Errorf(sandbox.KindInvalid, "/x is a file, not a directory")
		}
		return nil
	})
	_, err := r.c.Watch(r.ctx(), id, "/x", client.WatchOptions{})
	r.wantKind(err, sandbox.KindInvalid)
	_, err = r.c.Watch(r.ctx(), string(sandbox.NewID()), "/x", client.WatchOptions{})
	r.wantKind(err, sandbox.KindNotFound)
	_, err = r.client("dm_x").Watch(r.ctx(), id, "/x", client.WatchOptions{})
	r.wantKind(err, sandbox.KindUnauthorized)
}

// raw makes a request with the key; its answer goes with the test.
func (r *rig) raw(method, path string) *http.Response {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.ctx(), method, r.http.URL+path, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("X-API-Key", r.key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = resp.Body.Close() }) // it may not have ended
	return resp
}

// What a browser reads: the first event, and comments while nothing happens.
func TestIdleWatchIsKeptAlive(t *testing.T) {
	r := newRig(t, func(c *server.Config) { c.KeepAlive = 20 * time.Millisecond })
	resp := r.raw("GET", "/v1/sandboxes/"+r.create()+"/files/watch?path=/")
	if got := resp.Header.Get("Content-Type"); got != "text/event-stream" {
		t.Errorf("its type is %q", got)
	}
	const want = "event: start\ndata: {}\n\n: keep-alive\n\n: keep-alive\n\n"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(bufio.NewReader(resp.Body), got); err != nil || string(got) != want {
		t.Errorf("it reads %q, %v", got, err)
	}
}
