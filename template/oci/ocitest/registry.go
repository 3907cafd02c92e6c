package ocitest

import (
	"bytes"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
)

// What a Registry wants.
const (
	User     = "me"
	Password = "secret"
)

// Registry is a registry on the loopback interface, which wants a password.
type Registry struct{ url string }

// NewRegistry starts one, for the time of a test.
func NewRegistry(t testing.TB) Registry {
	t.Helper()
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != User || password != Password {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return Registry{s.URL}
}

// Push puts blobs and a manifest of some media type into it, and returns what to
// pull.
func (r Registry) Push(t testing.TB, tag string, blobs map[string][]byte, manifest []byte, mediaType string) string {
	t.Helper()
	for digest, data := range blobs {
		r.request(t, http.MethodPost, "blobs/uploads/?digest="+digest, data, "application/octet-stream")
	}
	r.request(t, http.MethodPut, "manifests/"+tag, manifest, mediaType)
	return strings.TrimPrefix(r.url, "http://") + "/test/image:" + tag
}

func (r Registry) request(t testing.TB, method, path string, body []byte, mediaType string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, r.url+"/v2/test/image/"+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.SetBasicAuth(User, Password)
	req.Header.Set("Content-Type", mediaType)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }() // read as far as it matters
	if res.StatusCode != http.StatusCreated {
		text, _ := io.ReadAll(res.Body) // for the message only
		t.Fatalf("%s %s: %s: %s", method, path, res.Status, text)
	}
}
