package e2e_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/hostfake"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// portDomain is the default of up.
const portDomain = "localhost"

// visitor is a client that finds every host name at the server, as a browser does
// with names below localhost.
func (w world) visitor() *http.Client {
	at := strings.TrimPrefix(w.URL, "http://")
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", at)
	}}
	w.t.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t}
}

func (w world) portURL(id string, port int, rest string) string {
	return fmt.Sprintf("%s/v1/sandboxes/%s/ports/%d%s", w.URL, id, port, rest)
}

func (w world) portName(id string, port int, rest string) string {
	_, ours, _ := net.SplitHostPort(strings.TrimPrefix(w.URL, "http://"))
	return fmt.Sprintf("http://%d-%s.%s:%s%s", port, id, portDomain, ours, rest)
}

// call makes a request with the server's key.
func (w world) call(method, to string, body io.Reader) *http.Response {
	w.t.Helper()
	req, err := http.NewRequestWithContext(within(w.t, 10*time.Minute), method, to, body)
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header.Set("X-API-Key", w.Key())
	resp, err := w.visitor().Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = resp.Body.Close() })
	return resp
}

func (w world) text(resp *http.Response) string {
	w.t.Helper()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return string(b)
}

// servePorts starts a server of ours at port 8000 of a sandbox, one that only the
// guest itself reaches at 8001, and Python's at 8002.
func (w world) servePorts(id string) {
	w.t.Helper()
	bin := filepath.Join(w.t.TempDir(), "portserver")
	if err := testkit.Program("./testdata/portserver", bin); err != nil {
		w.t.Fatal(err)
	}
	f, err := os.Open(bin)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // nothing was written to it
	if _, err := w.Client.WriteFile(within(w.t, time.Minute), id, "/tmp/portserver", "root", f); err != nil {
		w.t.Fatal(err)
	}
	w.root(id, `chmod 755 /tmp/portserver; cd /tmp && mkdir -p www && echo "hello from a guest" > www/hello.txt
for a in "/tmp/portserver 0.0.0.0:8000" "/tmp/portserver 127.0.0.1:8001" "python3 -m http.server -d /tmp/www 8002"; do
  setsid $a >/dev/null 2>&1 </dev/null &
done`)
	testkit.Eventually(w.t, time.Minute, "listening in the guest", func() bool {
		return w.exec(id, api.Exec{Shell: "for p in 8000 8001 8002; do curl -sf -m 5 http://127.0.0.1:$p/ >/dev/null || exit 1; done"}).ExitCode == 0
	})
}

// portBox is the sandbox of the tests of ports.
var portBox string

func (w world) ports() string {
	w.t.Helper()
	if portBox == "" {
		portBox = w.box()
		w.servePorts(portBox)
	}
	return portBox
}

// TestPortWeb: a web server in a guest, by path and by name.
func TestPortWeb(t *testing.T) {
	w := shared(t)
	id := w.ports()
	for _, at := range []string{w.portURL(id, 8002, "/hello.txt"), w.portName(id, 8002, "/hello.txt")} {
		resp := w.call("GET", at, nil)
		if got := w.text(resp); resp.StatusCode != 200 || got != "hello from a guest\n" || !strings.HasPrefix(resp.Header.Get("Server"), "SimpleHTTP") {
			t.Errorf("%s: %s %q", at, resp.Status, got)
		}
		t.Logf("GET %s: %s, Server: %s", at, resp.Status, resp.Header.Get("Server"))
	}
	for _, tt := range []struct {
		to     string
		status int
		says   string
	}{
		{w.portURL(id, 8001, "/"), 502, "nothing listens on port 8001 of sandbox " + id},
		{w.portURL(id, 9, "/"), 502, "nothing listens on port 9 of sandbox " + id},
		{w.portURL(id, 49983, "/health"), 204, ""},
		{w.portURL(id, 49983, "/metrics"), 401, ""}, // the agent asks for its own token
		{w.portURL(id, 49983, "/init"), 404, "guest agent"},
		{w.portName(id, 49983, "/%69nit"), 404, "guest agent"},
	} {
		resp := w.call("GET", tt.to, nil)
		if got := w.text(resp); resp.StatusCode != tt.status || !strings.Contains(got, tt.says) {
			t.Errorf("%s: %s %s", tt.to, resp.Status, got)
		}
	}
	anonymous, err := w.visitor().Get(w.portName(id, 8002, "/hello.txt"))
	if err != nil {
		t.Fatal(err)
	}
	_ = anonymous.Body.Close()
	if anonymous.StatusCode != 401 {
		t.Errorf("without a key: %s", anonymous.Status)
	}
}

// TestPortWebSocket: messages go to a guest and back, by path and by name.
func TestPortWebSocket(t *testing.T) {
	w := shared(t)
	id := w.ports()
	for _, at := range []string{w.portURL(id, 8000, "/ws"), w.portName(id, 8000, "/ws")} {
		ctx := within(t, time.Minute)
		c, _, err := websocket.Dial(ctx, at, &websocket.DialOptions{HTTPClient: w.visitor(), HTTPHeader: http.Header{"X-Api-Key": {w.Key()}}})
		if err != nil {
			t.Fatal(err)
		}
		c.SetReadLimit(1 << 20)
		for _, size := range []int{0, 1, 125, 70_000, 500_000} {
			said := bytes.Repeat([]byte("x"), size)
			if err := c.Write(ctx, websocket.MessageBinary, said); err != nil {
				t.Fatal(err)
			}
			if kind, got, err := c.Read(ctx); err != nil || kind != websocket.MessageBinary || !bytes.Equal(got, said) {
				t.Errorf("%d bytes: %d came back, %v", size, len(got), err)
			}
		}
		if err := c.Close(websocket.StatusNormalClosure, ""); err != nil {
			t.Error(err)
		}
	}
}

// TestPortDownload: 256 MiB, with DORMOUSE_LONG=1 a whole GiB, and a quarter of it
// the other way.
func TestPortDownload(t *testing.T) {
	w := shared(t)
	id := w.ports()
	size := int64(256 << 20)
	if testkit.IsLong() {
		size = 1 << 30
	}
	hash := func(n int64) string {
		sum := sha256.New()
		if _, err := io.Copy(sum, hostfake.Pattern(n)); err != nil {
			t.Fatal(err)
		}
		return hex.EncodeToString(sum.Sum(nil))
	}
	start := time.Now()
	resp := w.call("GET", w.portURL(id, 8000, fmt.Sprint("/bytes/", size)), nil)
	sum := sha256.New()
	n, err := io.Copy(sum, resp.Body)
	took := time.Since(start)
	if err != nil || n != size || hex.EncodeToString(sum.Sum(nil)) != hash(size) {
		t.Errorf("%d of %d bytes, %v", n, size, err)
	}
	t.Logf("downloaded %d MiB through the proxy in %v: %.0f MiB/s", n>>20, took.Round(time.Millisecond), float64(n>>20)/took.Seconds())
	start = time.Now()
	if got := w.text(w.call("PUT", w.portURL(id, 8000, "/bytes"), hostfake.Pattern(size/4))); got != hash(size/4) {
		t.Errorf("upload: %s", got)
	}
	t.Logf("uploaded %d MiB in %v", size>>22, time.Since(start).Round(time.Millisecond))
}

// TestPortCookies: what a guest sets reaches no other sandbox, and our cookie
// reaches no guest.
func TestPortCookies(t *testing.T) {
	w := shared(t)
	id := w.ports()
	other := w.create(small()).ID
	w.servePorts(other)
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	browser := w.visitor()
	browser.Jar = jar
	seen := func(to string) (out struct {
		URI    string      `json:"uri"`
		Header http.Header `json:"header"`
	},
	) {
		t.Helper()
		resp, err := browser.Get(to)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		if err := json.NewDecoder(resp.Body).Decode(&out); err != nil || resp.StatusCode != 200 {
			t.Fatalf("%s: %s, %v", to, resp.Status, err)
		}
		return out
	}
	for _, box := range []string{id, other} {
		stdout, stderr, code := w.CLI("", "url", box, "8000")
		if code != 0 {
			t.Fatal(stderr)
		}
		if got := seen(strings.TrimSpace(stdout) + "&domain=" + portDomain); strings.Contains(got.URI, "dormouse") || got.Header.Get("Cookie") != "" {
			t.Errorf("the guest %s sees %s with the cookies %q of others", box, got.URI, got.Header.Get("Cookie"))
		}
		if got := seen(w.portName(box, 8000, "/again")); got.Header.Get("Cookie") != "guest=secret; wide=secret" {
			t.Errorf("the guest sees its own cookies as %q", got.Header.Get("Cookie"))
		}
	}
	resp := w.call("GET", w.portURL(id, 8000, "/?domain=127.0.0.1"), nil)
	jar.SetCookies(resp.Request.URL, resp.Cookies())
	if csp := resp.Header.Get("Content-Security-Policy"); csp != "sandbox" {
		t.Errorf("by path a document gets the policy %q", csp)
	}
	for _, elsewhere := range []string{w.portURL(other, 8000, "/"), w.portURL(id, 8002, "/"), w.URL + "/v1/sandboxes", "http://" + portDomain + "/"} {
		u, err := url.Parse(elsewhere)
		if err != nil {
			t.Fatal(err)
		}
		if got := jar.Cookies(u); len(got) != 0 {
			t.Errorf("%s gets %v", elsewhere, got)
		}
	}
}

// TestPortVanishingClient: a guest learns that its client is gone.
func TestPortVanishingClient(t *testing.T) {
	w := shared(t)
	id := w.ports()
	conns := func() string {
		return w.root(id, `awk '$4=="01" && $2 ~ /:1F40$/' /proc/net/tcp /proc/net/tcp6 | wc -l`)
	}
	ctx, cancel := context.WithCancel(within(t, time.Minute))
	req, err := http.NewRequestWithContext(ctx, "GET", w.portURL(id, 8000, fmt.Sprint("/bytes/", int64(1)<<40)), nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-Key", w.Key())
	resp, err := w.visitor().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, resp.Body, 1<<20); err != nil {
		t.Fatal(err)
	}
	if got := conns(); got == "0" {
		t.Error("during a download the guest has no connection: the test sees nothing")
	}
	cancel()
	_ = resp.Body.Close()
	testkit.Eventually(t, time.Minute, "closed in the guest", func() bool { return conns() == "0" })
}

var forwardedAt = regexp.MustCompile(`(127\.0\.0\.1:[0-9]+) -> 8000`)

// TestPortForward: a port of a guest is one of this machine, until its sandbox
// ends.
func TestPortForward(t *testing.T) {
	w := shared(t)
	id := w.create(small()).ID
	w.servePorts(id)
	cmd := exec.CommandContext(within(t, 5*time.Minute), rig.Build(t).Dormouse, "port-forward", id, "0:8000")
	cmd.Env = append(os.Environ(), "DORMOUSE_URL="+w.URL, "DORMOUSE_API_KEY="+w.Key())
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 200)
	n, err := out.Read(line)
	at := forwardedAt.FindStringSubmatch(string(line[:n]))
	if at == nil {
		t.Fatalf("%q, %v: %s", line[:n], err, errOut.String())
	}
	const many = 16
	got := make(chan error, many)
	for range many {
		go func() {
			client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			resp, err := client.Get("http://" + at[1] + "/bytes/1000000")
			if err == nil {
				var n int64
				if n, err = io.Copy(io.Discard, resp.Body); n != 1_000_000 {
					err = fmt.Errorf("%d bytes, %w", n, err)
				}
				_ = resp.Body.Close()
			}
			got <- err
		}()
	}
	for range many {
		if err := <-got; err != nil {
			t.Error(err)
		}
	}
	w.destroy(id)
	_ = cmd.Wait() // its status is looked at
	if code := cmd.ProcessState.ExitCode(); code != 5 || !strings.Contains(errOut.String(), "has ended: user") {
		t.Errorf("after the end of the sandbox: exit status %d, %s", code, errOut.String())
	}
}
