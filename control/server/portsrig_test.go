package server_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	"github.com/dormouse-sandbox/dormouse/control/server"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// ports is a rig whose sandboxes have servers in them.
type ports struct {
	*rig
	web *http.Client

	mu sync.Mutex
	at map[int]string
}

const testDomain = "boxes.example"

func newPorts(t *testing.T, change ...func(*server.Config)) *ports {
	t.Helper()
	change = append([]func(*server.Config){func(c *server.Config) { c.Domain = testDomain }}, change...)
	p := &ports{rig: newRig(t, change...), at: map[int]string{}}
	p.host.SetDial(func(ctx context.Context, id string, port int) (net.Conn, error) {
		p.mu.Lock()
		at := p.at[port]
		p.mu.Unlock()
		if at == "" {
			return nil, sandbox.Errorf(sandbox.KindUnanswered, "nothing listens on port %d of sandbox %s", port, id)
		}
		var d net.Dialer
		return d.DialContext(ctx, "tcp", at)
	})
	return p
}

func (p *ports) put(port int, at string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at[port] = at
}

// serve puts a handler behind a port of every sandbox.
func (p *ports) serve(port int, h http.HandlerFunc) {
	p.t.Helper()
	srv := httptest.NewServer(h)
	p.t.Cleanup(srv.Close)
	p.put(port, srv.Listener.Addr().String())
}

// raw puts bytes behind one: talk is called for each connection.
func (p *ports) raw(port int, talk func(net.Conn)) {
	p.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		p.t.Fatal(err)
	}
	var wg sync.WaitGroup
	p.t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	p.put(port, l.Addr().String())
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				talk(c)
			})
		}
	})
}

// path is the address of a port in the path form.
func (p *ports) path(id string, port int, rest string) string {
	return fmt.Sprintf("%s/v1/sandboxes/%s/ports/%d%s", p.http.URL, id, port, rest)
}

// request is one with our key; by name it is sent where the server is, too.
func (p *ports) request(method, to string, body io.Reader) *http.Request {
	p.t.Helper()
	req, err := http.NewRequestWithContext(p.ctx(), method, to, body)
	if err != nil {
		p.t.Fatal(err)
	}
	req.Header.Set("X-API-Key", p.key)
	return req
}

// browser follows no redirects and finds every host name at our server.
func (p *ports) browser() *http.Client {
	if p.web == nil {
		p.web = p.newBrowser()
	}
	return p.web
}

func (p *ports) newBrowser() *http.Client {
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", p.http.Listener.Addr().String())
		},
		DisableCompression: true, ExpectContinueTimeout: limit,
	}
	p.t.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// answer is what came of a request.
type answer struct {
	*http.Response
	text string
}

func (p *ports) ask(req *http.Request) answer {
	p.t.Helper()
	resp, err := p.browser().Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return answer{resp, string(text)}
}

func (p *ports) get(id string, port int, rest string) answer {
	p.t.Helper()
	return p.ask(p.request("GET", p.path(id, port, rest), nil))
}

// named is the same port by its host name.
func named(id string, port int, rest string) string {
	return fmt.Sprintf("http://%d-%s.%s%s", port, id, testDomain, rest)
}
