package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeQEMU serves one client with a script of replies.
func fakeQEMU(t *testing.T, greeting string, serve func(conn net.Conn, lines *bufio.Scanner)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qmp")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	wg.Go(func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }() // the test has what it wants
		_, _ = fmt.Fprintln(conn, greeting)
		serve(conn, bufio.NewScanner(conn))
	})
	return path
}

const hello = `{"QMP": {"version": {}, "capabilities": []}}`

type request struct {
	Execute string `json:"execute"`
	ID      int    `json:"id"`
}

// next reads a command.
func next(lines *bufio.Scanner) (r request, ok bool) {
	if !lines.Scan() {
		return r, false
	}
	return r, json.Unmarshal(lines.Bytes(), &r) == nil
}

func reply(conn net.Conn, id int, rest string) {
	_, _ = fmt.Fprintf(conn, "{\"id\": %d, %s}\n", id, rest)
}

func negotiate(conn net.Conn, lines *bufio.Scanner) {
	r, _ := next(lines)
	reply(conn, r.ID, `"return": {}`)
}

func limited(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestRepliesFindTheirCommands(t *testing.T) {
	path := fakeQEMU(t, hello, func(conn net.Conn, lines *bufio.Scanner) {
		negotiate(conn, lines)
		a, _ := next(lines)
		b, _ := next(lines)
		_, _ = fmt.Fprintln(conn, `{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}`)
		reply(conn, 4711, `"return": {}`) // nobody asked
		reply(conn, b.ID, fmt.Sprintf(`"return": {"status": %q}`, b.Execute))
		reply(conn, a.ID, fmt.Sprintf(`"return": {"status": %q}`, a.Execute))
		lines.Scan()
	})
	events := make(chan event, 1)
	m, err := dialMonitor(limited(t), path, func(e event) { events <- e })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	var wg sync.WaitGroup
	for _, name := range []string{"one", "two"} {
		wg.Go(func() {
			var got struct{ Status string }
			if err := m.run(limited(t), name, nil, &got); err != nil || got.Status != name {
				t.Errorf("%s: %q, %v", name, got.Status, err)
			}
		})
	}
	wg.Wait()
	if e := <-events; e.Name != "SHUTDOWN" || !strings.Contains(string(e.Data), "guest-reset") {
		t.Errorf("event %+v", e)
	}
}

func TestErrorsOfQEMUAndItsDeathReachTheCaller(t *testing.T) {
	path := fakeQEMU(t, hello, func(conn net.Conn, lines *bufio.Scanner) {
		negotiate(conn, lines)
		r, _ := next(lines)
		reply(conn, r.ID, `"error": {"class": "GenericError", "desc": "no such thing"}`)
		next(lines) // and dies instead of answering
	})
	m, err := dialMonitor(limited(t), path, func(event) {})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	if err := m.run(limited(t), "bad", nil, nil); err == nil || !strings.Contains(err.Error(), "no such thing") {
		t.Errorf("an error of QEMU: %v", err)
	}
	if err := m.run(limited(t), "last", nil, nil); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a command that QEMU died over: %v", err)
	}
	if err := m.run(limited(t), "later", nil, nil); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a command after its death: %v", err)
	}
}

func TestAQEMUThatDoesNotAnswerIsNotWaitedForForEver(t *testing.T) {
	silent := func(net.Conn, *bufio.Scanner) {}
	stuck := func(conn net.Conn, lines *bufio.Scanner) { lines.Scan(); lines.Scan() }
	for name, path := range map[string]string{
		"no greeting":      fakeQEMU(t, "", stuck),
		"another greeting": fakeQEMU(t, `{"SSH": 2}`, silent),
		"not JSON":         fakeQEMU(t, "220 mail.example ESMTP", silent),
		"a line for ever":  fakeQEMU(t, strings.Repeat("x", maxMessage+1), silent),
		"no negotiation":   fakeQEMU(t, hello, stuck),
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		start := time.Now()
		m, err := dialMonitor(ctx, path, func(event) {})
		cancel()
		if err == nil {
			t.Errorf("%s: connected", name)
			_ = m.Close()
		}
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("%s: it took %v", name, took)
		}
	}
}
