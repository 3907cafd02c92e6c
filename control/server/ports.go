package server

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// The two ways to a port, as they stand in the log and the metrics. Neither is the
// mux's: it would redirect paths that it finds unclean, and a guest's paths are
// the guest's affair.
const (
	portByPath = "/v1/sandboxes/{id}/ports/{port}/{path}"
	portByName = "{port}-{id}.domain"
)

// portRef is where a request to a port of a sandbox goes.
type portRef struct {
	id     sandbox.ID
	port   int
	prefix string // of our own path in front of the guest's; empty: it came by name
	rest   string // the guest's path, escaped as it came
}

func (p portRef) byName() bool { return p.prefix == "" }

func (p portRef) pattern() string {
	if p.byName() {
		return portByName
	}
	return portByPath
}

var portLabel = regexp.MustCompile(`^([0-9]+)-([a-z0-9]+)$`)

// portOf says whether a request is for a port of a sandbox, and of which.
func (s *Server) portOf(r *http.Request) (to portRef, given bool, err error) {
	if label, ok := s.portName(r.Host); ok {
		if to.rest = r.URL.EscapedPath(); to.rest == "" {
			to.rest = "/"
		}
		err = to.set(label[2], label[1])
		return to, true, err
	}
	under, ok := strings.CutPrefix(r.URL.EscapedPath(), "/v1/sandboxes/")
	if !ok {
		return to, false, nil
	}
	id, under, _ := strings.Cut(under, "/")
	under, ok = strings.CutPrefix(under, "ports/")
	if !ok {
		return to, false, nil
	}
	port, rest, slash := strings.Cut(under, "/")
	to.prefix = "/v1/sandboxes/" + id + "/ports/" + port
	if slash {
		to.rest = "/" + rest
	}
	err = to.set(id, port)
	return to, true, err
}

// portName takes a host name apart that stands for a port.
func (s *Server) portName(host string) (label []string, ok bool) {
	if s.cfg.Domain == "" {
		return nil, false
	}
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	name, ok := strings.CutSuffix(strings.TrimSuffix(strings.ToLower(host), "."), "."+s.cfg.Domain)
	label = portLabel.FindStringSubmatch(name)
	return label, ok && label != nil
}

func (p *portRef) set(id, port string) (err error) {
	if p.id, err = sandbox.ParseID(id); err != nil {
		return err
	}
	p.port, err = parsePort(port)
	return err
}

func parsePort(text string) (int, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 || text[0] == '0' { // one port has one name
		return 0, sandbox.Errorf(sandbox.KindInvalid, "port is %q, must be a number from 1 to 65535", cut(text, 40))
	}
	return int(n), nil
}

// servePort passes a request on to a server in a sandbox, once it is known who
// asks.
func (s *Server) servePort(w http.ResponseWriter, r *http.Request, to portRef) error {
	if r.Method == http.MethodConnect || r.Method == http.MethodTrace { // a trace would show a page its own cookies
		notAllowed(w, r, "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
		return nil
	}
	if to.rest == "" { // a page's own links need the slash
		at := url.URL{Path: to.prefix + "/", RawQuery: r.URL.RawQuery}
		http.Redirect(w, r, at.String(), http.StatusPermanentRedirect)
		return nil
	}
	if to.byName() && hasLink(r) {
		return s.exchangeLink(w, r, to)
	}
	key, err := s.visitor(r, to)
	if err != nil {
		return err
	}
	setKnown(w)
	if err := to.guardAgent(r); err != nil {
		return err
	}
	ctx, done, row, err := s.enterRow(withKey(r.Context(), key), to.id)
	if err != nil {
		return err
	}
	defer done()
	if row.Frozen != "" { // a connection that is open already would wait
		return sandbox.Errorf(sandbox.KindNoSpace, "sandbox %s is frozen: the disk of its host is nearly full", to.id)
	}
	return s.proxy(ctx, w, r, to)
}

// guardAgent keeps from the agent what only the host may ask of it. Its signature
// does so too; this is the second lock.
func (p portRef) guardAgent(r *http.Request) error {
	if p.port != hostapi.AgentPort {
		return nil
	}
	at, err := url.PathUnescape(p.rest)
	isControl := func(p string) bool { return strings.EqualFold(path.Clean(at), p) }
	if err != nil || slices.ContainsFunc(hostapi.AgentControl, isControl) {
		return sandbox.Errorf(sandbox.KindNotFound, "there is nothing at %s of the guest agent", cut(p.rest, 100))
	}
	if r.Header.Get("Upgrade") != "" { // what comes after it could not be looked at
		return sandbox.Errorf(sandbox.KindUnsupported, "the guest agent does not change its protocol")
	}
	return nil
}

// maxPortHeader bounds the head of an answer, and what may come before it.
const maxPortHeader = 64 << 10

// portTransport speaks HTTP/1.1 to the servers in sandboxes. Idle connections are
// few and short-lived: each is one that the sandbox is not idle.
func (s *Server) portTransport() *http.Transport {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	return &http.Transport{
		DialContext: s.dialPort, Protocols: &protocols, DisableCompression: true,
		MaxIdleConnsPerHost: 8, MaxIdleConns: 512, IdleConnTimeout: s.cfg.PortIdle,
		ResponseHeaderTimeout: s.cfg.PortAnswer, ExpectContinueTimeout: portContinue,
		MaxResponseHeaderBytes: maxPortHeader, WriteBufferSize: 32 << 10, ReadBufferSize: 32 << 10,
	}
}

// dialPort opens a connection that requests share. It ends with its sandbox and
// with the server.
func (s *Server) dialPort(ctx context.Context, _, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	to := portRef{}
	if err := to.set(host, port); err != nil {
		return nil, err
	}
	life, done, err := s.calls.begin(s.ctx, "", to.id)
	if err != nil {
		return nil, err
	}
	conn, err := hostapi.OpenPort(ctx, s.cfg.Host, string(to.id), to.port)
	if err != nil {
		done()
		return nil, err
	}
	c := &sharedConn{PortConn: conn, done: done}
	context.AfterFunc(life, c.end)
	return c, nil
}

// sharedConn is on the list of calls until it is closed.
type sharedConn struct {
	*hostapi.PortConn
	once sync.Once
	done func()
}

func (c *sharedConn) end() {
	c.once.Do(func() {
		_ = c.PortConn.Close() // it never fails
		c.done()
	})
}

// Close ends the connection. It never fails.
func (c *sharedConn) Close() error {
	c.end()
	return nil
}

// buffers are what bodies are copied with.
var buffers = &bufferPool{sync.Pool{New: func() any { return new([64 << 10]byte) }}}

type bufferPool struct{ pool sync.Pool }

func (b *bufferPool) Get() []byte {
	buf, ok := b.pool.Get().(*[64 << 10]byte)
	if !ok {
		panic("a buffer of another type")
	}
	return buf[:]
}

func (b *bufferPool) Put(buf []byte) { b.pool.Put((*[64 << 10]byte)(buf)) }

// proxy passes one request on. What is wrong before an answer has begun comes back
// as an error.
func (s *Server) proxy(ctx context.Context, w http.ResponseWriter, r *http.Request, to portRef) error {
	ours := w.Header().Clone()
	clear(w.Header()) // the answer is the guest's
	var failed error
	ctx, watch := s.watchStall(ctx, to)
	defer watch.answered()
	proxy := httputil.ReverseProxy{
		Transport: s.ports, FlushInterval: -1, BufferPool: buffers, ErrorLog: s.debugLog,
		Rewrite: func(p *httputil.ProxyRequest) {
			to.rewrite(p)
			watch.request(p.Out)
		},
		ModifyResponse: func(res *http.Response) error {
			watch.answered()
			to.confine(res, r.Host)
			return nil
		},
		ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, err error) { failed = err },
	}
	proxy.ServeHTTP(w, r.WithContext(ctx))
	switch {
	case failed == nil:
		return nil
	case hijacked(w):
		return nil // whoever had the connection sees its end
	case r.Context().Err() != nil && s.ctx.Err() == nil:
		return errAborted // the client is gone
	}
	clear(w.Header())
	for name, values := range ours {
		w.Header()[name] = values
	}
	return s.portError(ctx, to, failed)
}

// hijacked says whether a connection is no longer the server's.
func hijacked(w http.ResponseWriter) bool {
	rec, ok := w.(*recorder)
	return ok && rec.status == http.StatusSwitchingProtocols
}

// portError is what a client is told that got no answer from a port.
func (s *Server) portError(ctx context.Context, to portRef, err error) error {
	var slow net.Error
	var kind *sandbox.Error
	switch cause := context.Cause(ctx); {
	case sandbox.Is(cause, sandbox.KindTimeout):
		return cause
	case errors.As(err, &kind), cause != nil:
		return s.hostError(ctx, to.id, err)
	case errors.As(err, &slow) && slow.Timeout():
		return sandbox.Errorf(sandbox.KindTimeout, "port %d of sandbox %s has not answered within %v", to.port, to.id, s.cfg.PortAnswer)
	}
	// Whether net/http says so depends on which of its goroutines was first.
	text := strings.TrimPrefix(err.Error(), "net/http: HTTP/1.x transport connection broken: ")
	if strings.HasPrefix(text, "readLoopPeekFailLocked") { // its name for that
		text = "it spoke before it was asked"
	}
	return sandbox.Errorf(sandbox.KindUnanswered, "port %d of sandbox %s: %s", to.port, to.id, cut(text, 300))
}
