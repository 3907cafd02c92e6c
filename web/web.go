// Package web is the pages that the server shows: for now the description of the
// API, drawn from /openapi.json. They are embedded, hold no data of their own, and
// ask nothing of any other host: a strict content security policy sees to that.
// Whatever they show comes from the API, as for any other client.
package web

import (
	"embed"
	"io/fs"
	"net/http"
	"path"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

//go:embed docs
var files embed.FS

// policy lets a page use what lies beside it, and nothing else: no script in the
// page itself, no frame around it, no form, no other host.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

var types = map[string]string{
	".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
}

// ServeDocs answers with one file of the API's description; empty is the page.
func ServeDocs(w http.ResponseWriter, file string) error {
	if file == "" {
		file = "index.html"
	}
	kind, known := types[path.Ext(file)]
	data, err := fs.ReadFile(files, path.Join("docs", file))
	if err != nil || !known || !fs.ValidPath(file) {
		return sandbox.Errorf(sandbox.KindNotFound, "the pages have no file of that name")
	}
	h := w.Header()
	h.Set("Content-Type", kind)
	h.Set("Content-Security-Policy", policy)
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cache-Control", "no-cache") // another version of the server has another page
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(data) // a client that went away is nobody's error
	return nil
}
