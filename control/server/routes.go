package server

import (
	"context"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/auth"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// handler answers a request or returns why it cannot. Once it has begun to
// write an answer it must return nil or errAborted.
type handler func(w http.ResponseWriter, r *http.Request) error

type route struct {
	pattern string // as of net/http
	open    bool   // needs no key, or checks it itself
	handle  handler
}

func (s *Server) table() []route {
	metrics := promhttp.HandlerFor(s.cfg.Registry, promhttp.HandlerOpts{})
	return []route{
		{"POST /v1/sandboxes", false, s.createSandbox},
		{"GET /v1/sandboxes", false, s.listSandboxes},
		{"GET /v1/sandboxes/{id}", false, s.getSandbox},
		{"DELETE /v1/sandboxes/{id}", false, s.deleteSandbox},
		{"POST /v1/sandboxes/{id}/exec", false, s.exec},
		{"GET /v1/sandboxes/{id}/exec/stream", true, s.execStream},
		{"GET /v1/sandboxes/{id}/pty", true, s.pty},
		{"GET /v1/sandboxes/{id}/files/read", false, s.readFile},
		{"PUT /v1/sandboxes/{id}/files/write", false, s.writeFile},
		{"GET /v1/sandboxes/{id}/files/tree", false, s.readTree},
		{"PUT /v1/sandboxes/{id}/files/tree", false, s.writeTree},
		{"GET /v1/sandboxes/{id}/files/list", false, s.listDir},
		{"GET /v1/sandboxes/{id}/files/stat", false, s.statFile},
		{"GET /v1/sandboxes/{id}/files/watch", false, s.watchFiles},
		{"POST /v1/sandboxes/{id}/files/mkdir", false, s.makeDir},
		{"POST /v1/sandboxes/{id}/files/move", false, s.moveFile},
		{"POST /v1/sandboxes/{id}/files/remove", false, s.removeFile},
		{"POST /v1/sandboxes/{id}/ports", false, s.openPort},
		{"GET /v1/sandboxes/{id}/tcp/{port}", true, s.portTCP},
		{"POST /v1/sandboxes/{id}/ping", false, s.ping},
		{"POST /v1/sandboxes/{id}/timeout", false, s.setTimeout},
		{"POST /v1/sandboxes/{id}/pause", false, s.pauseSandbox},
		{"POST /v1/sandboxes/{id}/resume", false, s.resumeSandbox},
		{"POST /v1/sandboxes/{id}/fork", false, s.forkSandbox},
		{"GET /v1/sandboxes/{id}/logs", false, s.logs},
		{"GET /v1/sandboxes/{id}/metrics", false, s.sandboxMetrics},
		{"POST /v1/templates", false, s.buildTemplate},
		{"GET /v1/templates", false, s.listTemplates},
		{"GET /v1/templates/{name}", false, s.getTemplate},
		{"GET /v1/templates/{name}/log", false, s.templateLog},
		{"DELETE /v1/templates/{name}", false, s.deleteTemplate},
		{"POST /v1/snapshots", false, s.createSnapshot},
		{"GET /v1/snapshots", false, s.listSnapshots},
		{"GET /v1/snapshots/{name}", false, s.getSnapshot},
		{"DELETE /v1/snapshots/{name}", false, s.deleteSnapshot},
		{"GET /v1/snapshots/{name}/tree", false, s.snapshotTree},
		{"POST /v1/snapshots/{name}/verify", false, s.verifySnapshot},
		{"GET /v1/host", false, s.getHost},
		{"POST /v1/api-keys", false, s.createKey},
		{"GET /v1/api-keys", false, s.listKeys},
		{"DELETE /v1/api-keys/{id}", false, s.deleteKey},
		{"GET /healthz", true, s.health},
		{"GET /metrics", false, func(w http.ResponseWriter, r *http.Request) error { metrics.ServeHTTP(w, r); return nil }},
		{"GET /openapi.json", true, s.openAPI},
		{"GET /docs", true, docs},
		{"GET /docs/{file}", true, docs},
		{"GET /test", true, testPage},
		{"GET /test/{file}", true, testPage},
	}
}

// Routes lists "METHOD /path" of everything that is served.
func (s *Server) Routes() []string {
	var out []string
	for _, rt := range s.table() {
		out = append(out, rt.pattern)
	}
	for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} { // what a guest takes is its own affair
		out = append(out, method+" "+portByPath)
	}
	return out
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	for _, rt := range s.table() {
		mux.Handle(rt.pattern, s.wrap(rt))
	}
	return s.observe(mux, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.unmatched(mux, w, r) }))
}

type keyOfContext struct{}

// wrap checks the key and turns what a handler returns into an answer.
func (s *Server) wrap(rt route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !rt.open {
			key, err := s.authenticate(r)
			if err != nil {
				s.fail(w, r, err)
				return
			}
			setKnown(w)
			r = r.WithContext(withKey(r.Context(), key))
		}
		if err := rt.handle(w, r); err != nil {
			s.fail(w, r, err)
		}
	})
}

func (s *Server) authenticate(r *http.Request) (store.Key, error) {
	secret, _ := auth.FromRequest(r)
	return s.cfg.Keys.Check(r.Context(), secret)
}

func withKey(ctx context.Context, key store.Key) context.Context {
	return context.WithValue(ctx, keyOfContext{}, key)
}

// askingKey is the key that authenticated the request.
func askingKey(ctx context.Context) store.Key {
	key, _ := ctx.Value(keyOfContext{}).(store.Key)
	return key
}

// unmatched answers what no route takes: the mux says whether it is the path or
// the method, and its answer becomes JSON. A path that the mux would clean is
// one of ours no more than any other wrong path.
func (s *Server) unmatched(mux *http.ServeMux, w http.ResponseWriter, r *http.Request) {
	probe := &discard{header: http.Header{}}
	mux.ServeHTTP(probe, r)
	if probe.status == http.StatusMethodNotAllowed {
		notAllowed(w, r, probe.header.Get("Allow"))
		return
	}
	s.fail(w, r, sandbox.Errorf(sandbox.KindNotFound, "there is nothing at %s", cut(r.URL.Path, 200)))
}

// notAllowed answers a method that a path does not have.
func notAllowed(w http.ResponseWriter, r *http.Request, allow string) {
	w.Header().Set("Allow", allow)
	writeJSON(w, http.StatusMethodNotAllowed, api.Error{Error: api.ErrorDetail{
		Code: string(sandbox.KindInvalid), Message: cut(r.Method, 40) + " is not possible here, only " + allow,
	}})
}

// discard keeps only what an answer's head says.
type discard struct {
	header http.Header
	status int
}

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }
func (d *discard) WriteHeader(status int)      { d.status = status }

// cut shortens what a client sent to what fits in a message.
func cut(s string, most int) string {
	s = strings.ToValidUTF8(s, "�")
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
