package files_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	filesystemv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

func fileURL(g *guesttest.Guest, query ...string) string {
	q := url.Values{}
	for i := 0; i < len(query); i += 2 {
		q.Set(query[i], query[i+1])
	}
	return g.URL + "/files?" + q.Encode()
}

func get(t *testing.T, client *http.Client, url string) (*http.Response, []byte) {
	t.Helper()
	res, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	return res, readAll(t, res)
}

func readAll(t *testing.T, res *http.Response) []byte {
	t.Helper()
	defer func() { _ = res.Body.Close() }() // read only
	data, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func post(t *testing.T, g *guesttest.Guest, url, contentType string, body io.Reader) (*http.Response, []byte) {
	t.Helper()
	res, err := g.Client.Post(url, contentType, body)
	if err != nil {
		t.Fatal(err)
	}
	return res, readAll(t, res)
}

const octets = "application/octet-stream"

func wantError(t *testing.T, what string, res *http.Response, body []byte, status int, text string) {
	t.Helper()
	var e guestapi.Error
	if err := json.Unmarshal(body, &e); err != nil || res.StatusCode != status || e.Code != status || !strings.Contains(e.Message, text) {
		t.Errorf("%s: %d %s, want %d with %q", what, res.StatusCode, body, status, text)
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestDownload(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{Token: "t"})
	write(t, g.Home+"/a b", "hello")
	write(t, g.Home+"/empty", "")
	for _, path := range []string{"a b", "~/a b", g.Home + "/a b", g.Home + "/./x/../a b"} {
		res, body := get(t, g.Client, fileURL(g, "path", path))
		if res.StatusCode != 200 || string(body) != "hello" || res.ContentLength != 5 {
			t.Errorf("%s: %d %q, length %d", path, res.StatusCode, body, res.ContentLength)
		}
	}
	if res, body := get(t, g.Client, fileURL(g, "path", "empty")); res.StatusCode != 200 || len(body) != 0 || res.Header.Get("Content-Length") != "0" {
		t.Errorf("empty: %d, length %q", res.StatusCode, res.Header.Get("Content-Length"))
	}
}

func TestWhatCannotBeDownloaded(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	fifo := filepath.Join(g.Home, "fifo")
	if err := syscall.Mkfifo(fifo, 0o644); err != nil {
		t.Fatal(err)
	}
	write(t, g.Home+"/f", "x")
	for path, want := range map[string]struct {
		status int
		text   string
	}{
		"/dev/zero":              {400, "/dev/zero is a character device"},
		fifo:                     {400, "a named pipe"},
		g.Home:                   {400, "a directory"},
		"":                       {400, "a directory"},
		"missing":                {404, "missing does not exist"},
		"f/below":                {400, "not a directory"},
		"/proc/meminfo":          {400, "made up by the kernel"},
		"a\x00b":                 {400, "NUL"},
		strings.Repeat("n", 300): {400, "name too long"},
	} {
		res, body := get(t, g.Client, fileURL(g, "path", path))
		wantError(t, path, res, body, want.status, want.text)
	}
	res, body := get(t, g.Client, fileURL(g, "path", "f", "username", "nobody-knows"))
	wantError(t, "unknown user", res, body, 401, "invalid username: 'nobody-knows'")
}

func TestTokenOrSignature(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{Token: "secret"})
	write(t, g.Home+"/f", "x")
	anybody := &http.Client{}
	future, past := time.Now().Add(time.Hour).Unix(), time.Now().Add(-time.Hour).Unix()
	read := guestapi.FileSignature{Path: "f", Operation: guestapi.FileRead}
	expiring, expired := read, read
	expiring.Expires, expired.Expires = &future, &past
	for name, tt := range map[string]struct {
		query  []string
		status int
		text   string
	}{
		"nothing":           {nil, 401, "token or a signature"},
		"signature":         {[]string{"signature", read.Sign("secret")}, 200, ""},
		"another token's":   {[]string{"signature", read.Sign("other")}, 401, "invalid signature"},
		"not yet expired":   {[]string{"signature", expiring.Sign("secret"), "signature_expiration", strconv.FormatInt(future, 10)}, 200, ""},
		"expired":           {[]string{"signature", expired.Sign("secret"), "signature_expiration", strconv.FormatInt(past, 10)}, 401, "signature is already expired"},
		"expiry cut off":    {[]string{"signature", expired.Sign("secret")}, 401, "invalid signature"},
		"for another user":  {[]string{"signature", read.Sign("secret"), "username", guesttest.User}, 401, "invalid signature"},
		"expiry not a time": {[]string{"signature", read.Sign("secret"), "signature_expiration", "soon"}, 401, "number"},
	} {
		res, body := get(t, anybody, fileURL(g, append([]string{"path", "f"}, tt.query...)...))
		if tt.status != 200 {
			wantError(t, name, res, body, tt.status, tt.text)
		} else if res.StatusCode != 200 || string(body) != "x" {
			t.Errorf("%s: %d %s", name, res.StatusCode, body)
		}
	}
	res, err := anybody.Post(fileURL(g, "path", "f", "signature", read.Sign("secret")), octets, strings.NewReader("y"))
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, "a signature for reading", res, readAll(t, res), 401, "invalid signature")
}

func TestUpload(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	if err := os.WriteFile(g.Home+"/tool", []byte("old"), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("tool", g.Home+"/link"); err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{"new": 0o644, "deep/er/file": 0o644, "tool": 0o750, "link": 0o750} {
		res, body := post(t, g, fileURL(g, "path", path), octets, strings.NewReader("content of "+path))
		var written []guestapi.WrittenFile
		if err := json.Unmarshal(body, &written); err != nil || res.StatusCode != 200 || len(written) != 1 {
			t.Fatalf("%s: %d %s", path, res.StatusCode, body)
		}
		if want := (guestapi.WrittenFile{Name: filepath.Base(path), Path: g.Home + "/" + path, Type: "file"}); written[0].Path != want.Path || written[0].Name != want.Name || written[0].Type != want.Type {
			t.Errorf("got %v, want %v", written[0], want)
		}
		got, err := os.ReadFile(g.Home + "/" + path)
		if err != nil || string(got) != "content of "+path {
			t.Errorf("%s: %q, %v", path, got, err)
		}
		if info, err := os.Stat(g.Home + "/" + path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, want %v", path, info.Mode(), mode)
		}
	}
	if _, err := os.Readlink(g.Home + "/link"); err != nil {
		t.Error("the link is gone:", err)
	}
	noTemp(t, g.Home)
}

func noTemp(t *testing.T, dir string) {
	t.Helper()
	left, err := filepath.Glob(dir + "/.dormouse-*")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestUploadBelongsToItsUser(t *testing.T) {
	testkit.Root(t)
	g := guesttest.Start(t, guesttest.Options{})
	res, body := post(t, g, fileURL(g, "path", g.Home+"/d/f", "username", "other"), octets, strings.NewReader("x"))
	if res.StatusCode != 200 {
		t.Fatalf("%d %s", res.StatusCode, body)
	}
	for _, path := range []string{"/d", "/d/f"} {
		info, err := os.Stat(g.Home + path)
		if err != nil || info.Sys().(*syscall.Stat_t).Uid != 12345 || info.Sys().(*syscall.Stat_t).Gid != 12345 {
			t.Errorf("%s belongs to %+v, %v", path, info.Sys(), err)
		}
	}
}

func TestWhatCannotBeUploaded(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	write(t, g.Home+"/f", "x")
	if err := os.Symlink("loop", g.Home+"/loop"); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		path, contentType string
		status            int
		text              string
	}{
		"a directory":     {g.Home, octets, 400, "a directory"},
		"a device":        {"/dev/null", octets, 400, "a character device"},
		"below a file":    {"f/g", octets, 400, "not a directory"},
		"a circle":        {"loop", octets, 400, "links"},
		"no path":         {"", octets, 400, "path"},
		"another type":    {"x", "text/plain", 415, "text/plain"},
		"no content type": {"x", "", 400, "Content-Type"},
		"multipart":       {"x", "multipart/form-data; boundary=b", 400, "multipart"},
	} {
		res, body := post(t, g, fileURL(g, "path", tt.path), tt.contentType, strings.NewReader("data"))
		wantError(t, name, res, body, tt.status, tt.text)
	}
	noTemp(t, g.Home)
}

func form(t *testing.T, parts map[string]string) (io.Reader, string) {
	t.Helper()
	var buf bytes.Buffer
	w := multipart.NewWriter(&buf)
	for name, content := range parts {
		part, err := w.CreateFormFile("file", name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(part, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &buf, w.FormDataContentType()
}

func TestMultipart(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	files := map[string]string{g.Home + "/m/one": "1", g.Home + "/m/two": "22"}
	body, contentType := form(t, files)
	if res, answer := post(t, g, g.URL+"/files", contentType, body); res.StatusCode != 200 {
		t.Fatalf("%d %s", res.StatusCode, answer)
	}
	for path, want := range files {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", path, got, err)
		}
	}
	body, contentType = form(t, map[string]string{"ignored": "x"})
	if res, answer := post(t, g, fileURL(g, "path", "chosen"), contentType, body); res.StatusCode != 200 {
		t.Fatalf("%d %s", res.StatusCode, answer)
	}
	if got, err := os.ReadFile(g.Home + "/chosen"); err != nil || string(got) != "x" {
		t.Errorf("%q, %v", got, err)
	}
	body, contentType = form(t, files)
	res, answer := post(t, g, fileURL(g, "path", "chosen"), contentType, body)
	wantError(t, "several files for one path", res, answer, 400, "leave out path")
	body, contentType = form(t, map[string]string{"twice": "1", "./twice": "2"})
	res, answer = post(t, g, g.URL+"/files", contentType, body)
	wantError(t, "one name twice", res, answer, 400, "cannot both go to")
}

func TestCompressedUpload(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	var packed bytes.Buffer
	zw := gzip.NewWriter(&packed)
	if _, err := io.WriteString(zw, "unpacked"); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest("POST", fileURL(g, "path", "z"), &packed)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", octets)
	req.Header.Set("Content-Encoding", "gzip")
	res, err := g.Client.Do(req)
	if err != nil || res.StatusCode != 200 {
		t.Fatal(res, err)
	}
	readAll(t, res)
	if got, err := os.ReadFile(g.Home + "/z"); err != nil || string(got) != "unpacked" {
		t.Errorf("%q, %v", got, err)
	}
}

// cut is a body that breaks off.
type cut struct{ left int }

var errCut = errors.New("cut")

func (c *cut) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, errCut
	}
	n := min(len(p), c.left)
	c.left -= n
	return n, nil
}

func TestACutUploadLeavesTheOldFile(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	write(t, g.Home+"/f", "old")
	for _, path := range []string{"f", "new"} {
		for _, length := range []int64{-1, 1 << 20} { // chunked, and announced
			req, err := http.NewRequest("POST", fileURL(g, "path", path), &cut{left: 300_000})
			if err != nil {
				t.Fatal(err)
			}
			req.ContentLength = length
			req.Header.Set("Content-Type", octets)
			if res, err := g.Client.Do(req); err == nil {
				t.Fatalf("the upload ended with %d", res.StatusCode)
			}
		}
	}
	testkit.Eventually(t, 5*time.Second, "rid of the temporary files", func() bool {
		left, _ := filepath.Glob(g.Home + "/.dormouse-*") // the pattern is right
		return len(left) == 0
	})
	if got, err := os.ReadFile(g.Home + "/f"); err != nil || string(got) != "old" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := os.Stat(g.Home + "/new"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half a file is there: %v", err)
	}
}

func TestAFullDisk(t *testing.T) {
	testkit.Root(t)
	g := guesttest.Start(t, guesttest.Options{})
	small := filepath.Join(g.Home, "small")
	if err := os.Mkdir(small, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=1m"); err != nil {
		testkit.Require(t, "mount", false, err.Error())
	}
	defer func() {
		if err := testkit.Unmount(small); err != nil {
			t.Error(err)
		}
	}()
	res, body := post(t, g, fileURL(g, "path", small+"/f"), octets, bytes.NewReader(make([]byte, 4<<20)))
	wantError(t, "full", res, body, http.StatusInsufficientStorage, "no space left on device")
	noTemp(t, small)
}

// getWith asks for a file with further headers.
func getWith(t *testing.T, g *guesttest.Guest, method, path string, header map[string]string) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequest(method, fileURL(g, "path", path), nil)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	res, err := g.Client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	return res, readAll(t, res)
}

func TestPartsAndConditions(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	write(t, g.Home+"/f", "0123456789")
	res, _ := get(t, g.Client, fileURL(g, "path", "f"))
	modified := res.Header.Get("Last-Modified")
	old := time.Unix(1e9, 0).UTC().Format(http.TimeFormat)
	for _, tt := range []struct {
		name, value string
		status      int
		body        string
	}{
		{"Range", "bytes=2-4", 206, "234"},
		{"Range", "bytes=-3", 206, "789"},
		{"Range", "bytes=7-", 206, "789"},
		{"Range", "bytes=99-", 416, ""},
		{"If-Modified-Since", modified, 304, ""},
		{"If-Modified-Since", old, 200, "0123456789"},
		{"If-Unmodified-Since", old, 412, ""},
		{"If-None-Match", "*", 304, ""},
		{"If-None-Match", `"x"`, 200, "0123456789"}, // there is no ETag to match
	} {
		for _, encoding := range []string{"", "gzip"} { // a part is never compressed
			res, body := getWith(t, g, "GET", "f", map[string]string{tt.name: tt.value, "Accept-Encoding": encoding})
			if res.StatusCode != tt.status || res.Header.Get("Content-Encoding") != "" || tt.status < 300 && string(body) != tt.body {
				t.Errorf("%s: %s, %q: %d %q", tt.name, tt.value, encoding, res.StatusCode, body)
			}
		}
	}
	res, body := getWith(t, g, "GET", "f", map[string]string{"Range": "bytes=0-0,-1"})
	if res.StatusCode != 206 || !strings.HasPrefix(res.Header.Get("Content-Type"), "multipart/byteranges") || !bytes.Contains(body, []byte("bytes 9-9/10")) {
		t.Errorf("two ranges: %d %s %s", res.StatusCode, res.Header.Get("Content-Type"), body)
	}
	if res, body := getWith(t, g, "HEAD", "f", nil); res.StatusCode != 200 || len(body) != 0 || res.ContentLength != 10 {
		t.Errorf("HEAD: %d, length %d", res.StatusCode, res.ContentLength)
	}
	res, body = getWith(t, g, "GET", "f", map[string]string{"Range": "bytes=0-1", "Accept-Encoding": "gzip, identity;q=0"})
	wantError(t, "a part only without identity", res, body, 406, "Accept-Encoding")
}

func TestCompressedDownload(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	content := strings.Repeat("compress me ", 10_000)
	write(t, g.Home+"/f", content)
	write(t, g.Home+"/empty", "")
	for accept, want := range map[string]string{
		"gzip":                        "gzip",
		"GZip":                        "gzip",
		"gzip, deflate, br":           "gzip",
		"gzip;q=0.5":                  "gzip",
		"br;q=1.0, gzip;q=0.8, *;q=0": "gzip",
		"identity;q=0, *":             "gzip",
		"":                            "",
		"br":                          "",
		"*":                           "",
		"identity":                    "",
		"gzip;q=0":                    "",
		"gzip;q=0.2, identity;q=0.9":  "",
		"gzip;q=much":                 "",
		"*;q=0":                       "406",
		"identity;q=0":                "406",
		"br, identity;q=0":            "406",
	} {
		res, body := getWith(t, g, "GET", "f", map[string]string{"Accept-Encoding": accept})
		if want == "406" {
			wantError(t, accept, res, body, 406, "Accept-Encoding")
			continue
		}
		if res.StatusCode != 200 || res.Header.Get("Content-Encoding") != want || res.Header.Get("Vary") != "Accept-Encoding" {
			t.Errorf("%q: %d %v", accept, res.StatusCode, res.Header)
		}
		if want == "gzip" {
			if len(body) > len(content)/10 {
				t.Errorf("%q: %d bytes are not compressed", accept, len(body))
			}
			body = gunzip(t, body)
		}
		if string(body) != content {
			t.Errorf("%q: other bytes came back", accept)
		}
	}
	res, _ := getWith(t, g, "GET", "empty", map[string]string{"Accept-Encoding": "gzip"})
	if res.Header.Get("Content-Encoding") != "" || res.Header.Get("Content-Length") != "0" {
		t.Errorf("an empty file: %v", res.Header)
	}
	res, _ = getWith(t, g, "HEAD", "f", map[string]string{"Accept-Encoding": "gzip"})
	if res.Header.Get("Content-Encoding") != "gzip" || res.ContentLength == int64(len(content)) {
		t.Errorf("HEAD: %v", res.Header)
	}
}

func gunzip(t *testing.T, data []byte) []byte {
	t.Helper()
	zr, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(zr)
	if err != nil {
		t.Fatal(err)
	}
	return plain
}

// TestManyCompressedDownloads has more at once than are compressed: all arrive,
// and what they hold is bounded.
func TestManyCompressedDownloads(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	random := make([]byte, 8<<20) // it does not fit into sockets
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range random {
		random[i] = byte(rng.Uint32())
	}
	write(t, g.Home+"/f", string(random))
	done := g.Watch(t, 4<<20)
	var open []*http.Response
	packed := 0
	for range 20 {
		req, err := http.NewRequest("GET", fileURL(g, "path", "f"), nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept-Encoding", "gzip")
		res, err := g.Client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if res.Header.Get("Content-Encoding") == "gzip" {
			packed++
		}
		open = append(open, res)
	}
	if packed == 0 || packed == len(open) {
		t.Errorf("%d of %d are compressed", packed, len(open))
	}
	for i, res := range open {
		if i%2 == 0 { // half of them are given up
			_ = res.Body.Close() // on purpose
			continue
		}
		body := readAll(t, res)
		if res.Header.Get("Content-Encoding") == "gzip" {
			body = gunzip(t, body)
		}
		if !bytes.Equal(body, random) {
			t.Errorf("download %d has other bytes", i)
		}
	}
	done()
}

func TestMetadata(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	put := func(header map[string]string, client *http.Client) []guestapi.WrittenFile {
		t.Helper()
		body, contentType := form(t, map[string]string{g.Home + "/one": "1", g.Home + "/two": "2"})
		req, err := http.NewRequest("POST", g.URL+"/files", body)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", contentType)
		for k, v := range header {
			req.Header.Set(k, v)
		}
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		answer := readAll(t, res)
		if res.StatusCode == http.StatusNotImplemented {
			testkit.Require(t, "xattr", false, string(answer))
		}
		var written []guestapi.WrittenFile
		if err := json.Unmarshal(answer, &written); err != nil || res.StatusCode != 200 || len(written) != 2 {
			t.Fatalf("%d %s", res.StatusCode, answer)
		}
		return written
	}
	check := func(want map[string]string, written []guestapi.WrittenFile) {
		t.Helper()
		for _, f := range written {
			e, err := stat(t, g, f.Path)
			if err != nil {
				t.Fatal(err)
			}
			if !maps.Equal(f.Metadata, want) || !maps.Equal(e.GetMetadata(), want) {
				t.Errorf("%s: the answer has %v, Stat %v, want %v", f.Path, f.Metadata, e.GetMetadata(), want)
			}
		}
	}
	check(map[string]string{"author": "me", "content-kind": "a b; c"},
		put(map[string]string{"X-Metadata-Author": "me", "X-Metadata-Content-Kind": "a b; c"}, g.Client))
	// The whole set is replaced, also by nothing.
	check(map[string]string{"other": "x"}, put(map[string]string{"X-Metadata-Other": "x"}, g.Client))
	if err := syscall.Setxattr(g.Home+"/one", "user.mine", []byte("y"), 0); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setxattr(g.Home+"/one", "user.e2b.binary", []byte("\xff"), 0); err != nil {
		t.Fatal(err)
	}
	if e, err := stat(t, g, "one"); err != nil || !maps.Equal(e.GetMetadata(), map[string]string{"other": "x"}) {
		t.Errorf("with what others have set: %v, %v", e.GetMetadata(), err)
	}
	if err := os.Symlink("one", g.Home+"/link"); err != nil {
		t.Fatal(err)
	}
	if e, err := stat(t, g, "link"); err != nil || e.GetMetadata()["other"] != "x" {
		t.Errorf("through a link: %v, %v", e.GetMetadata(), err)
	}
	if _, err := g.Filesystem.Move(t.Context(), connect.NewRequest(&filesystemv1.MoveRequest{Source: "two", Destination: "three"})); err != nil {
		t.Fatal(err)
	}
	list, err := g.Filesystem.ListDir(t.Context(), connect.NewRequest(&filesystemv1.ListDirRequest{Path: "~"}))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list.Msg.GetEntries() {
		if e.GetName() == "three" && e.GetMetadata()["other"] != "x" {
			t.Errorf("after a move the list has %v", e)
		}
	}
	check(nil, put(nil, g.Client))
}

func TestMetadataThatIsRefused(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	for name, tt := range map[string]struct{ key, value, text string }{
		"no key":       {"", "x", "no key"},
		"a long key":   {strings.Repeat("k", 247), "x", "247 bytes"},
		"too much":     {"k", strings.Repeat("v", 4090), "at most 4096"},
		"other script": {"k", "caf\u00e9", "printable"},
	} {
		req, err := http.NewRequest("POST", fileURL(g, "path", "f"), strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", octets)
		req.Header.Set("X-Metadata-"+tt.key, tt.value)
		res, err := g.Client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		wantError(t, name, res, readAll(t, res), 400, tt.text)
	}
	if _, err := os.Stat(g.Home + "/f"); err == nil {
		t.Error("the file was written all the same")
	}
}

// TestLargeFilesWithFlatMemory sends zeroes through both ways.
func TestLargeFilesWithFlatMemory(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	const size = 256 << 20
	res, body := post(t, g, fileURL(g, "path", "big"), octets, io.LimitReader(pattern{}, size))
	if res.StatusCode != 200 {
		t.Fatalf("%d %s", res.StatusCode, body)
	}
	if h := heap(); h > 32<<20 {
		t.Errorf("after the upload the heap is %d MiB", h>>20)
	}
	res, err := g.Client.Get(fileURL(g, "path", "big"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }() // read only
	n, err := io.Copy(checker{}, res.Body)
	if err != nil || n != size {
		t.Errorf("%d bytes came back, %v", n, err)
	}
	if h := heap(); h > 32<<20 {
		t.Errorf("after the download the heap is %d MiB", h>>20)
	}
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m) // without a collection: what was allocated and not collected counts
	return m.HeapInuse
}

type pattern struct{}

func (pattern) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 0xA5
	}
	return len(p), nil
}

type checker struct{}

func (checker) Write(p []byte) (int, error) {
	if bytes.Count(p, []byte{0xA5}) != len(p) {
		return 0, errors.New("other bytes came back")
	}
	return len(p), nil
}
