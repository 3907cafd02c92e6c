package server_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/dormouse-sandbox/dormouse/control/hostfake"
	"github.com/dormouse-sandbox/dormouse/control/server"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestPortWebSocket: an upgrade passes, messages go both ways, and it ends with
// its sandbox or its key.
func TestPortWebSocket(t *testing.T) {
	p := newPorts(t)
	p.serve(8000, func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{"echo"}, OriginPatterns: []string{"*"}})
		if err != nil {
			return
		}
		defer func() { _ = c.CloseNow() }()
		for {
			kind, b, err := c.Read(r.Context())
			if err != nil {
				return
			}
			_ = c.Write(r.Context(), kind, b)
		}
	})
	for name, end := range map[string]func(id, key string) error{
		"by itself":        nil,
		"with its sandbox": func(id, _ string) error { _, err := p.c.Delete(p.ctx(), id); return err },
		"with its key":     func(_, key string) error { return p.c.DeleteKey(p.ctx(), key) },
	} {
		t.Run(name, func(t *testing.T) {
			id := p.create()
			key, err := p.c.CreateKey(p.ctx(), "guest")
			if err != nil {
				t.Fatal(err)
			}
			for _, at := range []string{p.path(id, 8000, "/ws"), named(id, 8000, "/ws")} {
				c, _, err := websocket.Dial(p.ctx(), at, &websocket.DialOptions{
					HTTPClient: p.browser(), HTTPHeader: http.Header{"X-Api-Key": {key.Secret}}, Subprotocols: []string{"echo"},
				})
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = c.CloseNow() }()
				for _, kind := range []websocket.MessageType{websocket.MessageText, websocket.MessageBinary} {
					if err := c.Write(p.ctx(), kind, []byte("hello")); err != nil {
						t.Fatal(err)
					}
					if got, b, err := c.Read(p.ctx()); err != nil || got != kind || string(b) != "hello" || c.Subprotocol() != "echo" {
						t.Fatalf("%v %q %q %v", got, b, c.Subprotocol(), err)
					}
				}
				if end == nil {
					if err := c.Close(websocket.StatusNormalClosure, ""); err != nil {
						t.Error(err)
					}
				} else {
					defer func() {
						if _, _, err := c.Read(p.ctx()); err == nil {
							t.Errorf("%s goes on", at)
						}
					}()
				}
			}
			if end != nil {
				if err := end(id, key.ID); err != nil {
					t.Fatal(err)
				}
			}
			testkit.Eventually(t, limit, "closed, all connections", func() bool { return p.host.Conns() == 0 })
		})
	}
}

// TestPortHalves: after an upgrade each half of a connection ends by itself.
func TestPortHalves(t *testing.T) {
	p := newPorts(t)
	id := p.create()
	p.raw(8000, func(c net.Conn) {
		_, _ = io.ReadFull(c, make([]byte, 16))
		buf := make([]byte, 1)
		for tail := ""; !strings.HasSuffix(tail, "\r\n\r\n"); tail += string(buf) { // the request's head
			if _, err := c.Read(buf); err != nil {
				return
			}
		}
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n")
		data, _ := io.ReadAll(c) // up to the end of the client's half
		_, _ = fmt.Fprintf(c, "you said %q", data)
	})
	c, err := net.Dial("tcp", p.http.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(limit))
	_, _ = fmt.Fprintf(c, "GET /v1/sandboxes/%s/ports/8000/ HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n", id, p.key)
	buf := make([]byte, 1)
	head := ""
	for ; !strings.HasSuffix(head, "\r\n\r\n"); head += string(buf) {
		if _, err := c.Read(buf); err != nil {
			t.Fatalf("%q %v", head, err)
		}
	}
	_, _ = io.WriteString(c, "hello")
	_ = c.(*net.TCPConn).CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != `you said "hello"` {
		t.Errorf("%s\n%q %v", head, got, err)
	}
}

// TestPortCarriesMuch: large bodies come through whole, in both directions, and
// take no memory of the server's.
func TestPortCarriesMuch(t *testing.T) {
	const size = 64 << 20
	p := newPorts(t)
	id := p.create()
	p.serve(8000, func(w http.ResponseWriter, r *http.Request) {
		sum := sha256.New()
		if r.Method == "PUT" {
			_, _ = io.Copy(sum, r.Body)
			_, _ = io.WriteString(w, hex.EncodeToString(sum.Sum(nil)))
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(size))
		_, _ = io.Copy(w, hostfake.Pattern(size))
	})
	want := sha256.New()
	if _, err := io.Copy(want, hostfake.Pattern(size)); err != nil {
		t.Fatal(err)
	}
	resp, err := p.browser().Do(p.request("GET", p.path(id, 8000, "/"), nil))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var before, during runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	sum, start := sha256.New(), time.Now()
	if _, err := io.CopyN(sum, resp.Body, size/2); err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	runtime.ReadMemStats(&during)
	n, err := io.Copy(sum, resp.Body)
	if err != nil || !bytes.Equal(sum.Sum(nil), want.Sum(nil)) {
		t.Errorf("%d bytes after the first half, %v; the hash is right: %v", n, err, bytes.Equal(sum.Sum(nil), want.Sum(nil)))
	}
	t.Logf("%d MiB in %v", size>>20, time.Since(start).Round(time.Millisecond))
	if grown := int64(during.HeapAlloc) - int64(before.HeapAlloc); grown > 32<<20 {
		t.Errorf("in the middle of it the heap has grown by %d MiB", grown>>20)
	}
	if got := p.ask(p.request("PUT", p.path(id, 8000, "/"), hostfake.Pattern(size))); got.text != hex.EncodeToString(want.Sum(nil)) {
		t.Errorf("upload: %s %q", got.Status, got.text)
	}
}

// TestPortHoldsBack: who does not read holds back who writes, in both directions,
// and when he goes away everything of his goes.
func TestPortHoldsBack(t *testing.T) {
	const most = 48 << 20 // buffers of sockets and windows of streams
	p := newPorts(t, func(c *server.Config) { c.PortAnswer = 10 * time.Second })
	id := p.create()
	var sent atomic.Int64
	gone, over := make(chan struct{}, 2), make(chan struct{})
	defer close(over)
	p.serve(8000, func(w http.ResponseWriter, r *http.Request) {
		defer func() { gone <- struct{}{} }()
		if r.Method == "PUT" {
			<-over // and reads nothing
			return
		}
		piece := make([]byte, 64<<10)
		for {
			n, err := w.Write(piece)
			if sent.Add(int64(n)); err != nil {
				return
			}
		}
	})
	steady := func() bool {
		before := sent.Load()
		time.Sleep(300 * time.Millisecond) // that nothing happens has no event
		return before > 0 && sent.Load() == before
	}
	ctx, cancel := context.WithCancel(p.ctx())
	resp, err := p.browser().Do(p.request("GET", p.path(id, 8000, "/"), nil).WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, limit, "held back", steady)
	if n := sent.Load(); n > most {
		t.Errorf("%d MiB are on their way to a client that does not read", n>>20)
	}
	cancel()
	_ = resp.Body.Close()
	<-gone
	sent.Store(0)
	ctx, cancel = context.WithCancel(p.ctx())
	ended := make(chan error, 1)
	go func() {
		resp, err := p.browser().Do(p.request("PUT", p.path(id, 8000, "/"), &counting{n: &sent}).WithContext(ctx))
		if err == nil {
			_ = resp.Body.Close()
		}
		ended <- err
	}()
	testkit.Eventually(t, limit, "held back", steady)
	if n := sent.Load(); n > most {
		t.Errorf("%d MiB are on their way to a guest that does not read", n>>20)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the upload ended with %v", err)
	}
	testkit.Eventually(t, limit, "closed, all connections", func() bool { return p.host.Conns() == 0 })
}

// counting is endless input that says how much was taken.
type counting struct{ n *atomic.Int64 }

func (c *counting) Read(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}

// TestPortConnectionsAreReused, and not kept for long.
func TestPortConnectionsAreReused(t *testing.T) {
	p := newPorts(t, func(c *server.Config) { c.PortIdle = 3 * time.Second })
	id := p.create()
	p.serve(8000, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "x") })
	for range 5 {
		p.get(id, 8000, "/")
	}
	if n := p.host.Count("OpenPort"); n > 2 {
		t.Errorf("%d connections for five requests, one after the other", n)
	}
	testkit.Eventually(t, limit, "closed when idle", func() bool { return p.host.Conns() == 0 })
	p.get(id, 8000, "/")
	if _, err := p.c.Delete(p.ctx(), id); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, limit, "closed with the sandbox", func() bool { return p.host.Conns() == 0 })
}

// TestPortHostileGuests: whatever a guest answers, the server lives, keeps little,
// and passes no line of it off as its own.
func TestPortHostileGuests(t *testing.T) {
	p := newPorts(t)
	id := p.create()
	hasty := newPorts(t, func(c *server.Config) { c.PortAnswer = time.Second })
	endless := func(c net.Conn, piece string) {
		for n := 0; n < 64<<20; n += len(piece) {
			if _, err := io.WriteString(c, piece); err != nil {
				return
			}
		}
		t.Errorf("64 MiB of %q were taken", piece[:min(len(piece), 20)])
	}
	const okay = "HTTP/1.1 200 OK\r\n"
	for i, tt := range []struct {
		name   string
		talk   func(net.Conn)
		status int
	}{
		{"endless headers", func(c net.Conn) {
			_, _ = io.WriteString(c, okay)
			endless(c, "X-Head: "+strings.Repeat("y", 1000)+"\r\n")
		}, 502},
		{"one endless header", func(c net.Conn) { _, _ = io.WriteString(c, okay+"X: "); endless(c, strings.Repeat("y", 1000)) }, 502},
		{"an endless status line", func(c net.Conn) { endless(c, "HTTP/1.1 200 O"+strings.Repeat("K", 1000)) }, 502},
		{"huge cookies", func(c net.Conn) {
			_, _ = io.WriteString(c, okay+strings.Repeat("Set-Cookie: a="+strings.Repeat("b", 4000)+"\r\n", 100)+"\r\n")
		}, 502},
		{"slow headers", func(c net.Conn) {
			for range 1000 {
				if _, err := io.WriteString(c, okay[:1]); err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond) // it is slow
			}
			t.Error("slow headers were waited for")
		}, 504},
		{"a header that is two", func(c net.Conn) {
			_, _ = io.WriteString(c, okay+"X-A: b\rSet-Cookie: dormouse_token=x\r\nX-B: c\x00d\r\nContent-Length: 0\r\n\r\n")
		}, 502},
		{"a negative length", func(c net.Conn) { _, _ = io.WriteString(c, okay+"Content-Length: -5\r\n\r\n") }, 502},
		{"two lengths", func(c net.Conn) {
			_, _ = io.WriteString(c, okay+"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!")
		}, 502},
		{"another protocol than asked for", func(c net.Conn) {
			_, _ = io.WriteString(c, "HTTP/1.1 101 Switching\r\nUpgrade: evil\r\nConnection: Upgrade\r\n\r\nbytes")
		}, 502},
		{"a status that is none", func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 42 Odd\r\nContent-Length: 0\r\n\r\n") }, 502},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, id, port := p, id, 9000+i
			if tt.status == 504 { // the others answer in the time that they need
				p, id = hasty, hasty.create()
			}
			p.raw(port, func(c net.Conn) {
				buf := make([]byte, 4<<10)
				if _, err := c.Read(buf); err == nil {
					tt.talk(c)
				}
			})
			got := p.get(id, port, "/")
			if got.StatusCode != tt.status || len(got.text) > 1000 || got.Header.Get("Set-Cookie") != "" {
				t.Errorf("%s: %d bytes %.300s", got.Status, len(got.text), got.text)
			}
		})
	}
	// A second answer that nobody asked for goes to nobody.
	p.raw(9100, func(c net.Conn) {
		buf := make([]byte, 4<<10)
		for {
			if _, err := c.Read(buf); err != nil {
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst"+"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond")
		}
	})
	for range 20 {
		if got := p.get(id, 9100, "/"); got.text != "first" && got.StatusCode != 502 {
			t.Fatalf("got %s %q", got.Status, got.text)
		}
	}
	// A body that breaks off is not passed off as whole.
	p.raw(9101, func(c net.Conn) {
		_, _ = c.Read(make([]byte, 4<<10))
		_, _ = io.WriteString(c, okay+"Content-Length: 100\r\n\r\npart")
	})
	resp, err := p.browser().Do(p.request("GET", p.path(id, 9101, "/"), nil))
	if err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("a part came as the whole: %q", text)
	}
	_ = resp.Body.Close()
}

// TestPortTCP: bytes both ways, both halves, and why it ends.
func TestPortTCP(t *testing.T) {
	p := newPorts(t, func(c *server.Config) { c.KeepAlive = 20 * time.Millisecond })
	id := p.create()
	p.raw(8000, func(c net.Conn) {
		_, _ = io.Copy(c, c)
		_ = c.(*net.TCPConn).CloseWrite()
	})
	conn, err := p.c.DialPort(p.ctx(), id, 8000)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	sent := make([]byte, 20<<20+3)
	_, _ = rand.Read(sent)
	done := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		time.Sleep(100 * time.Millisecond) // signs of life come in between
		done <- errors.Join(err, conn.CloseWrite())
	}()
	got, err := io.ReadAll(conn)
	if err := errors.Join(err, <-done); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d of %d bytes came back, %v", len(got), len(sent), err)
	}
	_ = conn.Close()

	_, err = p.c.DialPort(p.ctx(), id, 8001)
	p.wantKind(err, sandbox.KindUnanswered)
	if !strings.Contains(err.Error(), "8001") {
		t.Error(err)
	}
	conn, err = p.c.DialPort(p.ctx(), id, 8000)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := p.c.Delete(p.ctx(), id); err != nil {
		t.Fatal(err)
	}
	if _, err = io.ReadAll(conn); !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), "ended with cause user") {
		t.Errorf("after the end of the sandbox: %v (%s)", err, sandbox.KindOf(err))
	}
	testkit.Eventually(t, limit, "closed, all connections", func() bool { return p.host.Conns() == 0 })
	_, err = p.c.DialPort(p.ctx(), id, 8000)
	p.wantKind(err, sandbox.KindConflict)
}

// TestPortTCPWithoutReader: clients that vanish, and guests that do not read, hold
// nothing.
func TestPortTCPWithoutReader(t *testing.T) {
	p := newPorts(t, func(c *server.Config) { c.KeepAlive = 20 * time.Millisecond })
	id := p.create()
	hung := make(chan struct{})
	defer close(hung)
	p.raw(8000, func(net.Conn) { <-hung })
	p.raw(8001, func(c net.Conn) { _, _ = io.Copy(c, &counting{n: new(atomic.Int64)}) })
	for _, port := range []int{8000, 8001} {
		conn, err := p.c.DialPort(p.ctx(), id, port)
		if err != nil {
			t.Fatal(err)
		}
		var sent atomic.Int64
		ended := make(chan struct{})
		go func() { defer close(ended); _, _ = io.Copy(conn, &counting{n: &sent}) }()
		testkit.Eventually(t, limit, "held back", func() bool {
			before := sent.Load()
			time.Sleep(200 * time.Millisecond) // that nothing happens has no event
			return port == 8001 || before > 0 && sent.Load() == before
		})
		_ = conn.Close()
		<-ended
		testkit.Eventually(t, limit, "closed", func() bool { return p.host.Conns() == 0 })
	}
}

// TestPortLeavesNothing: no goroutine and no descriptor stays of connections that
// are over.
func TestPortLeavesNothing(t *testing.T) {
	p := newPorts(t, func(c *server.Config) { c.PortIdle = 50 * time.Millisecond })
	id := p.create()
	p.serve(8000, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "x") })
	p.raw(8001, func(c net.Conn) { _, _ = io.Copy(c, c) })
	round := func() {
		for range 10 {
			p.get(id, 8000, "/")
			p.get(id, 8002, "/")
			conn, err := p.c.DialPort(p.ctx(), id, 8001)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(conn, "x")
			_, _ = conn.Read(make([]byte, 1))
			_ = conn.Close()
		}
		testkit.Eventually(t, limit, "closed", func() bool { return p.host.Conns() == 0 })
	}
	round()
	settle := func() (int, int) { return runtime.NumGoroutine(), testkit.OpenFDs(t) }
	routines, fds := settle()
	for range 5 {
		round()
	}
	const slack = 20 // idle connections of this test's own clients
	testkit.Eventually(t, limit, fmt.Sprintf("back at %d goroutines and %d descriptors", routines, fds), func() bool {
		r, f := settle()
		return r <= routines+slack && f <= fds+slack
	})
}
