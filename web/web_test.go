package web_test

import (
	"io/fs"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/web"
)

// get is what the page at /test answers with for a file.
func get(t *testing.T, file string) (text string, header map[string][]string) {
	t.Helper()
	w := httptest.NewRecorder()
	if err := web.ServeTest(w, file); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return w.Body.String(), w.Header()
}

// own are the files of the page that people wrote.
func own(t *testing.T) []string {
	t.Helper()
	entries, err := fs.ReadDir(os.DirFS("."), "test")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if !e.IsDir() {
			out = append(out, e.Name())
		}
	}
	if len(out) < 15 {
		t.Fatalf("there are only %q", out)
	}
	return out
}

var (
	reference = regexp.MustCompile(`(?:src|href)="([^"]+)"|from "\./([^"]+)"`)
	// fromStrings are the ways by which a string becomes markup or code.
	fromStrings = regexp.MustCompile(`(?i)innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc|\beval\(|new Function|javascript:|setTimeout\(["'` + "`" + `]|setHTML`)
	// inline is what the policy forbids in a page.
	inline = regexp.MustCompile(`(?i)<script(?:\s+type="module")?>|<style|\sstyle="|\son[a-z]+="`)
)

// TestPageIsWholeAndAlone: all that the page refers to is there, nothing is of
// another host, and nothing makes markup or code from a string.
func TestPageIsWholeAndAlone(t *testing.T) {
	references := 0
	for _, file := range own(t) {
		text, _ := get(t, file)
		for _, m := range reference.FindAllStringSubmatch(text, -1) {
			name, ours := strings.CutPrefix(m[1], "/test/")
			if m[2] != "" {
				name, ours = m[2], true
			}
			if ours {
				references++
				get(t, name)
			} else if !strings.HasPrefix(m[1], "#") && m[1] != "/docs" {
				t.Errorf("%s refers to %s", file, m[1])
			}
		}
		if other := strings.ReplaceAll(text, "http://www.w3.org/2000/svg", ""); regexp.MustCompile("://|[\"'(`]//").MatchString(other) {
			t.Errorf("%s names another host", file)
		}
		if m := fromStrings.FindString(text); m != "" {
			t.Errorf("%s has %s", file, m)
		}
		if m := inline.FindString(text); strings.HasSuffix(file, ".html") && m != "" {
			t.Errorf("%s has %s", file, m)
		}
	}
	if references < 30 {
		t.Errorf("only %d references were found", references)
	}
}

// TestPolicies: only the terminal, which has an opaque origin, may have style
// elements; nothing may have a script in the page.
func TestPolicies(t *testing.T) {
	for _, row := range []struct {
		file        string
		has, hasNot []string
	}{
		{
			"",
			[]string{"default-src 'none'", "script-src 'self';", "style-src 'self';", "connect-src 'self'", "frame-src 'self'", "frame-ancestors 'none'", "form-action 'none'", "base-uri 'none'", "require-trusted-types-for 'script'"},
			[]string{"unsafe", "*", ":", "data", "blob"},
		},
		{
			"terminal.html",
			[]string{"default-src 'none'", "script-src 'self';", "sandbox allow-scripts", "frame-ancestors 'self'", "style-src 'self' 'unsafe-inline'"},
			[]string{"allow-same-origin", "allow-popups", "allow-forms", "allow-top", "connect-src", "unsafe-eval", "*", ":"},
		},
	} {
		_, header := get(t, row.file)
		policy := strings.Join(header["Content-Security-Policy"], "; ")
		for _, part := range row.has {
			if !strings.Contains(policy, part) {
				t.Errorf("the policy of %q lacks %s: %s", row.file, part, policy)
			}
		}
		for _, part := range row.hasNot {
			if strings.Contains(policy, part) {
				t.Errorf("the policy of %q has %s: %s", row.file, part, policy)
			}
		}
	}
}

// TestOnlyItsOwnFiles: no other path leads to a file.
func TestOnlyItsOwnFiles(t *testing.T) {
	for _, file := range []string{"nothing.js", "VERSIONS", "vendor/xterm.js", "../docs/app.js", "../web.go", "..", ".", "app.js", "index.html\x00", "/index.html"} {
		w := httptest.NewRecorder()
		if err := web.ServeTest(w, file); !sandbox.Is(err, sandbox.KindNotFound) || w.Body.Len() > 0 {
			t.Errorf("%q: %v, %d bytes", file, err, w.Body.Len())
		}
	}
	for file, kind := range map[string]string{"main.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml", "xterm.js": "text/javascript", "xterm.LICENSE.txt": "text/plain"} {
		if _, header := get(t, file); !strings.HasPrefix(strings.Join(header["Content-Type"], ""), kind) {
			t.Errorf("%s is %v", file, header["Content-Type"])
		}
	}
}
