package server_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestSlowReaderOfAnAnswer: whoever takes more than a moment to read a large answer
// is answered again, over the same connection.
func TestSlowReaderOfAnAnswer(t *testing.T) {
	r := newRig(t)
	id := r.create()
	c, err := net.Dial("tcp", r.http.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }() // the test's own
	if err := c.(*net.TCPConn).SetReadBuffer(256 << 10); err != nil {
		t.Fatal(err)
	}
	if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewReader(c)
	ask := func(line, body string, pause time.Duration) {
		t.Helper()
		_, err := fmt.Fprintf(c, "%s HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Length: %d\r\n\r\n%s", line, r.key, len(body), body)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(answers, nil)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(pause) // it is slow
		text, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s, %d bytes %.200s, %v", line, resp.Status, len(text), text, err)
		}
	}
	path := "/v1/sandboxes/" + id
	ask("POST "+path+"/exec", `{"command":["spew","4194304"]}`, 3*time.Second)
	ask("GET "+path, "", 0)
	ask("GET "+path, strings.Repeat(" ", 10), 0)
}
