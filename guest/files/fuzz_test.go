package files_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	"github.com/dormouse-sandbox/dormouse/guest/files"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/identity"
)

// plain is a server for one user whose home is a new directory, without a network.
func plain(t testing.TB, token string) (*files.Server, string) {
	t.Helper()
	etc, home := t.TempDir(), t.TempDir()
	line := fmt.Sprintf("u:x:%d:%d:u:%s:/bin/sh\n", os.Geteuid(), os.Getegid(), home)
	if err := os.WriteFile(filepath.Join(etc, "passwd"), []byte(line), 0o644); err != nil {
		t.Fatal(err)
	}
	current := identity.New(account.Dir(etc), "u", "")
	if err := current.Apply(guestapi.Init{AccessToken: token}, false); err != nil {
		t.Fatal(err)
	}
	return files.New(current, nil), home
}

// FuzzUpload sends any body, as parts whose names are kept below the home.
func FuzzUpload(f *testing.F) {
	f.Add("multipart/form-data; boundary=b", "", "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nx\r\n--b--\r\n")
	f.Add("multipart/form-data; boundary=b", "gzip", "--b\r\nContent-Disposition: form-data; name=file; filename*=UTF-8''a%20b\r\n\r\n")
	f.Add("application/octet-stream", "gzip", "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff")
	f.Add("application/octet-stream", "", "x")
	s, home := plain(f, "")
	f.Fuzz(func(t *testing.T, contentType, encoding, body string) {
		if strings.ContainsAny(body, "/~") { // stay below the home
			return
		}
		q := url.Values{}
		if !strings.HasPrefix(contentType, "multipart/") {
			q.Set("path", "raw")
		}
		r := httptest.NewRequest("POST", "/files?"+q.Encode(), strings.NewReader(body))
		r.Header.Set("Content-Type", contentType)
		r.Header.Set("Content-Encoding", encoding)
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		checkAnswer(t, w, home)
	})
}

// checkAnswer asks that an upload is either told as an error, or is there, and
// that nothing unfinished is left.
func checkAnswer(t *testing.T, w *httptest.ResponseRecorder, home string) {
	t.Helper()
	left, _ := filepath.Glob(home + "/.dormouse-*") // the pattern is right
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if w.Code != http.StatusOK {
		var e guestapi.Error
		if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || e.Code != w.Code || e.Message == "" || w.Code >= 500 && w.Code != 507 {
			t.Errorf("%d %s", w.Code, w.Body)
		}
		return
	}
	var written []guestapi.WrittenFile
	if err := json.Unmarshal(w.Body.Bytes(), &written); err != nil || len(written) == 0 {
		t.Fatalf("%s: %v", w.Body, err)
	}
	for _, file := range written {
		if strings.ContainsRune(file.Path, 0xFFFD) {
			continue // a name that is no text
		}
		if info, err := os.Lstat(file.Path); err != nil || !info.Mode().IsRegular() {
			t.Errorf("%s: %v", file.Path, err)
		}
		if !strings.HasPrefix(file.Path, home) {
			t.Errorf("%s is outside of %s", file.Path, home)
		}
	}
}

func FuzzDownload(f *testing.F) {
	s, home := plain(f, "")
	content := bytes.Repeat([]byte("0123456789"), 20)
	if err := os.WriteFile(home+"/f", content, 0o644); err != nil {
		f.Fatal(err)
	}
	f.Add("gzip", "bytes=0-1", "")
	f.Add("identity;q=0, *;q=0.1", "", "Mon, 02 Jan 2006 15:04:05 GMT")
	f.Add("gzip;q=1.;q=0", "bytes=-1,2-,5-6", "")
	f.Fuzz(func(t *testing.T, accept, ranges, since string) {
		r := httptest.NewRequest("GET", "/files?path=f", nil)
		for name, value := range map[string]string{"Accept-Encoding": accept, "Range": ranges, "If-Modified-Since": since} {
			if value != "" {
				r.Header.Set(name, value)
			}
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		switch w.Code {
		case http.StatusOK:
			body := w.Body.Bytes()
			if w.Header().Get("Content-Encoding") == "gzip" {
				body = gunzip(t, body)
			}
			if !bytes.Equal(body, content) {
				t.Errorf("%d other bytes", len(body))
			}
		case http.StatusPartialContent:
			if w.Header().Get("Content-Encoding") != "" || ranges == "" {
				t.Errorf("%v", w.Header())
			}
		case http.StatusNotModified, http.StatusNotAcceptable, http.StatusRequestedRangeNotSatisfiable:
		default:
			t.Errorf("%d %s", w.Code, w.Body)
		}
	})
}

// FuzzFileSignature has no true signature in it.
func FuzzFileSignature(f *testing.F) {
	s, home := plain(f, "secret")
	if err := os.WriteFile(home+"/f", []byte("x"), 0o644); err != nil {
		f.Fatal(err)
	}
	f.Add("v1_AAAA", "1700000000", "u", "f")
	f.Add("", "", "", "")
	f.Fuzz(func(t *testing.T, signature, expiration, user, path string) {
		q := url.Values{"signature": {signature}, "signature_expiration": {expiration}, "username": {user}, "path": {path}}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, httptest.NewRequest("GET", "/files?"+q.Encode(), nil))
		if w.Code != http.StatusUnauthorized {
			t.Errorf("%d %s", w.Code, w.Body)
		}
	})
}

func FuzzMetadata(f *testing.F) {
	s, home := plain(f, "")
	f.Add("Author", "me")
	f.Add("", "\xff")
	f.Fuzz(func(t *testing.T, key, value string) {
		r := httptest.NewRequest("POST", "/files?path=m", strings.NewReader("x"))
		r.Header.Set("Content-Type", "application/octet-stream")
		r.Header["X-Metadata-"+key] = []string{value}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if w.Code != http.StatusNotImplemented && w.Code != http.StatusInsufficientStorage {
			checkAnswer(t, w, home)
		}
		var written []guestapi.WrittenFile
		if w.Code == http.StatusOK && (json.Unmarshal(w.Body.Bytes(), &written) != nil || written[0].Metadata[strings.ToLower(key)] != value) {
			t.Errorf("%q: %q became %s", key, value, w.Body)
		}
	})
}
