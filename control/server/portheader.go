package server

import (
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/auth"
)

// portContinue is how long a client that asks before it sends its body waits for
// a guest that does not answer such questions.
const portContinue = 2 * time.Second

// rewrite makes a client's request the guest's. Hop-by-hop headers have been taken
// out already.
func (p portRef) rewrite(req *httputil.ProxyRequest) {
	in, out := req.In, req.Out
	at, err := url.PathUnescape(p.rest)
	if err != nil {
		at = p.rest // the server has parsed it before
	}
	out.URL = &url.URL{
		Scheme: "http", Host: net.JoinHostPort(string(p.id), strconv.Itoa(p.port)),
		Path: at, RawPath: p.rest, RawQuery: in.URL.RawQuery, ForceQuery: in.URL.ForceQuery,
	}
	out.Host = in.Host
	if fromHere(in) { // a TLS proxy in front of us knows more
		out.Header["X-Forwarded-For"] = in.Header["X-Forwarded-For"]
	}
	req.SetXForwarded()
	out.Header.Set("X-Forwarded-Proto", schemeOf(in))
	if !p.byName() {
		out.Header.Set("X-Forwarded-Prefix", p.prefix)
	} else {
		out.Header.Del("X-Forwarded-Prefix")
	}
	stripSecrets(out.Header)
	if out.Body != nil && in.Trailer != nil {
		out.Trailer = http.Header{}
		for name := range in.Trailer {
			out.Trailer[name] = nil
		}
		out.Body = &trailed{out.Body, in, out.Trailer}
	}
}

// trailed hands on the trailers of a request, which are known at its end.
type trailed struct {
	io.ReadCloser
	in *http.Request
	to http.Header
}

func (t *trailed) Read(p []byte) (int, error) {
	n, err := t.ReadCloser.Read(p)
	if err == io.EOF {
		for name, values := range t.in.Trailer {
			t.to[name] = values
		}
	}
	return n, err
}

// fromHere says whether a request came from this machine.
func fromHere(r *http.Request) bool {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	return err == nil && from.Addr().Unmap().IsLoopback()
}

// schemeOf is how the client came. What it says itself matters only to itself.
func schemeOf(r *http.Request) string {
	if r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https" {
		return "https"
	}
	return "http"
}

// ownSecret says whether a value is an API key or a token of ours.
func ownSecret(value string) bool {
	return strings.HasPrefix(value, api.KeyPrefix) || strings.HasPrefix(value, api.TokenPrefix)
}

// ownBearer is the secret in an Authorization header, if it is ours: a guest's
// application has its own use for that header.
func ownBearer(h http.Header) string {
	scheme, value, _ := strings.Cut(h.Get("Authorization"), " ")
	if value = strings.TrimSpace(value); strings.EqualFold(scheme, "Bearer") && ownSecret(value) {
		return value
	}
	return ""
}

// stripSecrets takes out of a request what is for us alone.
func stripSecrets(h http.Header) {
	if ownBearer(h) != "" {
		h.Del("Authorization")
	}
	if ownSecret(h.Get(auth.HeaderKey)) {
		h.Del(auth.HeaderKey)
	}
	for name := range h {
		if strings.HasPrefix(name, "X-Dormouse-") {
			delete(h, name)
		}
	}
	var lines []string
	for _, line := range h["Cookie"] {
		if line = withoutToken(line); line != "" {
			lines = append(lines, line)
		}
	}
	if delete(h, "Cookie"); lines != nil {
		h["Cookie"] = lines
	}
}

// withoutToken takes our cookie out of a Cookie header and leaves the rest of it
// as it is.
func withoutToken(line string) string {
	kept := slices.DeleteFunc(strings.Split(line, ";"), func(pair string) bool {
		name, _, _ := strings.Cut(pair, "=")
		return isTokenCookie(strings.TrimSpace(name))
	})
	return strings.TrimSpace(strings.Join(kept, ";"))
}

// Headers of an answer that a guest does not set: what they do reaches further
// than its own pages. Clear-Site-Data removes the cookies of everything under one
// registered domain.
var (
	neverFromGuests  = []string{"Clear-Site-Data", "Alt-Svc"}
	neverOnOurOrigin = []string{
		"Strict-Transport-Security", "Service-Worker-Allowed", "Nel", "Report-To", "Reporting-Endpoints",
		"Accept-Ch", "Critical-Ch", "Origin-Trial", "Www-Authenticate", "Refresh",
	}
)

// confine takes out of a guest's answer what would reach beyond the guest. In the
// path form all sandboxes share the origin of the API: there a document gets an
// origin of its own, which no script leaves, and cookies stay under their path.
func (p portRef) confine(res *http.Response, host string) {
	h := res.Header
	for _, name := range neverFromGuests {
		h.Del(name)
	}
	cookies := h["Set-Cookie"]
	delete(h, "Set-Cookie")
	for _, line := range cookies {
		if line = p.confineCookie(line); line != "" {
			h.Add("Set-Cookie", line)
		}
	}
	if p.byName() {
		return
	}
	for _, name := range neverOnOurOrigin {
		h.Del(name)
	}
	h.Add("Content-Security-Policy", "sandbox")
	h.Set("X-Content-Type-Options", "nosniff")
	for _, name := range []string{"Location", "Content-Location"} {
		if at := h.Get(name); at != "" {
			h.Set(name, p.outside(at, host))
		}
	}
}

// outside is a guest's own address as it is seen from outside.
func (p portRef) outside(at, host string) string {
	u, err := url.Parse(at)
	if err != nil || (u.Host != "" && u.Host != host) || !strings.HasPrefix(u.Path, "/") {
		return at
	}
	u.Path, u.RawPath = p.prefix+u.Path, p.prefix+u.EscapedPath()
	return u.String()
}

// confineCookie keeps a cookie to the host name or path that it came from; empty
// is one that would take our own one's place.
func (p portRef) confineCookie(line string) string {
	parts := strings.Split(line, ";")
	name, _, _ := strings.Cut(parts[0], "=")
	if isTokenCookie(strings.TrimSpace(name)) {
		return ""
	}
	at := "/"
	parts = slices.DeleteFunc(parts, func(part string) bool {
		name, value, _ := strings.Cut(part, "=")
		switch name = strings.TrimSpace(name); {
		case strings.EqualFold(name, "Domain"):
			return true
		case strings.EqualFold(name, "Path") && !p.byName():
			if value = strings.TrimSpace(value); strings.HasPrefix(value, "/") {
				at = value
			}
			return true
		}
		return false
	})
	if !p.byName() {
		parts = append(parts, " Path="+p.prefix+at)
	}
	return strings.Join(parts, ";")
}
