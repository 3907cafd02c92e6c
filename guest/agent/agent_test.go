package agent_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process/processconnect"
	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
)

func do(t *testing.T, method, url string, header http.Header, body []byte) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }() // read only
	var text bytes.Buffer
	if _, err := text.ReadFrom(res.Body); err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, text.String()
}

func body(t *testing.T, init guestapi.Init) []byte {
	t.Helper()
	data, err := json.Marshal(init)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func token(value string) http.Header { return http.Header{guestapi.HeaderToken: {value}} }

func TestTheTokenGuardsEverythingButHealth(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{Token: "secret"})
	json := http.Header{"Content-Type": {"application/json"}}
	for _, tt := range []struct {
		method, path string
		header       http.Header
		status       int
		text         string
	}{
		{"GET", "/health", nil, 204, ""},
		{"GET", "/metrics", nil, 401, `"code":401`},
		{"GET", "/metrics", token("wrong"), 401, `"code":401`},
		{"GET", "/metrics", token("secret"), 200, `"cpu_count"`},
		{"GET", "/envs", nil, 401, `"code":401`},
		{"GET", "/envs", token("secret"), 200, "{}"},
		{"GET", "/files?path=/etc/passwd", nil, 401, `"code":401`},
		{"POST", "/process.Process/List", json, 401, `"code":"unauthenticated"`},
		{"POST", "/filesystem.Filesystem/Stat", json, 401, `"code":"unauthenticated"`},
		{"GET", "/nothing", token("secret"), 404, ""},
	} {
		status, text := do(t, tt.method, g.URL+tt.path, tt.header, []byte("{}"))
		if status != tt.status || !strings.Contains(text, tt.text) {
			t.Errorf("%s %s %v: %d %s, want %d with %q", tt.method, tt.path, tt.header, status, text, tt.status, tt.text)
		}
	}
	if _, err := g.Run(t.Context(), guesttest.Shell("exit 0")); err != nil {
		t.Error("with the token:", err)
	}
}

func TestHTTP2WithoutTLS(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	protocols := &http.Protocols{}
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols}
	defer transport.CloseIdleConnections()
	client := processconnect.NewProcessClient(&http.Client{Transport: transport}, g.URL) // binary codec
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			stream, err := client.Start(t.Context(), connect.NewRequest(guesttest.Shell("echo over http2")))
			if err != nil {
				t.Error(err)
				return
			}
			var res guesttest.Result
			for stream.Receive() {
				res.Take(stream.Msg().GetEvent())
			}
			if stream.Err() != nil || res.Output() != "over http2" {
				t.Errorf("%q, %v", res.Output(), stream.Err())
			}
		})
	}
	wg.Wait()
}

func TestInitOfAPlainProcess(t *testing.T) {
	m := &machine{}
	g := guesttest.Start(t, guesttest.Options{Machine: m})
	first := guestapi.Init{AccessToken: "one", EnvVars: map[string]string{"A": "1"}, DefaultWorkdir: "/", Timestamp: time.Now().Format(time.RFC3339), SandboxID: "forged", Hostname: "forged"}
	if status, text := do(t, "POST", g.URL+"/init", nil, body(t, first)); status != 204 {
		t.Fatalf("%d %s", status, text)
	}
	if m.hostname != "" || !m.clock.IsZero() {
		t.Errorf("an unsigned /init changed the machine: %+v", m)
	}
	if status, text := do(t, "POST", g.URL+"/init", nil, body(t, guestapi.Init{AccessToken: "two"})); status != 401 {
		t.Errorf("another token: %d %s", status, text)
	}
	if status, text := do(t, "POST", g.URL+"/init", nil, body(t, guestapi.Init{AccessToken: "one", EnvVars: map[string]string{"B": "2"}})); status != 204 {
		t.Errorf("the same token: %d %s", status, text)
	}
	if _, text := do(t, "GET", g.URL+"/envs", token("one"), nil); strings.TrimSpace(text) != `{"B":"2"}` {
		t.Errorf("envs: %s", text)
	}
	req := connect.NewRequest(guesttest.Shell(`pwd; echo "$B$DORMOUSE_SANDBOX_ID"`))
	req.Header().Set(guestapi.HeaderToken, "one")
	stream, err := g.Process.Start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	var res guesttest.Result
	for stream.Receive() {
		res.Take(stream.Msg().GetEvent())
	}
	if res.Output() != "/\n2" {
		t.Errorf("a command sees %q, %v", res.Output(), stream.Err())
	}
}

func TestInitSignedByTheHost(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{}
	g := guesttest.Start(t, guesttest.Options{Verifier: guestapi.NewVerifier(public), Machine: m})
	if status, text := do(t, "GET", g.URL+"/envs", nil, nil); status != 401 || !strings.Contains(text, "no identity") {
		t.Errorf("before the first /init: %d %s", status, text)
	}
	if status, _ := do(t, "GET", g.URL+"/files?path=/etc/passwd", nil, nil); status != 401 {
		t.Errorf("files before the first /init: %d", status)
	}
	at := time.Now().UTC().Truncate(time.Second)
	init := body(t, guestapi.Init{AccessToken: "one", SandboxID: "abc", Hostname: "box", Timestamp: at.Format(time.RFC3339), Entropy: []byte("random")})
	me := "" // it was booted as nobody
	signed := func(data []byte) http.Header {
		return http.Header{guestapi.HeaderSignature: {guestapi.Sign(private, me, "POST", "/init", time.Now(), data)}}
	}
	if status, _ := do(t, "POST", g.URL+"/init", nil, init); status != 401 {
		t.Errorf("unsigned: %d", status)
	}
	header := signed(init)
	if status, text := do(t, "POST", g.URL+"/init", header, init); status != 204 {
		t.Fatalf("signed: %d %s", status, text)
	}
	if !m.clock.Equal(at) || m.hostname != "box" || string(m.entropy) != "random" {
		t.Errorf("the machine has %+v", m)
	}
	if status, _ := do(t, "POST", g.URL+"/init", header, init); status != 401 {
		t.Errorf("repeated: %d", status)
	}
	// A sibling of the same snapshot has become somebody else meanwhile: what the
	// host has signed for the one of the snapshot is no good any more.
	if status, _ := do(t, "POST", g.URL+"/init", signed(init), init); status != 401 {
		t.Errorf("for who it was before: %d", status)
	}
	me = "abc"
	next := body(t, guestapi.Init{AccessToken: "two"})
	if status, text := do(t, "POST", g.URL+"/init", token("one"), next); status != 401 {
		t.Errorf("with the token instead of a signature: %d %s", status, text)
	}
	if status, text := do(t, "POST", g.URL+"/init", signed(next), next); status != 204 {
		t.Errorf("the host gives a new token: %d %s", status, text)
	}
	if status, _ := do(t, "GET", g.URL+"/envs", token("one"), nil); status != 401 {
		t.Errorf("the old token: %d", status)
	}
	m.fail = map[string]error{"clock": errors.New("no clock")}
	if status, text := do(t, "POST", g.URL+"/init", signed(init), init); status != 500 || !strings.Contains(text, "set the clock: no clock") {
		t.Errorf("a machine that refuses: %d %s", status, text)
	}
}

func TestPowerOffSignedByTheHost(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	off := make(chan struct{}, 10)
	powerOff := func() { off <- struct{}{} }
	for _, tt := range []struct {
		name   string
		opts   guesttest.Options
		header http.Header
		status int
	}{
		{"without a signature", guesttest.Options{Verifier: guestapi.NewVerifier(public), PowerOff: powerOff}, nil, 401},
		{"with the token", guesttest.Options{Verifier: guestapi.NewVerifier(public), PowerOff: powerOff, Token: "x"}, token("x"), 401},
		{"with the signature of another call", guesttest.Options{Verifier: guestapi.NewVerifier(public), PowerOff: powerOff}, http.Header{
			guestapi.HeaderSignature: {guestapi.Sign(private, "", "POST", "/init", time.Now(), nil)},
		}, 401},
		{"a plain process", guesttest.Options{PowerOff: powerOff}, nil, 501},
		{"signed", guesttest.Options{Verifier: guestapi.NewVerifier(public), PowerOff: powerOff}, http.Header{
			guestapi.HeaderSignature: {guestapi.Sign(private, "", "POST", "/poweroff", time.Now(), nil)},
		}, 204},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := guesttest.Start(t, tt.opts)
			if status, text := do(t, "POST", g.URL+"/poweroff", tt.header, nil); status != tt.status {
				t.Errorf("%d %s", status, text)
			}
			if tt.status != 204 {
				if len(off) > 0 {
					t.Error("the machine was switched off")
				}
				return
			}
			select {
			case <-off:
			case <-time.After(30 * time.Second):
				t.Error("the machine was not switched off")
			}
		})
	}
}

func TestInitThatIsWrong(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	for text, want := range map[string]string{
		"{":                        "body",
		`{"timestamp":"soon"}`:     "soon",
		`{"envVars":{"a":1}}`:      "envVars",
		strings.Repeat(" ", 2<<20): "too large",
	} {
		if status, answer := do(t, "POST", g.URL+"/init", nil, []byte(text)); status != 400 || !strings.Contains(answer, want) {
			t.Errorf("%.30q: %d %s", text, status, answer)
		}
	}
}

func TestMetrics(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	status, text := do(t, "GET", g.URL+"/metrics", nil, nil)
	var m guestapi.Metrics
	if err := json.Unmarshal([]byte(text), &m); err != nil || status != 200 {
		t.Fatal(status, text, err)
	}
	if m.CPUCount < 1 || m.CPUUsedPct < 0 || m.CPUUsedPct > 100 || m.MemUsed == 0 || m.MemUsed > m.MemTotal || m.DiskUsed > m.DiskTotal || m.DiskTotal == 0 || m.Timestamp < 1700000000 {
		t.Errorf("%+v", m)
	}
}

func TestAMessageOverTheBoundIsRefused(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	input := &processv1.ProcessInput{Input: &processv1.ProcessInput_Stdin{Stdin: make([]byte, 17<<20)}}
	_, err := g.Process.SendInput(context.Background(), connect.NewRequest(&processv1.SendInputRequest{Input: input}))
	if connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("got %v", err)
	}
}

// FuzzInit: any body of an unsigned /init is taken or refused, and changes
// nothing of the machine.
func FuzzInit(f *testing.F) {
	f.Add([]byte(`{"envVars":{"A":"b"},"timestamp":"2026-01-02T03:04:05Z","hostname":"x","entropy":"AAAA"}`))
	f.Add([]byte(`{"timestamp":"yesterday"}`))
	f.Add([]byte(`{"envVars":null,"sandboxID":7}`))
	m := &machine{}
	g := guesttest.Start(f, guesttest.Options{Machine: m})
	f.Fuzz(func(t *testing.T, data []byte) {
		res, err := http.Post(g.URL+"/init", "application/json", bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }() // not read
		switch res.StatusCode {
		case http.StatusNoContent, http.StatusBadRequest, http.StatusUnauthorized:
		default:
			t.Errorf("status %d", res.StatusCode)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if !m.clock.IsZero() || m.hostname != "" || m.entropy != nil {
			t.Error("the machine was changed without a signature")
		}
	})
}
