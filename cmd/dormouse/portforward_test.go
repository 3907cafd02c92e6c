package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// forwarding is a port-forward in a process of its own.
type forwarding struct {
	*exec.Cmd
	echo, closed string // addresses here
	errOut       bytes.Buffer
}

func startForwarding(t *testing.T) (*fakeServer, *forwarding) {
	t.Helper()
	f := newFake(t)
	f.add(boxA)
	p := &forwarding{Cmd: process(t, "port-forward", boxA, "0:8000", "0:8001")}
	p.Stderr = &p.errOut
	out, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for _, port := range []int{8000, 8001} {
		if !lines.Scan() {
			t.Fatalf("no line about port %d: %s", port, p.errOut.String())
		}
		here, there, _ := strings.Cut(lines.Text(), " -> ")
		if there == "8000" {
			p.echo = here
		} else {
			p.closed = here
		}
	}
	return f, p
}

func dialHere(t *testing.T, at string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	return c.(*net.TCPConn)
}

// TestPortForwardCarriesManyAtOnce, both halves of each, and goes on when there is
// nothing behind a port.
func TestPortForwardCarriesManyAtOnce(t *testing.T) {
	_, p := startForwarding(t)
	var wg sync.WaitGroup
	for i := range 20 {
		c := dialHere(t, p.echo)
		wg.Go(func() {
			said := strings.Repeat(fmt.Sprint("connection ", i, "; "), 10_000)
			go func() { _, _ = io.WriteString(c, said); _ = c.CloseWrite() }()
			if got, err := io.ReadAll(c); err != nil || string(got) != said {
				t.Errorf("connection %d: %d bytes of %d, %v", i, len(got), len(said), err)
			}
		})
	}
	wg.Wait()
	refused, err := net.Dial("tcp", p.closed)
	if err == nil {
		_, err = refused.Read(make([]byte, 1))
		_ = refused.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a port without a server: %v, want a reset", err)
	}
	left := dialHere(t, p.echo)
	_, _ = io.WriteString(left, "hello")
	_ = left.SetLinger(0)
	_ = left.Close() // a program that breaks off
	if _, err := io.WriteString(dialHere(t, p.echo), "still here"); err != nil {
		t.Error(err)
	}
	_ = p.Process.Signal(syscall.SIGINT)
	if got := statusOf(t, p.Wait()); got != 130 {
		t.Errorf("exit status %d after SIGINT", got)
	}
	if got := p.errOut.String(); got != "dormouse: a connection to port 8001: nothing listens on port 8001\n" {
		t.Errorf("it complained: %q", got)
	}
}

// TestPortForwardEndsWithItsSandbox, with its cause, whatever is open then.
func TestPortForwardEndsWithItsSandbox(t *testing.T) {
	f, p := startForwarding(t)
	open := dialHere(t, p.echo)
	_, _ = io.WriteString(open, "hello")
	if _, err := io.ReadFull(open, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	f.end(f.boxes[0], sandbox.CauseTTL)
	if got := statusOf(t, p.Wait()); got != 5 || !strings.Contains(p.errOut.String(), "has ended: ttl") {
		t.Errorf("exit status %d, %q", got, p.errOut.String())
	}
	if _, err := open.Read(make([]byte, 1)); err == nil {
		t.Error("its connection goes on")
	}
	if got := ask(t, "port-forward", boxA, "0:8000"); got.code != 5 || !strings.Contains(got.errOut, "has ended: ttl") {
		t.Errorf("one that has ended: %+v", got)
	}
}

func TestPortForwardRefuses(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{boxA}, 2, "at least 2"},
		{[]string{boxA, "http"}, 2, "is not PORT"},
		{[]string{boxA, "8000:"}, 2, "is not PORT"},
		{[]string{boxA, "0"}, 2, "is not PORT"},
		{[]string{boxA, "1:2:3"}, 2, "is not PORT"},
		{[]string{boxA, "65536"}, 2, "is not PORT"},
		{[]string{boxA, port + ":8000"}, 5, "taken by another program"},
		{[]string{"qqqq", "8000"}, 3, "no sandbox"},
	} {
		got := ask(t, append([]string{"port-forward"}, tt.args...)...)
		if got.code != tt.code || !strings.Contains(got.errOut, tt.says) {
			t.Errorf("%q: %+v", tt.args, got)
		}
	}
}

func TestURL(t *testing.T) {
	f := newFake(t)
	f.add(boxA)
	if got := ask(t, "url", "aaaa", "8000"); got.code != 0 || got.out != "http://8000-"+boxA+".localhost/?dormouse_link=x\n" {
		t.Errorf("%+v", got)
	}
	if got := ask(t, "url", "aaaa", "8000", "--json"); !strings.Contains(got.out, `"token": "dmt_x"`) {
		t.Errorf("%+v", got)
	}
	if got := ask(t, "url", "aaaa", "70000"); got.code != 2 {
		t.Errorf("%+v", got)
	}
}
