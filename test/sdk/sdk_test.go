package sdk_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// The SDKs that are tried: an older one, and whatever is the newest.
var (
	javaScript = []string{"2.45.0", "latest"}
	python     = []string{"==2.45.1", ""}
)

const (
	installLimit = 5 * time.Minute
	runLimit     = 5 * time.Minute
)

// peer is an agent that the SDKs are tried against.
type peer struct {
	url    *url.URL
	header http.Header // of every request to it: what the SDKs do not send
	dir    string      // where the SDKs may write; they make it
	// patience is by how much longer its checks may take.
	patience int
}

// agent is the one that DORMOUSE_SDK_AGENT (host:port) and DORMOUSE_SDK_TOKEN name,
// or a plain process of its own.
func agent(t *testing.T) peer {
	t.Helper()
	if address := os.Getenv("DORMOUSE_SDK_AGENT"); address != "" {
		return peer{
			url: &url.URL{Scheme: "http", Host: address}, header: http.Header{guestapi.HeaderToken: {os.Getenv("DORMOUSE_SDK_TOKEN")}},
			dir: fmt.Sprintf("/tmp/dormouse-sdk-%d", time.Now().UnixNano()), patience: 1,
		}
	}
	return startAgent(t)
}

// startAgent runs the agent as a plain process, with a token.
func startAgent(t *testing.T) peer {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "dormouse-guest")
	if err := testkit.Program("../../cmd/dormouse-guest", bin); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "-listen", "127.0.0.1:0")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // a test that is killed leaves none behind
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(cmd.Process.Signal(syscall.SIGTERM), cmd.Wait()); err != nil {
			t.Error("the agent:", err)
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	address := strings.TrimSpace(strings.TrimPrefix(line, "listening on "))
	const token = "the-token-of-this-test"
	// The SDKs run login shells: not with the profile of whoever runs the test.
	body, err := json.Marshal(guestapi.Init{AccessToken: token, EnvVars: map[string]string{"HOME": t.TempDir()}})
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.Post("http://"+address+"/init", "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if err := res.Body.Close(); err != nil || res.StatusCode != http.StatusNoContent {
		t.Fatal("init:", res.Status, err)
	}
	return peer{url: &url.URL{Scheme: "http", Host: address}, header: http.Header{guestapi.HeaderToken: {token}}, dir: t.TempDir(), patience: 1}
}

// forward listens where the SDKs' debug mode looks for an agent, and adds the token
// to what goes on to ours: in that mode they send none.
func forward(t *testing.T, to peer) {
	t.Helper()
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 16}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to.url)
			maps.Copy(r.Out.Header, to.header)
		},
		Transport: transport, FlushInterval: -1,
	}
	server := &http.Server{Protocols: protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A stream's answer may begin before its request has been passed on to the
		// end. Without this, the server would then take the rest of the request away
		// from the proxy, whose connection to the agent would break.
		_ = http.NewResponseController(w).EnableFullDuplex() // HTTP/2 always is
		proxy.ServeHTTP(w, r)
	})}
	served := make(chan error, 2)
	listening := 0
	for _, host := range []string{"127.0.0.1", "::1"} { // what "localhost" may mean
		listener, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(guestapi.Port)))
		if err != nil {
			testkit.Require(t, "port-"+strconv.Itoa(guestapi.Port), host != "127.0.0.1", err.Error())
			continue
		}
		listening++
		go func() { served <- server.Serve(listener) }()
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		for range listening {
			if err := <-served; !errors.Is(err, http.ErrServerClosed) {
				t.Error(err)
			}
		}
		transport.CloseIdleConnections()
	})
}

// install runs a package manager. What it says is the reason for a skip: a registry
// that cannot be reached is not our failure.
func install(t *testing.T, dir string, argv ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), installLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	testkit.Require(t, "sdk", err == nil, fmt.Sprintf("%s: %v\n%s", strings.Join(argv, " "), err, out))
}

// run runs a script with an SDK, and makes a test of each of its checks.
func (to peer) run(t *testing.T, dir string, argv ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(to.patience)*runLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.WaitDelay = time.Second
	cmd.Env = append(os.Environ(), "E2B_DEBUG=true", "PATIENCE="+strconv.Itoa(to.patience), "NO_PROXY=localhost,127.0.0.1", "no_proxy=localhost,127.0.0.1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	checks := 0
	for line := range strings.Lines(string(out)) {
		var check struct {
			Name, Error string
			MS          int
		}
		if json.Unmarshal([]byte(line), &check) != nil || check.Name == "" {
			continue
		}
		checks++
		t.Run(check.Name, func(t *testing.T) {
			t.Logf("%d ms", check.MS)
			if check.Error != "" {
				t.Error(check.Error)
			}
		})
	}
	if err != nil || checks < 15 {
		t.Errorf("%d checks, %v\n%s", checks, err, stderr.String())
	}
}

func absolute(t *testing.T, path string) string {
	t.Helper()
	abs, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return abs
}

func TestJavaScript(t *testing.T) {
	needNode(t)
	runJavaScript(t, agent(t))
}

func needNode(t *testing.T) {
	t.Helper()
	testkit.Tool(t, "node")
	testkit.Tool(t, "npm")
}

func runJavaScript(t *testing.T, to peer) {
	t.Helper()
	forward(t, to)
	for _, version := range javaScript {
		t.Run(version, func(t *testing.T) {
			dir := t.TempDir()
			install(t, dir, "npm", "install", "--no-audit", "--no-fund", "--prefix", dir, "e2b@"+version)
			t.Logf("version %s", installed(t, filepath.Join(dir, "node_modules", "e2b", "package.json")))
			to.run(t, dir, "node", absolute(t, "testdata/peer.mjs"), filepath.Join(to.dir, "js-"+version))
		})
	}
}

func installed(t *testing.T, path string) string {
	t.Helper()
	var meta struct{ Version string }
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, &meta)
	}
	if err != nil {
		t.Fatal(err)
	}
	return meta.Version
}

func TestPython(t *testing.T) {
	needPython(t)
	runPython(t, agent(t))
}

func needPython(t *testing.T) {
	t.Helper()
	testkit.Tool(t, "python3")
	err := exec.Command("python3", "-c", "import venv, ensurepip").Run()
	testkit.Require(t, "python3-venv", err == nil, "apt-get install python3-venv")
}

func runPython(t *testing.T, to peer) {
	t.Helper()
	forward(t, to)
	for _, version := range python {
		t.Run("e2b"+version, func(t *testing.T) {
			dir := t.TempDir()
			install(t, dir, "python3", "-m", "venv", dir)
			bin := filepath.Join(dir, "bin", "python")
			install(t, dir, bin, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "e2b"+version)
			out, err := exec.Command(bin, "-c", "from importlib.metadata import version; print(version('e2b'))").Output()
			t.Logf("version %s, %v", bytes.TrimSpace(out), err)
			to.run(t, dir, bin, absolute(t, "testdata/peer.py"), filepath.Join(to.dir, "py"+version))
		})
	}
}
