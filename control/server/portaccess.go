package server

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/auth"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const (
	linkLife     = 5 * time.Minute // of a token that stands in a URL
	defaultToken = 24 * time.Hour
)

// openPort says how to reach a port, and makes the token for it.
func (s *Server) openPort(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	var req api.OpenPort
	if err := readBody(w, r, &req); err != nil {
		return err
	}
	if req.Port < 1 || req.Port > api.MaxPort {
		return sandbox.Errorf(sandbox.KindInvalid, "port is %d, must be from 1 to %d", req.Port, api.MaxPort)
	}
	life := defaultToken
	if req.TimeoutSeconds != nil {
		if life, err = seconds("timeout_seconds", *req.TimeoutSeconds, sandbox.MinTimeout, sandbox.MaxTimeout); err != nil {
			return err
		}
	}
	_, done, _, err := s.enterIf(r.Context(), id, s.there) // who comes with the token resumes it
	if err != nil {
		return err
	}
	defer done()
	key, now := askingKey(r.Context()), s.cfg.Now()
	until := now.Add(life).Truncate(time.Second).UTC()
	out := api.Port{Port: req.Port, ExpiresAt: until}
	out.Token = auth.Sign(key, auth.Token{Purpose: auth.ForPorts, Sandbox: id, Expires: until, Until: until})
	out.URL = s.portURL(r, id, req.Port)
	if s.cfg.Domain != "" {
		link := auth.Token{Purpose: auth.ForLink, Sandbox: id, Expires: now.Add(min(linkLife, life)), Until: until}
		out.Link = out.URL + "?" + url.Values{api.ParamLink: {auth.Sign(key, link)}}.Encode()
	}
	return ok(w, out)
}

// portURL is where a port is, for whoever reaches us as this request does.
func (s *Server) portURL(r *http.Request, id sandbox.ID, port int) string {
	at := schemeOf(r) + "://"
	if s.cfg.Domain == "" {
		return at + r.Host + fmt.Sprintf("/v1/sandboxes/%s/ports/%d/", id, port)
	}
	at += fmt.Sprintf("%d-%s.%s", port, id, s.cfg.Domain)
	if _, ours, err := net.SplitHostPort(r.Host); err == nil {
		at += ":" + ours
	}
	return at + "/"
}

// hasLink says whether a request brings a link's token. Only names are looked at:
// the rest of a guest's query may be anything.
func hasLink(r *http.Request) bool {
	for pair := range strings.SplitSeq(r.URL.RawQuery, "&") {
		if strings.HasPrefix(pair, api.ParamLink+"=") {
			return true
		}
	}
	return false
}

// exchangeLink gives a browser the cookie for the token in its URL, and sends it
// to the URL without.
func (s *Server) exchangeLink(w http.ResponseWriter, r *http.Request, to portRef) error {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return sandbox.Errorf(sandbox.KindInvalid, "a link is followed with GET")
	}
	var given string
	var rest []string
	for pair := range strings.SplitSeq(r.URL.RawQuery, "&") {
		if value, ok := strings.CutPrefix(pair, api.ParamLink+"="); ok {
			given = value
		} else {
			rest = append(rest, pair)
		}
	}
	link, key, err := s.cfg.Keys.CheckToken(r.Context(), given, to.id, auth.ForLink)
	if sandbox.Is(err, sandbox.KindUnauthorized) {
		return sandbox.Errorf(sandbox.KindUnauthorized, "this link has expired, or is for another sandbox: make a new one")
	}
	if err != nil {
		return err
	}
	setKnown(w)
	secure := schemeOf(r) == "https"
	http.SetCookie(w, &http.Cookie{
		Name: tokenCookie(secure), Path: "/", Secure: secure, HttpOnly: true, SameSite: http.SameSiteLaxMode, Expires: link.Until,
		Value: auth.Sign(key, auth.Token{Purpose: auth.ForPorts, Sandbox: to.id, Expires: link.Until, Until: link.Until}),
	})
	clean := schemeOf(r) + "://" + r.Host + to.rest // whole: a path may begin with two slashes
	if len(rest) > 0 {
		clean += "?" + strings.Join(rest, "&")
	}
	w.Header().Set("Referrer-Policy", "no-referrer")
	w.Header().Set("Location", clean)
	w.WriteHeader(http.StatusSeeOther)
	return nil
}

// hostPrefix makes browsers refuse a cookie that comes from another host name, or
// without TLS.
const hostPrefix = "__Host-"

func tokenCookie(secure bool) string {
	if secure {
		return hostPrefix + api.CookieToken
	}
	return api.CookieToken
}

func isTokenCookie(name string) bool {
	return name == api.CookieToken || name == hostPrefix+api.CookieToken
}

// visitor is whose key opens a port: one in a header, or that of a token, in a
// header or, by host name, in a cookie. A wrong one in a header is not made good
// by a cookie.
func (s *Server) visitor(r *http.Request, to portRef) (store.Key, error) {
	given := r.Header.Get(api.HeaderToken)
	if given == "" {
		given = ownBearer(r.Header)
	}
	if key := r.Header.Get(auth.HeaderKey); given == "" && ownSecret(key) {
		given = key
	}
	switch {
	case strings.HasPrefix(given, api.KeyPrefix):
		return s.cfg.Keys.Check(r.Context(), given)
	case given != "":
		_, key, err := s.cfg.Keys.CheckToken(r.Context(), given, to.id, auth.ForPorts)
		return key, err
	case to.byName():
		return s.cookieVisitor(r, to)
	}
	// In the path form nothing that a browser adds by itself opens a port: there
	// all sandboxes and the API are one origin.
	return store.Key{}, auth.ErrToken
}

// maxTokens bounds how many cookies are tried: pages elsewhere under the domain
// can add some of the same name.
const maxTokens = 8

func (s *Server) cookieVisitor(r *http.Request, to portRef) (store.Key, error) {
	cookies := r.CookiesNamed(tokenCookie(schemeOf(r) == "https"))
	if len(cookies) > maxTokens {
		cookies = cookies[:maxTokens]
	}
	for _, c := range cookies {
		_, key, err := s.cfg.Keys.CheckToken(r.Context(), c.Value, to.id, auth.ForPorts)
		if err == nil {
			return key, ownPage(r)
		}
		if !sandbox.Is(err, sandbox.KindUnauthorized) {
			return store.Key{}, err
		}
	}
	return store.Key{}, auth.ErrToken
}

// ownPage refuses what another page does with the cookie of whoever looks at it.
// Two sandboxes under one domain are the same site to a browser, so SameSite alone
// does not. Following a link from anywhere is allowed.
func ownPage(r *http.Request) error {
	fine := true
	switch site := r.Header.Get("Sec-Fetch-Site"); site {
	case "same-origin", "none":
	case "":
		origin := r.Header.Get("Origin")
		u, err := url.Parse(origin)
		fine = origin == "" || err == nil && strings.EqualFold(u.Host, r.Host)
	default:
		fine = (r.Method == http.MethodGet || r.Method == http.MethodHead) &&
			r.Header.Get("Sec-Fetch-Mode") == "navigate" && r.Header.Get("Sec-Fetch-Dest") == "document"
	}
	if !fine {
		return sandbox.Errorf(sandbox.KindUnauthorized, "another page cannot use this sandbox's cookie; send a token in %s", api.HeaderToken)
	}
	return nil
}
