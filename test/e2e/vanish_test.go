package e2e_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// TestClientVanishes: clients that are gone in the middle of a stream, a
// download or an upload leave nothing behind: no goroutine and no descriptor in
// the server (control and host are one process), no command and no piece of a
// file in the guest.
func TestClientVanishes(t *testing.T) {
	w := shared(t)
	id := w.box()
	w.sh(id, "mkdir /tmp/vanish && head -c 100M /dev/zero >/tmp/vanish/big")
	t.Cleanup(func() { w.sh(id, "rm -r /tmp/vanish") })
	before := w.atRest()
	const rounds = 5
	for range rounds {
		for name, vanish := range map[string]func(world, string) error{
			"an exec stream with endless output": vanishFromStream,
			"an exec that waits":                 vanishFromExec,
			"a download":                         vanishFromDownload,
			"an upload":                          vanishFromUpload,
		} {
			if err := vanish(w, id); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
	start := time.Now()
	w.settled(id)
	quiet := time.Since(start)
	var after resources
	testkit.Eventually(t, time.Minute, fmt.Sprintf("back at %+v", before), func() bool {
		after = w.resources()
		return after.goroutines <= before.goroutines && after.fds <= before.fds
	})
	t.Logf("%d clients vanished from each of 4 kinds of stream; nothing of them in the guest after %v; server before %+v, after %+v",
		rounds, quiet, before, after)
}

// atRest is what the server holds when it has nothing to do: the least seen
// within a time longer than it keeps an idle connection to a guest, 15 s.
func (w world) atRest() resources {
	w.t.Helper()
	least := w.resources()
	for end := time.Now().Add(17 * time.Second); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
		now := w.resources()
		least = resources{min(least.goroutines, now.goroutines), min(least.fds, now.fds)}
	}
	return least
}

// settled waits until the guest has nothing of the vanished clients.
func (w world) settled(id string) {
	w.t.Helper()
	testkit.Eventually(w.t, 30*time.Second, "rid of the commands of clients that are gone", func() bool {
		return w.sh(id, "grep -alE '^(yes|sleep.31)' /proc/[0-9]*/cmdline 2>/dev/null | wc -l") == "0"
	})
	testkit.Eventually(w.t, 30*time.Second, "rid of the cut upload", func() bool {
		return w.sh(id, "ls -A /tmp/vanish") == "big"
	})
}

// resources is what the server's process holds.
type resources struct{ goroutines, fds int }

func (w world) resources() resources {
	w.t.Helper()
	w.Client.CloseIdle()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", w.PID()))
	if err != nil {
		w.t.Fatal(err)
	}
	return resources{int(w.metric("go_goroutines")), len(fds)}
}

// metric reads one number that Prometheus would see.
func (w world) metric(name string) float64 {
	w.t.Helper()
	for line := range strings.Lines(w.prometheus()) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				w.t.Fatal(err)
			}
			return n
		}
	}
	w.t.Fatalf("/metrics has no %s", name)
	return 0
}

func (w world) prometheus() string {
	w.t.Helper()
	req, err := http.NewRequestWithContext(within(w.t, time.Minute), http.MethodGet, w.URL+"/metrics", nil)
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+w.Key())
	req.Close = true // a kept connection would count
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		w.t.Fatalf("GET /metrics: %s, %v", resp.Status, err)
	}
	return string(text)
}

// counter counts and discards.
type counter struct{ n atomic.Int64 }

func (c *counter) Write(p []byte) (int, error) { c.n.Add(int64(len(p))); return len(p), nil }

func vanishFromStream(w world, id string) error {
	var out counter
	s, err := w.Client.ExecStream(within(w.t, time.Minute), id, api.Exec{Command: []string{"yes"}}, client.StreamOptions{Stdout: &out})
	if err != nil {
		return err
	}
	testkit.Eventually(w.t, 30*time.Second, "a megabyte of output", func() bool { return out.n.Load() > 1<<20 })
	return s.Close()
}

func vanishFromExec(w world, id string) error {
	ctx, cancel := context.WithCancel(within(w.t, time.Minute))
	done := make(chan error, 1)
	go func() {
		_, err := w.Client.Exec(ctx, id, api.Exec{Command: []string{"sleep", "31"}})
		done <- err
	}()
	testkit.Eventually(w.t, 30*time.Second, "the command running", func() bool {
		return w.sh(id, "grep -alE '^sleep.31' /proc/[0-9]*/cmdline 2>/dev/null | wc -l") == "1"
	})
	cancel()
	if err := <-done; err == nil {
		return fmt.Errorf("a cancelled exec ended well")
	}
	return nil
}

func vanishFromDownload(w world, id string) error {
	body, _, err := w.Client.ReadFile(within(w.t, time.Minute), id, "/tmp/vanish/big", "")
	if err != nil {
		return err
	}
	if _, err := io.CopyN(io.Discard, body, 1<<20); err != nil {
		return err
	}
	return body.Close()
}

// vanishFromUpload sends half of what it announced, then resets its connection.
func vanishFromUpload(w world, id string) error {
	u, err := url.Parse(w.URL)
	if err != nil {
		return err
	}
	conn, err := net.Dial("tcp", u.Host)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // closed below if all goes well
	out := bufio.NewWriter(conn)
	_, _ = fmt.Fprintf(out, "PUT /v1/sandboxes/%s/files/write?path=/tmp/vanish/cut HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n",
		id, u.Host, w.Key(), 20<<20)
	if _, err := io.Copy(out, stream(10<<20)); err != nil {
		return err
	}
	if err := out.Flush(); err != nil {
		return err
	}
	testkit.Eventually(w.t, 30*time.Second, "a part of the upload in the guest", func() bool {
		return w.sh(id, "ls -A /tmp/vanish | wc -l") != "1"
	})
	if tcp, ok := conn.(*net.TCPConn); ok {
		if err := tcp.SetLinger(0); err != nil {
			return err
		}
	}
	return conn.Close()
}
