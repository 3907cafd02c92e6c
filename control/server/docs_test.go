package server_test

import (
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
)

var reference = regexp.MustCompile(`(?:src|href)="([^"]+)"`)

// TestDocsAskNoOtherHost: the page and all that it refers to are ours, and its
// policy forbids the rest.
func TestDocsAskNoOtherHost(t *testing.T) {
	r := newRig(t)
	get := func(path string) (*http.Response, string) {
		t.Helper()
		resp, err := http.Get(r.http.URL + path) // without a key
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }() // nothing was written to it
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp, string(text)
	}
	resp, page := get("/docs")
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/html; charset=utf-8" || !strings.Contains(page, "<title>Dormouse API") {
		t.Fatalf("%s %v\n%s", resp.Status, resp.Header, page)
	}
	policy := resp.Header.Get("Content-Security-Policy")
	for _, part := range []string{"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"} {
		if !strings.Contains(policy, part) {
			t.Errorf("the policy %q lacks %s", policy, part)
		}
	}
	if strings.Contains(policy, "unsafe") || strings.Contains(policy, ":") || strings.Contains(policy, "*") {
		t.Errorf("the policy %q lets in more than its own host", policy)
	}
	texts := page
	found := reference.FindAllStringSubmatch(page, -1)
	for _, m := range found {
		if strings.HasPrefix(m[1], "#") {
			continue
		}
		resp, text := get(m[1])
		if resp.StatusCode != 200 || !strings.HasPrefix(m[1], "/") {
			t.Errorf("%s: %s", m[1], resp.Status)
		}
		if m[1] != "/openapi.json" {
			texts += text
		}
	}
	if len(found) < 3 || strings.Contains(texts, "://") || strings.Contains(texts, "innerHTML") {
		t.Errorf("%d references; another host is named: %v", len(found), strings.Contains(texts, "://"))
	}
	for _, path := range []string{"/docs/", "/docs/nothing.js", "/docs/..%2fweb.go", "/docs/%2e%2e", "/docs/index.html%00"} {
		if resp, text := get(path); resp.StatusCode != 404 || !strings.Contains(text, "not_found") {
			t.Errorf("%s: %s %s", path, resp.Status, text)
		}
	}
}
