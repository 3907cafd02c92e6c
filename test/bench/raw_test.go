package bench_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// transferBytes is the size of one transfer.
const transferBytes = 64 << 20

// rawHTTP talks to a sandbox's guest from inside its network namespace, with
// nothing of the server in between.
type rawHTTP struct {
	s       *rig.Server
	id      string
	address string
	http    *http.Client
}

func newRawHTTP(b *testing.B, s *rig.Server, id string) *rawHTTP {
	b.Helper()
	data, err := os.ReadFile(filepath.Join(s.Data, "host", "journal", id+".json"))
	if err != nil {
		b.Fatal(err)
	}
	var entry struct{ Slot int }
	if err := json.Unmarshal(data, &entry); err != nil {
		b.Fatal(err)
	}
	namespace := fmt.Sprintf("dm%s-%d", s.Instance, entry.Slot)
	return &rawHTTP{s: s, id: id, address: guestAddress(b, s), http: &http.Client{Transport: &http.Transport{
		DisableCompression: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return rig.DialIn(ctx, namespace, network, address)
		},
	}}}
}

// guestAddress is what the VM's command line tells its guest.
func guestAddress(b *testing.B, s *rig.Server) string {
	b.Helper()
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", s.VMs()[0]))
	if err != nil {
		b.Fatal(err)
	}
	boot, err := guestapi.ParseCmdline(strings.ReplaceAll(string(line), "\x00", " "))
	if err != nil {
		b.Fatal(err)
	}
	return boot.Address.Addr().String()
}

func (r *rawHTTP) url(port int, path string) string {
	return "http://" + net.JoinHostPort(r.address, strconv.Itoa(port)) + path
}

func (r *rawHTTP) health() error { return swallowAnswer(r.http.Get(r.url(guestapi.Port, "/health"))) }

const rawPort = 8000

// sink is the other end of a raw transfer: it drops what is sent to it and
// makes up what is asked of it.
const sink = `
import http.server, sys
block = bytes(1 << 20)
class H(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(%[1]d))
        self.end_headers()
        for i in range(%[1]d >> 20): self.wfile.write(block)
    def do_PUT(self):
        left = int(self.headers["Content-Length"])
        buf = memoryview(bytearray(1 << 20))
        while left: left -= self.rfile.readinto1(buf[:min(left, len(buf))])
        self.send_response(204)
        self.end_headers()
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(("", %[2]d), H).serve_forever()
`

// serve starts the sink in the guest. It ends with the benchmark.
func (r *rawHTTP) serve(b *testing.B) {
	b.Helper()
	program := fmt.Sprintf(sink, transferBytes, rawPort)
	stream, err := r.s.Client.ExecStream(b.Context(), r.id, api.Exec{Command: []string{"python3", "-c", program}, User: "root"},
		client.StreamOptions{Stderr: os.Stderr})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = stream.Close() })
	testkit.Eventually(b, time.Minute, "served in the guest", func() bool {
		c, err := r.http.Transport.(*http.Transport).DialContext(b.Context(), "tcp", net.JoinHostPort(r.address, strconv.Itoa(rawPort)))
		if err != nil {
			return false
		}
		return c.Close() == nil
	})
}

func (r *rawHTTP) upload() error {
	req, err := http.NewRequest(http.MethodPut, r.url(rawPort, "/"), zeros())
	if err != nil {
		return err
	}
	req.ContentLength = transferBytes
	return swallowAnswer(r.http.Do(req))
}

func (r *rawHTTP) download() error { return swallowAnswer(r.http.Get(r.url(rawPort, "/"))) }

func swallowAnswer(resp *http.Response, err error) error {
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		_ = resp.Body.Close() // the status is what is wrong
		return fmt.Errorf("the guest answers %s", resp.Status)
	}
	return swallow(resp.Body)
}

func swallow(body io.ReadCloser) error {
	_, err := io.Copy(io.Discard, body)
	if err != nil {
		return err
	}
	return body.Close()
}

// zeros is the content of a transfer. Nothing on the way compresses.
func zeros() io.Reader { return io.LimitReader(nought{}, transferBytes) }

type nought struct{}

func (nought) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// rate is how fast one transfer is, in 10^6 bytes a second.
func rate(b *testing.B, transfer func() error) float64 {
	b.Helper()
	return transferBytes / 1e6 / (ms(b, transfer) / 1000)
}

func number(b *testing.B, text string) float64 {
	b.Helper()
	f, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
	if err != nil {
		b.Fatal(err)
	}
	return f
}

// rss is the resident memory of a process, in MiB.
func rss(b *testing.B, pid int) float64 {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return number(b, strings.TrimSuffix(strings.TrimSpace(rest), " kB")) / 1024
		}
	}
	b.Fatalf("process %d has no VmRSS", pid)
	return 0
}
