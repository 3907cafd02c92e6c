package host_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	"github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1/hostv1connect"
	"github.com/dormouse-sandbox/dormouse/host/server"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func (r *rig) port(n int) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ports[n]
}

// listen puts something behind a port of every guest.
func (r *rig) listen(port int, serve func(*net.TCPConn)) {
	r.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		r.t.Fatal(err)
	}
	var wg sync.WaitGroup
	r.t.Cleanup(func() { _ = l.Close(); wg.Wait() }) // its end is all it has to do
	r.mu.Lock()
	if r.ports == nil {
		r.ports = map[int]string{}
	}
	r.ports[port] = l.Addr().String()
	r.mu.Unlock()
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }() // the other side sees what is missing
				serve(c.(*net.TCPConn))
			})
		}
	})
}

func echo(c *net.TCPConn) {
	_, _ = io.Copy(c, c) // the other side sees what is missing
	_ = c.CloseWrite()   // likewise
}

// remote serves an agent as control reaches it.
func remote(t *testing.T, agent *host.Agent) hostv1connect.HostServiceClient {
	t.Helper()
	_, handler := server.New(agent)
	l := hostapi.NewLocal(handler)
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return hostapi.NewClient(l.Client(), l.BaseURL())
}

// TestPortCarriesBothWays: what is sent arrives, whole, and each half ends by
// itself.
func TestPortCarriesBothWays(t *testing.T) {
	r := newRig(t)
	c := remote(t, r.open())
	id := string(r.mustCreate())
	r.listen(8000, echo)
	conn, err := hostapi.OpenPort(t.Context(), c, id, 8000)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	sent := make([]byte, 5<<20+17)
	_, _ = rand.Read(sent)
	done := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		done <- errors.Join(err, conn.CloseWrite())
	}()
	got, err := io.ReadAll(conn)
	if err := errors.Join(err, <-done); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("sent %d bytes, %d came back, %v", len(sent), len(got), err)
	}
}

// TestPortHalves: a guest that has said all it has still hears the rest.
func TestPortHalves(t *testing.T) {
	r := newRig(t)
	c := remote(t, r.open())
	id := string(r.mustCreate())
	heard := make(chan string, 1)
	r.listen(8000, func(c *net.TCPConn) {
		_ = c.CloseWrite() // the other side waits for it
		data, _ := io.ReadAll(c)
		heard <- string(data)
	})
	conn, err := hostapi.OpenPort(t.Context(), c, id, 8000)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if n, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("read %d bytes, %v", n, err)
	}
	if _, err := io.WriteString(conn, "and one more thing"); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got := <-heard; got != "and one more thing" {
		t.Errorf("the guest heard %q", got)
	}
}

// TestPortRefuses: every way in which there is no connection has its kind and its
// words.
func TestPortRefuses(t *testing.T) {
	r := newRig(t)
	agent := r.open()
	c := remote(t, agent)
	id := string(r.mustCreate())
	for name, tt := range map[string]struct {
		id   string
		port int
		kind sandbox.Kind
		says string
	}{
		"a closed port":  {id, 8001, sandbox.KindUnanswered, "nothing listens on port 8001 of sandbox " + id},
		"no port":        {id, 0, sandbox.KindInvalid, "from 1 to 65535"},
		"too high a one": {id, 65536, sandbox.KindInvalid, "from 1 to 65535"},
		"no sandbox":     {string(sandbox.NewID()), 8000, sandbox.KindNotFound, "not on this host"},
	} {
		conn, err := hostapi.OpenPort(t.Context(), c, tt.id, tt.port)
		if err == nil {
			_ = conn.Close()
		}
		if !sandbox.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v (%s)", name, err, sandbox.KindOf(err))
		}
	}
	if _, err := agent.Destroy(t.Context(), id, sandbox.CauseTTL); err != nil {
		t.Fatal(err)
	}
	if _, err := hostapi.OpenPort(t.Context(), c, id, 8000); !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), "ttl") {
		t.Errorf("after the end: %v", err)
	}
}

// TestPortOfAFrozenSandbox: nobody waits for a sandbox that stands still.
func TestPortOfAFrozenSandbox(t *testing.T) {
	r := newRig(t)
	c := remote(t, r.open())
	id := r.mustCreate()
	r.listen(8000, echo)
	r.free.Store(1)
	testkit.Eventually(t, 10*time.Second, "frozen", func() bool { return r.status(id).Frozen != "" })
	if _, err := hostapi.OpenPort(t.Context(), c, string(id), 8000); !sandbox.Is(err, sandbox.KindNoSpace) {
		t.Errorf("a frozen sandbox: %v", err)
	}
}

// TestPortEndsWithItsSandbox: whatever the connection does just then, it learns
// why.
func TestPortEndsWithItsSandbox(t *testing.T) {
	for name, serve := range map[string]func(c *net.TCPConn, over <-chan struct{}){
		"silent":      func(c *net.TCPConn, _ <-chan struct{}) { _, _ = io.Copy(io.Discard, c) },
		"half ended":  func(c *net.TCPConn, _ <-chan struct{}) { _ = c.CloseWrite(); _, _ = io.Copy(io.Discard, c) },
		"endless":     func(c *net.TCPConn, _ <-chan struct{}) { _, _ = io.Copy(c, endless{}) },
		"not reading": func(_ *net.TCPConn, over <-chan struct{}) { <-over },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			agent := r.open()
			c := remote(t, agent)
			id := string(r.mustCreate())
			over := make(chan struct{})
			r.listen(8000, func(c *net.TCPConn) { serve(c, over) })
			defer close(over)
			conn, err := hostapi.OpenPort(t.Context(), c, id, 8000)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			go func() { _, _ = io.Copy(conn, endless{}) }() // ends with the connection
			ended := make(chan error, 1)
			go func() {
				_, err := io.Copy(io.Discard, conn)
				if err == nil { // the guest's half has ended; the rest ends with the sandbox
					_, err = conn.Write(make([]byte, 16<<20))
				}
				ended <- err
			}()
			if _, err := agent.Destroy(t.Context(), id, sandbox.CauseTTL); err != nil {
				t.Fatal(err)
			}
			select {
			case err = <-ended:
			case <-time.After(20 * time.Second):
				t.Fatal("the connection goes on")
			}
			if name != "half ended" && (!sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), "ttl")) {
				t.Errorf("the connection ended with %v (%s)", err, sandbox.KindOf(err))
			}
		})
	}
}

// TestPortHoldsBackAFastGuest: what a caller does not read stays in the guest.
func TestPortHoldsBackAFastGuest(t *testing.T) {
	r := newRig(t)
	c := remote(t, r.open())
	id := string(r.mustCreate())
	var written atomic.Int64
	r.listen(8000, func(c *net.TCPConn) {
		piece := make([]byte, 64<<10)
		for {
			n, err := c.Write(piece)
			written.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	conn, err := hostapi.OpenPort(t.Context(), c, id, 8000)
	if err != nil {
		t.Fatal(err)
	}
	steady := func() bool {
		before := written.Load()
		time.Sleep(300 * time.Millisecond) // that nothing happens has no event
		return before > 0 && written.Load() == before
	}
	testkit.Eventually(t, 30*time.Second, "held back", steady)
	const most = 32 << 20 // the sockets' buffers and the stream's window
	if n := written.Load(); n > most {
		t.Errorf("%d bytes are on their way to somebody who reads nothing", n)
	}
	if n, err := io.CopyN(io.Discard, conn, 2*most); err != nil {
		t.Errorf("once it is read, %d bytes came, %v", n, err)
	}
	_ = conn.Close()
	testkit.Eventually(t, 10*time.Second, "told that its reader is gone", func() bool { return steady() })
}

// TestPortBound: one sandbox keeps only so many connections.
func TestPortBound(t *testing.T) {
	const most = 256
	r := newRig(t)
	agent := r.open()
	id := string(r.mustCreate())
	r.listen(8000, echo)
	var conns []*host.PortConn
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	for {
		c, err := agent.OpenPort(t.Context(), id, 8000)
		if err != nil {
			if !sandbox.Is(err, sandbox.KindBusy) || len(conns) != most {
				t.Fatalf("after %d connections: %v", len(conns), err)
			}
			break
		}
		conns = append(conns, c)
		if len(conns) > most {
			t.Fatalf("%d connections", len(conns))
		}
	}
	for range 2 { // twice counts once
		if err := conns[0].Close(); err != nil {
			t.Fatal(err)
		}
	}
	again, err := agent.OpenPort(t.Context(), id, 8000)
	if err != nil {
		t.Fatalf("after one was closed: %v", err)
	}
	conns = append(conns, again)
	if _, err := agent.OpenPort(t.Context(), id, 8000); !sandbox.Is(err, sandbox.KindBusy) {
		t.Errorf("one was closed twice, and now there is room for two: %v", err)
	}
}

// TestPortsThatAnswerNoSYN: attempts to connect to ports are bounded, and leave
// the way to the agent free.
func TestPortsThatAnswerNoSYN(t *testing.T) {
	r := newRig(t)
	d := &deaf{networks: r.networks}
	r.agentCfg = func(c *host.Config) { c.Networks = d }
	agent := r.open()
	id := string(r.mustCreate())
	d.silent.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			if _, err := agent.OpenPort(ctx, id, 8000); err == nil {
				t.Error("a port that is deaf has answered")
			}
		})
	}
	wg.Wait()
	if most := d.most.Load(); most > 32 {
		t.Errorf("%d attempts to connect at the same time", most)
	}
	d.silent.Store(false)
	if _, err := agent.Ping(t.Context(), id); err != nil {
		t.Errorf("the agent: %v", err)
	}
	r.listen(8000, echo)
	c, err := agent.OpenPort(t.Context(), id, 8000)
	if err != nil {
		t.Fatalf("failed attempts still count: %v", err)
	}
	_ = c.Close()
}

// TestAgentPort: control, which knows nothing of the guest's contract, guards the
// right one.
func TestAgentPort(t *testing.T) {
	if hostapi.AgentPort != guestapi.Port {
		t.Errorf("the agent listens on %d, control guards %d", guestapi.Port, hostapi.AgentPort)
	}
}
