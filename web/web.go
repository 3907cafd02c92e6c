// Package web is the pages that the server shows: the description of the API, drawn
// from /openapi.json, and the page at /test, on which people try everything. They
// are embedded, hold no data of their own, and ask nothing of any other host: a
// strict content security policy sees to that. Whatever they show comes from the
// API, as for any other client.
package web

import (
	"cmp"
	"embed"
	"io/fs"
	"net/http"
	"path"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

//go:embed docs test
var files embed.FS

// common is what all policies have: no other host, no form, no base.
const common = "default-src 'none'; script-src 'self'; base-uri 'none'; form-action 'none'; "

const (
	// docsPolicy lets a page use what lies beside it, and nothing else: no script in
	// the page itself, no frame around it.
	docsPolicy = common + "style-src 'self'; connect-src 'self'; frame-ancestors 'none'"
	// testPolicy lets it frame the terminal, too. A script of it cannot make markup
	// from a string at all.
	testPolicy = common + "style-src 'self'; img-src 'self'; connect-src 'self'; frame-src 'self'; frame-ancestors 'none'; " +
		"require-trusted-types-for 'script'; trusted-types 'none'"
	// terminalPolicy gives what draws a terminal an opaque origin, even if somebody
	// opens it by itself: it reaches neither the page around it, nor what that has
	// stored, nor any network. xterm.js sets its styles by style elements, which only
	// 'unsafe-inline' allows; here there is nothing that a style could tell anybody.
	terminalPolicy = common + "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; sandbox allow-scripts"
)

var types = map[string]string{
	".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
	".svg": "image/svg+xml", ".txt": "text/plain; charset=utf-8",
}

// ServeDocs answers with one file of the API's description; empty is the page.
func ServeDocs(w http.ResponseWriter, file string) error {
	return serve(w, docsPolicy, file, "docs")
}

// ServeTest answers with one file of the page at /test; empty is the page.
func ServeTest(w http.ResponseWriter, file string) error {
	policy := testPolicy
	if file == "terminal.html" {
		policy = terminalPolicy
	}
	return serve(w, policy, file, "test", "test/vendor")
}

// serve finds a file in one of some folders.
func serve(w http.ResponseWriter, policy, file string, folders ...string) error {
	file = cmp.Or(file, "index.html")
	kind, known := types[path.Ext(file)]
	data, found := read(file, folders)
	if !known || !found {
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

func read(file string, folders []string) (data []byte, found bool) {
	if !fs.ValidPath(file) || path.Base(file) != file {
		return nil, false
	}
	for _, folder := range folders {
		if data, err := fs.ReadFile(files, path.Join(folder, file)); err == nil {
			return data, true
		}
	}
	return nil, false
}
