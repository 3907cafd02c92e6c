package server_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/server"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestPortRequest: what the guest sees of a request, and what it does not.
func TestPortRequest(t *testing.T) {
	p := newPorts(t)
	id := p.create()
	type seen struct {
		method, uri, host string
		header            http.Header
		body              string
		trailer           http.Header
	}
	last := make(chan seen, 1)
	p.serve(8000, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		last <- seen{r.Method, r.RequestURI, r.Host, r.Header, string(body), r.Trailer}
		w.Header().Set("Trailer", "X-Sum")
		w.Header().Set("Cache-Control", "max-age=60")
		w.WriteHeader(http.StatusTeapot)
		_, _ = io.WriteString(w, "hello")
		w.Header().Set("X-Sum", "42")
		w.Header().Set(http.TrailerPrefix+"X-Late", "43")
	})
	token, err := p.c.OpenPort(p.ctx(), id, api.OpenPort{Port: 8000})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, base, prefix string }{
		{"by path", p.path(id, 8000, ""), fmt.Sprintf("/v1/sandboxes/%s/ports/8000", id)},
		{"by name", named(id, 8000, ""), ""},
	} {
		for _, rest := range []string{"/", "/a/b", "/a%2Fb//c/../d;x=1?q=1;2&%zz&x", "/v1/sandboxes", "/healthz", "/?"} {
			req := p.request("POST", tt.base+rest, io.MultiReader(strings.NewReader("some body")))
			req.Header.Set("Authorization", "Bearer the-guest's-own")
			req.Header.Set("X-Dormouse-Signature", "1.x")
			req.Header.Set(api.HeaderToken, token.Token)
			req.Header.Set("Cookie", "a=1; dormouse_token=secret; b=2;c=3; __Host-dormouse_token=secret")
			req.Header.Set("Connection", "close, X-Hop")
			req.Header.Set("X-Hop", "of this hop only")
			req.Header.Set("Proxy-Authorization", "Basic x")
			req.Header.Set("X-Forwarded-Prefix", "/forged")
			req.Header.Set("Te", "trailers")
			req.Trailer = http.Header{"X-Request-Sum": nil}
			req.Body = &atEnd{req.Body, func() { req.Trailer.Set("X-Request-Sum", "41") }}
			got := p.ask(req)
			s := <-last
			if s.method != "POST" || s.uri != rest || s.body != "some body" || s.host != req.URL.Host {
				t.Errorf("%s %s: the guest sees %s %s of %s with %q", tt.name, rest, s.method, s.uri, s.host, s.body)
			}
			for name, want := range map[string]string{
				"Authorization": "Bearer the-guest's-own", "Cookie": "a=1; b=2;c=3", "X-Forwarded-Host": req.URL.Host,
				"X-Forwarded-Proto": "http", "X-Forwarded-For": "127.0.0.1", "X-Forwarded-Prefix": tt.prefix, "Te": "trailers",
				"X-Dormouse-Signature": "", "X-Dormouse-Token": "", "X-Api-Key": "", "X-Hop": "", "Proxy-Authorization": "",
			} {
				if got := s.header.Get(name); got != want {
					t.Errorf("%s: the guest sees %s: %q, want %q", tt.name, name, got, want)
				}
			}
			if s.trailer.Get("X-Request-Sum") != "41" {
				t.Errorf("%s: the request's trailers: %v", tt.name, s.trailer)
			}
			if got.StatusCode != http.StatusTeapot || got.text != "hello" || got.Trailer.Get("X-Sum") != "42" || got.Trailer.Get("X-Late") != "43" {
				t.Errorf("%s: %s, %q, trailers %v", tt.name, got.Status, got.text, got.Trailer)
			}
			if cc := got.Header.Values("Cache-Control"); len(cc) != 1 || cc[0] != "max-age=60" {
				t.Errorf("%s: the guest's Cache-Control arrives as %q", tt.name, cc)
			}
		}
	}
}

// atEnd calls fn before it says that a body has ended.
type atEnd struct {
	io.ReadCloser
	fn func()
}

func (a *atEnd) Read(b []byte) (int, error) {
	n, err := a.ReadCloser.Read(b)
	if err == io.EOF {
		a.fn()
	}
	return n, err
}

// TestPortKeys: who gets in, by which way.
func TestPortKeys(t *testing.T) {
	p := newPorts(t)
	id, other := p.create(), p.create()
	p.serve(8000, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "in") })
	mine, err := p.c.OpenPort(p.ctx(), id, api.OpenPort{Port: 8000})
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := p.c.OpenPort(p.ctx(), other, api.OpenPort{Port: 8000})
	if err != nil {
		t.Fatal(err)
	}
	link := mine.Link[strings.Index(mine.Link, "=")+1:]
	bearer := func(s string) http.Header { return http.Header{"Authorization": {"Bearer " + s}} }
	cookie := func(s string) http.Header { return http.Header{"Cookie": {"dormouse_token=" + s}} }
	for _, tt := range []struct {
		name           string
		header         http.Header
		byPath, byName bool
	}{
		{"nothing", nil, false, false},
		{"the key", bearer(p.key), true, true},
		{"the key in its header", http.Header{"X-Api-Key": {p.key}}, true, true},
		{"a wrong key", bearer("dm_wrong"), false, false},
		{"somebody else's bearer", bearer("abc"), false, false},
		{"the token", http.Header{"X-Dormouse-Token": {mine.Token}}, true, true},
		{"the token as bearer", bearer(mine.Token), true, true},
		{"a token that was changed", bearer(mine.Token[:len(mine.Token)-1] + "!"), false, false},
		{"another sandbox's token", bearer(theirs.Token), false, false},
		{"another's that says it is this one's", bearer(strings.ReplaceAll(theirs.Token, other, id)), false, false},
		{"a link's token", bearer(link), false, false},
		{"the cookie", cookie(mine.Token), false, true}, // all sandboxes share the path form's origin
		{"another sandbox's cookie", cookie(theirs.Token), false, false},
		{"the cookie behind others of its name", cookie("x; dormouse_token=" + theirs.Token + "; dormouse_token=" + mine.Token), false, true},
		{"the API key as cookie", cookie(p.key), false, false},
		{"a wrong token and the cookie", http.Header{"X-Dormouse-Token": {"x"}, "Cookie": {"dormouse_token=" + mine.Token}}, false, false},
	} {
		for form, want := range map[string]bool{p.path(id, 8000, "/"): tt.byPath, named(id, 8000, "/"): tt.byName} {
			req := p.request("GET", form, nil)
			if req.Header = tt.header.Clone(); req.Header == nil {
				req.Header = http.Header{}
			}
			got := p.ask(req)
			if in := got.StatusCode == 200 && got.text == "in"; in != want || !in && got.StatusCode != 401 {
				t.Errorf("%s at %s: %s %s", tt.name, form, got.Status, got.text)
			}
		}
	}
	if strings.Contains(mine.URL, "dmt_") || mine.URL != "http://8000-"+id+"."+testDomain+":"+p.port()+"/" {
		t.Errorf("the URL is %s", mine.URL)
	}
}

func (r *rig) port() string {
	_, port, _ := net.SplitHostPort(r.http.Listener.Addr().String())
	return port
}

// TestPortTokensEnd: with their time, with the key that made them, and with their
// sandbox.
func TestPortTokensEnd(t *testing.T) {
	var ahead atomic.Int64
	p := newPorts(t, func(c *server.Config) {
		c.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	})
	id := p.create()
	p.serve(8000, func(http.ResponseWriter, *http.Request) {})
	hour := time.Hour.Seconds()
	second, err := p.c.CreateKey(p.ctx(), "second")
	if err != nil {
		t.Fatal(err)
	}
	c := p.client(second.Secret)
	defer c.CloseIdle()
	token, err := c.OpenPort(p.ctx(), id, api.OpenPort{Port: 8000, TimeoutSeconds: &hour})
	if err != nil {
		t.Fatal(err)
	}
	status := func() int {
		req := p.request("GET", p.path(id, 8000, "/"), nil)
		req.Header = http.Header{"X-Dormouse-Token": {token.Token}}
		return p.ask(req).StatusCode
	}
	if got := status(); got != 200 {
		t.Fatalf("before: %d", got)
	}
	ahead.Store(int64(2 * time.Hour))
	if got := status(); got != 401 {
		t.Errorf("after its time: %d", got)
	}
	ahead.Store(0)
	if err := p.c.DeleteKey(p.ctx(), second.ID); err != nil {
		t.Fatal(err)
	}
	if got := status(); got != 401 {
		t.Errorf("after its key was revoked: %d", got)
	}
	if token, err = p.c.OpenPort(p.ctx(), id, api.OpenPort{Port: 8000}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.c.Delete(p.ctx(), id); err != nil {
		t.Fatal(err)
	}
	if got := status(); got != 409 {
		t.Errorf("after the sandbox's end: %d", got)
	}
	for _, bad := range []api.OpenPort{{}, {Port: -1}, {Port: 65536}, {Port: 1, TimeoutSeconds: new(float64)}} {
		_, err := p.c.OpenPort(p.ctx(), id, bad)
		p.wantKind(err, sandbox.KindInvalid)
	}
	_, err = p.c.OpenPort(p.ctx(), id, api.OpenPort{Port: 1})
	p.wantKind(err, sandbox.KindConflict)
}

// TestPortLink: a browser gets its cookie once, and the token leaves the URL.
func TestPortLink(t *testing.T) {
	p := newPorts(t)
	id := p.create()
	p.serve(8000, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.RequestURI+" "+r.Header.Get("Cookie"))
	})
	at, err := p.c.OpenPort(p.ctx(), id, api.OpenPort{Port: 8000})
	if err != nil {
		t.Fatal(err)
	}
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	browser := p.newBrowser()
	browser.Jar = jar
	browser.CheckRedirect = func(req *http.Request, _ []*http.Request) error {
		if strings.Contains(req.URL.String(), "dmt_") {
			t.Errorf("sent on to %s", req.URL)
		}
		return nil
	}
	for _, rest := range []string{"", "&a=b", "&a=b;c&%zz"} {
		resp, err := browser.Get(at.Link + rest)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		want := "/"
		if rest != "" {
			want += "?" + rest[1:]
		}
		if resp.StatusCode != 200 || string(text) != want+" " {
			t.Errorf("%s: %s %q", rest, resp.Status, text)
		}
	}
	first := p.ask(p.request("GET", at.Link, nil))
	c := first.Cookies()[0]
	if !c.HttpOnly || c.SameSite != http.SameSiteLaxMode || c.Domain != "" || c.Path != "/" || c.Secure || c.Name != "dormouse_token" ||
		first.StatusCode != 303 || first.Header.Get("Referrer-Policy") != "no-referrer" || first.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("the exchange: %s %+v %v", first.Status, c, first.Header)
	}
	req := p.request("GET", at.Link, nil)
	req.Header.Set("X-Forwarded-Proto", "https")
	if first = p.ask(req); !first.Cookies()[0].Secure || first.Cookies()[0].Name != "__Host-dormouse_token" || !strings.HasPrefix(first.Header.Get("Location"), "https://8000-") {
		t.Errorf("behind TLS: %v", first.Header)
	}
	evil := strings.Replace(at.Link, "/?", "//evil.example/?", 1) // a path that some would take for a host
	if to := p.ask(p.request("GET", evil, nil)).Header.Get("Location"); !strings.HasPrefix(to, "http://8000-"+id) {
		t.Errorf("sent on to %s", to)
	}
	for name, url := range map[string]string{
		"the wrong kind":   at.URL + "?dormouse_link=" + at.Token,
		"another sandbox":  strings.Replace(at.Link, "8000-"+id, "8000-"+p.create(), 1),
		"no link":          at.URL + "?dormouse_link=",
		"another's change": at.Link + "x",
	} {
		if got := p.ask(p.request("GET", url, nil)); got.StatusCode != 401 || len(got.Cookies()) > 0 {
			t.Errorf("%s: %s", name, got.Status)
		}
	}
	if got := p.ask(p.request("POST", at.Link, nil)); got.StatusCode != 400 || len(got.Cookies()) > 0 {
		t.Errorf("with POST: %s", got.Status)
	}
}

// TestPortCookieIsOfItsPageOnly: to a browser all sandboxes under one domain are one
// site. What a page of another does with the cookie is refused.
func TestPortCookieIsOfItsPageOnly(t *testing.T) {
	p := newPorts(t)
	id := p.create()
	p.serve(8000, func(http.ResponseWriter, *http.Request) {})
	at, err := p.c.OpenPort(p.ctx(), id, api.OpenPort{Port: 8000})
	if err != nil {
		t.Fatal(err)
	}
	own, other := "http://8000-"+id+"."+testDomain, "http://8000-"+p.create()+"."+testDomain
	for _, tt := range []struct {
		what, method string
		header       http.Header
		want         int
	}{
		{"a page of its own", "POST", http.Header{"Sec-Fetch-Site": {"same-origin"}, "Origin": {own}}, 200},
		{"typed in", "GET", http.Header{"Sec-Fetch-Site": {"none"}, "Sec-Fetch-Mode": {"navigate"}, "Sec-Fetch-Dest": {"document"}}, 200},
		{"a link of another's", "GET", http.Header{"Sec-Fetch-Site": {"same-site"}, "Sec-Fetch-Mode": {"navigate"}, "Sec-Fetch-Dest": {"document"}}, 200},
		{"a form of another's", "POST", http.Header{"Sec-Fetch-Site": {"same-site"}, "Sec-Fetch-Mode": {"navigate"}, "Sec-Fetch-Dest": {"document"}, "Origin": {other}}, 401},
		{"a frame of another's", "GET", http.Header{"Sec-Fetch-Site": {"same-site"}, "Sec-Fetch-Mode": {"navigate"}, "Sec-Fetch-Dest": {"iframe"}}, 401},
		{"a fetch of another's", "GET", http.Header{"Sec-Fetch-Site": {"same-site"}, "Sec-Fetch-Mode": {"no-cors"}, "Sec-Fetch-Dest": {"image"}}, 401},
		{"a WebSocket of another's", "GET", http.Header{"Sec-Fetch-Site": {"same-site"}, "Sec-Fetch-Mode": {"websocket"}, "Origin": {other}}, 401},
		{"an old browser's, of its own", "POST", http.Header{"Origin": {own}}, 200},
		{"an old browser's, of another", "POST", http.Header{"Origin": {other}}, 401},
		{"an old browser's, of a file", "POST", http.Header{"Origin": {"null"}}, 401},
	} {
		req := p.request(tt.method, own+"/", nil)
		tt.header.Set("Cookie", "dormouse_token="+at.Token)
		if req.Header = tt.header; p.ask(req).StatusCode != tt.want {
			t.Errorf("%s: not %d", tt.what, tt.want)
		}
	}
}

// TestPortAnswerIsConfined: in the path form no guest reaches the origin that it
// shares with the API and all others, and by name no other guest.
func TestPortAnswerIsConfined(t *testing.T) {
	p := newPorts(t)
	id, other := p.create(), p.create()
	p.serve(8000, func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		for name, value := range map[string]string{
			"Clear-Site-Data": `"*"`, "Alt-Svc": `h3="evil:443"`, "Strict-Transport-Security": "max-age=1", "Service-Worker-Allowed": "/",
			"NEL": "{}", "Report-To": "{}", "WWW-Authenticate": "Basic", "Content-Security-Policy": "default-src 'self'", "Accept-CH": "x",
		} {
			h.Set(name, value)
		}
		for _, c := range []string{
			"plain=1", "wide=1; Domain=" + testDomain + "; Path=/", "api=1; path=/v1; DOMAIN=127.0.0.1; HttpOnly", "odd=1; Path=x; Secure",
			"dormouse_token=mine", "__Host-dormouse_token=mine; Path=/", " dormouse_token =mine",
		} {
			h.Add("Set-Cookie", c)
		}
		h.Set("Location", "/login?x=1")
		w.WriteHeader(http.StatusFound)
	})
	prefix := "/v1/sandboxes/" + id + "/ports/8000"
	byPath := p.get(id, 8000, "/page")
	wantCookies := []string{
		"plain=1; Path=" + prefix + "/", "wide=1; Path=" + prefix + "/", "api=1; HttpOnly; Path=" + prefix + "/v1", "odd=1; Secure; Path=" + prefix + "/",
	}
	if got := byPath.Header.Values("Set-Cookie"); !slices.Equal(got, wantCookies) {
		t.Errorf("by path the cookies are %q", got)
	}
	if got := byPath.Header.Values("Content-Security-Policy"); !slices.Equal(got, []string{"default-src 'self'", "sandbox"}) {
		t.Errorf("by path the content security policies are %q", got)
	}
	if got := byPath.Header.Get("Location"); got != prefix+"/login?x=1" {
		t.Errorf("by path the guest's redirect leads to %s", got)
	}
	byName := p.ask(p.request("GET", named(id, 8000, "/page"), nil))
	wantCookies = []string{"plain=1", "wide=1; Path=/", "api=1; path=/v1; HttpOnly", "odd=1; Path=x; Secure"}
	if got := byName.Header.Values("Set-Cookie"); !slices.Equal(got, wantCookies) {
		t.Errorf("by name the cookies are %q", got)
	}
	if got := byName.Header.Get("Location"); got != "/login?x=1" {
		t.Errorf("by name the guest's redirect leads to %s", got)
	}
	for _, name := range []string{"Clear-Site-Data", "Alt-Svc"} {
		if byPath.Header.Get(name) != "" || byName.Header.Get(name) != "" {
			t.Errorf("%s arrives", name)
		}
	}
	for _, name := range []string{"Strict-Transport-Security", "Service-Worker-Allowed", "NEL", "Report-To", "WWW-Authenticate", "Accept-CH"} {
		if byPath.Header.Get(name) != "" || byName.Header.Get(name) == "" {
			t.Errorf("%s: by path %q, by name %q", name, byPath.Header.Get(name), byName.Header.Get(name))
		}
	}

	// A cookie jar, as browsers have one, keeps them apart.
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, got := range []answer{byPath, byName} {
		jar.SetCookies(got.Request.URL, got.Cookies())
	}
	for _, foreign := range []string{
		p.path(other, 8000, "/"), p.path(id, 80, "/"), p.http.URL + "/v1/sandboxes", p.http.URL + "/",
		named(other, 8000, "/"), named(id, 8001, "/"), "http://" + testDomain + "/",
	} {
		u, err := url.Parse(foreign)
		if err != nil {
			t.Fatal(err)
		}
		if got := jar.Cookies(u); len(got) > 0 {
			t.Errorf("%s gets the cookies %v of another", foreign, got)
		}
	}
	if got := jar.Cookies(byPath.Request.URL); len(got) < 2 { // one is for TLS, one for /v1 of the guest
		t.Errorf("the guest itself gets %v", got)
	}
}

// TestPortSaysWhatIsWrong: errors are the API's own, with the port in them.
func TestPortSaysWhatIsWrong(t *testing.T) {
	hasty := newPorts(t, func(c *server.Config) { c.PortAnswer = 300 * time.Millisecond })
	mute := hasty.create()
	hasty.serve(8001, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	p := newPorts(t) // with time for those that do answer
	id := p.create()
	p.raw(8002, func(c net.Conn) {
		_, _ = bufio.NewReader(c).ReadString('\n')
		_, _ = io.WriteString(c, "I speak no HTTP\r\n\r\n")
	})
	p.raw(8004, func(c net.Conn) { _, _ = io.WriteString(c, "I speak before I am asked\r\n\r\n") })
	p.raw(8003, func(c net.Conn) { _, _ = bufio.NewReader(c).ReadString('\n') })
	ended := p.create()
	if _, err := p.c.Delete(p.ctx(), ended); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		at     string
		status int
		says   string
	}{
		{hasty.path(mute, 8001, "/"), 504, "port 8001 of sandbox " + mute + " has not answered within 300ms"},
		{p.path(id, 8000, "/"), 502, "nothing listens on port 8000 of sandbox " + id},
		{named(id, 8000, "/"), 502, "nothing listens on port 8000 of sandbox " + id},
		{p.path(id, 8002, "/"), 502, "port 8002 of sandbox " + id + ": malformed HTTP"},
		{p.path(id, 8003, "/"), 502, "port 8003 of sandbox " + id},
		{p.path(id, 8004, "/"), 502, "port 8004 of sandbox " + id},
		{p.path(ended, 8000, "/"), 409, "it ended with cause user"},
		{p.path(string(sandbox.NewID()), 8000, "/"), 404, "there is no sandbox"},
		{p.path("nonsense", 8000, "/"), 400, "is not 24 characters"},
		{p.path(id, 0, "/"), 400, "from 1 to 65535"},
		{p.path(id, 65536, "/"), 400, "from 1 to 65535"},
		{named(id, 65536, "/"), 400, "from 1 to 65535"},
		{fmt.Sprintf("http://08000-%s.%s/", id, testDomain), 400, "from 1 to 65535"},
		{fmt.Sprintf("http://8000-abc.%s/", testDomain), 400, "is not 24 characters"},
		{p.path(id, 49983, "/init"), 404, "guest agent"},
		{p.path(id, 49983, "/x/..//%69nit/"), 404, "guest agent"},
		{p.path(id, 49983, "/INIT?x"), 404, "guest agent"},
		{p.path(id, 49983, "/freeze"), 404, "guest agent"},
		{p.path(id, 49983, "//thaw/."), 404, "guest agent"},
		{p.path(id, 49983, "/./poweroff"), 404, "guest agent"},
	} {
		from := p
		if strings.HasPrefix(tt.at, hasty.http.URL+"/") {
			from = hasty
		}
		got := from.ask(from.request("GET", tt.at, nil))
		if got.StatusCode != tt.status || !strings.Contains(got.text, `"error"`) || !strings.Contains(got.text, tt.says) ||
			got.Header.Get("Content-Type") != "application/json" || got.Header.Get("Cache-Control") != "no-store" || got.Header.Get("X-Request-Id") == "" {
			t.Errorf("%s: %s %s", tt.at, got.Status, got.text)
		}
	}
	if got := p.ask(p.request("TRACE", p.path(id, 8000, "/"), nil)); got.StatusCode != 405 || got.Header.Get("Allow") == "" {
		t.Errorf("TRACE: %s", got.Status)
	}
	if got := p.get(id, 8000, "?a=b"); got.StatusCode != 308 || got.Header.Get("Location") != "/v1/sandboxes/"+id+"/ports/8000/?a=b" {
		t.Errorf("without a slash: %s %s", got.Status, got.Header.Get("Location"))
	}
}

// TestPortRefusesTheAgentsUpgrade: what comes after one could not be looked at.
func TestPortRefusesTheAgentsUpgrade(t *testing.T) {
	p := newPorts(t)
	id := p.create()
	p.serve(49983, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) })
	if got := p.get(id, 49983, "/health"); got.StatusCode != 204 {
		t.Errorf("health: %s", got.Status)
	}
	req := p.request("GET", p.path(id, 49983, "/health"), nil)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "h2c")
	if got := p.ask(req); got.StatusCode != 501 {
		t.Errorf("upgrade: %s", got.Status)
	}
	_, err := p.c.DialPort(p.ctx(), id, 49983)
	p.wantKind(err, sandbox.KindInvalid)
}

// TestPortOfAFrozenSandbox: it answers no_space also where a connection is open.
func TestPortOfAFrozenSandbox(t *testing.T) {
	p := newPorts(t)
	id := p.create()
	p.serve(8000, func(http.ResponseWriter, *http.Request) {})
	if got := p.get(id, 8000, "/"); got.StatusCode != 200 {
		t.Fatal(got.Status)
	}
	p.host.Freeze(id, sandbox.FreezeNoSpace)
	testkit.Eventually(t, limit, "507", func() bool { return p.get(id, 8000, "/").StatusCode == 507 })
	p.host.Freeze(id, "")
	testkit.Eventually(t, limit, "200", func() bool { return p.get(id, 8000, "/").StatusCode == 200 })
}

// TestPortMethodsAndRanges: what HTTP has besides GET.
func TestPortMethodsAndRanges(t *testing.T) {
	p := newPorts(t)
	id := p.create()
	var took atomic.Bool
	p.serve(8000, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/file":
			http.ServeContent(w, r, "file", time.Unix(1e9, 0), strings.NewReader("0123456789"))
		case "/refuse":
			w.WriteHeader(http.StatusForbidden)
		case "/take":
			took.Store(true)
			_, _ = io.Copy(w, r.Body)
		case "/hints":
			w.Header().Set("Link", "</style.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
			w.WriteHeader(http.StatusNoContent)
		default:
			_, _ = io.WriteString(w, r.Method)
		}
	})
	for _, method := range []string{"GET", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"} {
		if got := p.ask(p.request(method, p.path(id, 8000, "/x"), nil)); got.text != method {
			t.Errorf("%s: %s %q", method, got.Status, got.text)
		}
	}
	head := p.ask(p.request("HEAD", p.path(id, 8000, "/file"), nil))
	if head.ContentLength != 10 || head.text != "" {
		t.Errorf("HEAD: %s, %d bytes announced, %q", head.Status, head.ContentLength, head.text)
	}
	req := p.request("GET", p.path(id, 8000, "/file"), nil)
	req.Header.Set("Range", "bytes=3-5")
	if got := p.ask(req); got.StatusCode != 206 || got.text != "345" || got.Header.Get("Content-Range") != "bytes 3-5/10" {
		t.Errorf("range: %s %q", got.Status, got.text)
	}
	for path, want := range map[string]struct {
		status, continues int
		text              string
	}{"/refuse": {403, 0, ""}, "/take": {200, 1, "body"}} {
		continues := 0
		req := p.request("POST", p.path(id, 8000, path), strings.NewReader("body"))
		req.Header.Set("Expect", "100-continue")
		req = req.WithContext(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{Got100Continue: func() { continues++ }}))
		if got := p.ask(req); got.StatusCode != want.status || got.text != want.text || continues != want.continues {
			t.Errorf("%s after asking: %s %q, told %d times to continue", path, got.Status, got.text, continues)
		}
	}
	var early []string
	req = p.request("GET", p.path(id, 8000, "/hints"), nil)
	req = req.WithContext(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
		Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			early = append(early, fmt.Sprint(code, " ", h.Get("Link")))
			return nil
		},
	}))
	if got := p.ask(req); got.StatusCode != 204 || !slices.Equal(early, []string{"103 </style.css>; rel=preload"}) {
		t.Errorf("early hints: %s %q", got.Status, early)
	}
}

// TestPortStreams: what a guest writes arrives at once, not when it is done.
func TestPortStreams(t *testing.T) {
	p := newPorts(t)
	id := p.create()
	words := make(chan string)
	p.serve(8000, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/known" {
			w.Header().Set("Content-Length", "11")
		}
		for w.(http.Flusher).Flush(); ; w.(http.Flusher).Flush() {
			select {
			case word := <-words:
				_, _ = io.WriteString(w, word)
			case <-r.Context().Done():
				return
			}
		}
	})
	for _, path := range []string{"/events", "/known"} {
		resp, err := p.browser().Do(p.request("GET", p.path(id, 8000, path), nil))
		if err != nil {
			t.Fatal(err)
		}
		for _, word := range []string{"one..", "two.."} {
			words <- word
			buf := make([]byte, 5)
			if _, err := io.ReadFull(resp.Body, buf); err != nil || string(buf) != word {
				t.Fatalf("%s: %q, %v", path, buf, err)
			}
		}
		_ = resp.Body.Close() // the guest learns of it
	}
}
