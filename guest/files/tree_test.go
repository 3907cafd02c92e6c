package files_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	filesystemv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/internal/tree"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func treeURL(g *guesttest.Guest, query ...string) string {
	return strings.Replace(fileURL(g, query...), "/files?", guestapi.PathTree+"?", 1)
}

// tarOf is a stream of files and, where a name ends in a slash, directories.
func tarOf(t *testing.T, entries ...string) *bytes.Buffer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i := 0; i < len(entries); i += 2 {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: entries[i], Mode: 0o640, Size: int64(len(entries[i+1]))}
		if strings.HasSuffix(h.Name, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o750
		}
		if to, ok := strings.CutPrefix(entries[i+1], "->"); ok {
			h.Typeflag, h.Linkname, h.Size, entries[i+1] = tar.TypeSymlink, to, 0, ""
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, entries[i+1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &buf
}

// unpackInto reads a stream that the agent sent.
func unpackInto(t *testing.T, r io.Reader) (string, tree.Report, error) {
	t.Helper()
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = root.Close() }() // the test's own
	report, err := tree.Unpack(r, root, tree.Options{})
	return dir, report, err
}

func TestTreeRoundTrip(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{Token: "t"})
	stream := tarOf(t, "d/", "", "d/f", "hello", "d/empty/", "", "link", "->d/f", "big", strings.Repeat("b", 1<<20))
	res, body := post(t, g, treeURL(g, "path", "~/new/er"), guestapi.TreeType, stream)
	var made guestapi.Tree
	if err := json.Unmarshal(body, &made); err != nil || res.StatusCode != 200 {
		t.Fatalf("%d %s", res.StatusCode, body)
	}
	want := guestapi.Tree{Path: g.Home + "/new/er", Report: tree.Report{Files: 3, Directories: 2, Bytes: 5 + 1<<20}}
	if made != want {
		t.Errorf("got %+v, want %+v", made, want)
	}
	if err := syscall.Mkfifo(g.Home+"/new/er/d/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := g.Client.Get(treeURL(g, "path", "new/er"))
	if err != nil || got.StatusCode != 200 || got.Header.Get("Content-Type") != guestapi.TreeType {
		t.Fatalf("%v, %v", got, err)
	}
	defer func() { _ = got.Body.Close() }() // read to its end
	dir, report, err := unpackInto(t, got.Body)
	if err != nil || report.Files != 3 || report.Directories != 3 || report.Skipped != 1 || report.FirstSkipped != "d/fifo" {
		t.Errorf("unpacked %+v, %v", report, err)
	}
	if to, err := os.Readlink(dir + "/link"); err != nil || to != "d/f" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	if data, err := os.ReadFile(dir + "/link"); err != nil || string(data) != "hello" {
		t.Errorf("the file has %q, %v", data, err)
	}
	for name, mode := range map[string]os.FileMode{"d": 0o750, "d/f": 0o640, "d/empty": 0o750} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
}

func TestWhatIsNoTree(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	write(t, g.Home+"/f", "x")
	for path, want := range map[string]struct {
		status int
		text   string
	}{
		"f": {400, "f is a file, not a directory"}, "missing": {404, "missing does not exist"}, "": {400, "path"}, "/dev/null": {400, "a character device"},
	} {
		res, body := get(t, g.Client, treeURL(g, "path", path))
		wantError(t, path, res, body, want.status, want.text)
	}
	res, body := get(t, g.Client, treeURL(g, "path", ".", "username", "nobody-knows"))
	wantError(t, "unknown user", res, body, 401, "invalid username")
	if err := os.Mkdir(g.Home+"/isdir", 0o755); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		path, contentType string
		body              io.Reader
		status            int
		text              string
	}{
		"onto a file":             {"f", guestapi.TreeType, tarOf(t), 409, "f is a file, not a directory"},
		"below a file":            {"f/g", guestapi.TreeType, tarOf(t), 409, "not a directory"},
		"another type":            {"d", octets, tarOf(t), 415, guestapi.TreeType},
		"no tar":                  {"d", guestapi.TreeType, strings.NewReader(strings.Repeat("no", 600)), 400, "not a tar stream"},
		"a part":                  {"d", guestapi.TreeType, bytes.NewReader(tarOf(t, "a", "b").Bytes()[:1024]), 400, "cut off"},
		"names that lead up":      {"d", guestapi.TreeType, tarOf(t, "../f", "evil"), 400, `"../f": the name leads upwards`},
		"through a link":          {"d", guestapi.TreeType, tarOf(t, "l", "->..", "l/f", "evil"), 409, `"l/f": "l" is a symbolic link`},
		"a file on a directory":   {".", guestapi.TreeType, tarOf(t, "isdir", "x"), 409, `"isdir": a directory is in its place`},
		"a directory on a file":   {".", guestapi.TreeType, tarOf(t, "f/", ""), 409, `"f" is a file there`},
		"control characters, too": {"d", guestapi.TreeType, tarOf(t, "/a\x1bb", "evil"), 400, `"/a\x1bb"`},
	} {
		res, body := post(t, g, treeURL(g, "path", tt.path), tt.contentType, tt.body)
		wantError(t, name, res, body, tt.status, tt.text)
	}
	if data, err := os.ReadFile(g.Home + "/f"); err != nil || string(data) != "x" {
		t.Errorf("the file has %q, %v", data, err)
	}
	res, body = post(t, g, strings.Replace(treeURL(g, "path", "d"), "?", "?x=y&", 1), guestapi.TreeType, tarOf(t))
	if res.StatusCode != 200 {
		t.Errorf("an empty tree: %d %s", res.StatusCode, body)
	}
}

func TestTreeTakesTokenOrSignature(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{Token: "secret"})
	anybody := &http.Client{}
	sign := func(operation string) string {
		return guestapi.FileSignature{Path: ".", Operation: operation}.Sign("secret")
	}
	for operation, status := range map[string]int{guestapi.TreeRead: 200, guestapi.FileRead: 401, guestapi.TreeWrite: 401} {
		if res, body := get(t, anybody, treeURL(g, "path", ".", "signature", sign(operation))); res.StatusCode != status {
			t.Errorf("%s: %d %s", operation, res.StatusCode, body)
		}
	}
	for operation, status := range map[string]int{guestapi.TreeWrite: 200, guestapi.FileWrite: 401, guestapi.TreeRead: 401} {
		res, err := anybody.Post(treeURL(g, "path", ".", "signature", sign(operation)), guestapi.TreeType, tarOf(t))
		if err != nil {
			t.Fatal(err)
		}
		if body := readAll(t, res); res.StatusCode != status {
			t.Errorf("%s: %d %s", operation, res.StatusCode, body)
		}
	}
	if res, body := get(t, anybody, treeURL(g, "path", ".")); res.StatusCode != 401 {
		t.Errorf("nothing: %d %s", res.StatusCode, body)
	}
}

// TestTreeIsItsUsers: what is made belongs to the user, and what the user may not
// do is not done for him.
func TestTreeIsItsUsers(t *testing.T) {
	testkit.Root(t)
	g := guesttest.Start(t, guesttest.Options{})
	for d := g.Home; d != "/" && d != "/tmp"; d = filepath.Dir(d) { // other passes through
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	theirs := g.Home + "/theirs"
	if err := errors.Join(os.Mkdir(theirs, 0o755), os.Chown(theirs, 12345, 12345), os.MkdirAll(g.Home+"/ours/d", 0o755)); err != nil {
		t.Fatal(err)
	}
	write(t, g.Home+"/ours/d/secret", "root's")
	if err := errors.Join(os.Chmod(g.Home+"/ours/d/secret", 0o600), os.Symlink(g.Home+"/ours", theirs+"/door")); err != nil {
		t.Fatal(err)
	}
	res, body := post(t, g, treeURL(g, "path", theirs+"/a/b", "username", "other"), guestapi.TreeType, tarOf(t, "d/", "", "d/f", "x", "l", "->f"))
	if res.StatusCode != 200 {
		t.Fatalf("%d %s", res.StatusCode, body)
	}
	for _, path := range []string{"a", "a/b", "a/b/d", "a/b/d/f", "a/b/l"} {
		info, err := os.Lstat(theirs + "/" + path)
		if err != nil || info.Sys().(*syscall.Stat_t).Uid != 12345 || info.Sys().(*syscall.Stat_t).Gid != 12345 {
			t.Errorf("%s belongs to %+v, %v", path, info.Sys(), err)
		}
	}
	for _, path := range []string{g.Home + "/ours", theirs + "/door/d", g.Home + "/ours/new"} {
		res, body := post(t, g, treeURL(g, "path", path, "username", "other"), guestapi.TreeType, tarOf(t, "f", "evil"))
		wantError(t, path, res, body, 403, "permission denied")
	}
	res, err := g.Client.Get(treeURL(g, "path", theirs+"/door", "username", "other"))
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("%v, %v", res, err)
	}
	defer func() { _ = res.Body.Close() }() // broken
	stream, err := io.ReadAll(res.Body)
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a stream with something unreadable in it ends with %v", err)
	}
	if _, _, err := unpackInto(t, bytes.NewReader(stream)); !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), `"d/secret": open: permission denied`) {
		t.Errorf("it says %v", err)
	}
	if bytes.Contains(stream, []byte("root's")) {
		t.Error("it has what the user may not read")
	}
}

// TestATreeWhoseSenderDies: the connection breaks in the middle of a file. What is
// not whole is not there, and nothing of it stays.
func TestATreeWhoseSenderDies(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	done := g.Watch(t, 4<<20)
	stream := tarOf(t, "d/", "", "d/first", "1", "d/second", strings.Repeat("2", 1<<20)).Bytes()
	u, err := url.Parse(g.URL)
	if err != nil {
		t.Fatal(err)
	}
	for _, cut := range []int{512, 1024, 2048, 2048 + 300<<10, len(stream) - 1024} {
		c, err := net.Dial("tcp", u.Host)
		if err != nil {
			t.Fatal(err)
		}
		dir := fmt.Sprintf("cut%d", cut)
		if _, err := fmt.Fprintf(c, "POST %s?path=%s HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n",
			guestapi.PathTree, dir, guestapi.TreeType, cut, stream[:cut]); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		testkit.Eventually(t, 10*time.Second, "given up", func() bool {
			names, _ := filepath.Glob(g.Home + "/" + dir + "/d/*")
			left, _ := filepath.Glob(g.Home + "/" + dir + "/d/.dormouse-*")
			want := 0
			if cut >= 2048 {
				want = 1
			}
			if cut >= len(stream)-1024 {
				want = 2
			}
			return len(names) == want && len(left) == 0
		})
	}
	done()
}

// TestATreeWhoseReaderLeaves: the agent does not go on for nobody.
func TestATreeWhoseReaderLeaves(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	if err := os.WriteFile(g.Home+"/big", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(g.Home+"/big", 1<<40); err != nil { // nobody waits for all of it
		t.Fatal(err)
	}
	done := g.Watch(t, 4<<20)
	res, err := g.Client.Get(treeURL(g, "path", "."))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, res.Body, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := res.Body.Close(); err != nil {
		t.Fatal(err)
	}
	done()
}

// TestATreeIsWrittenOnce: to watchers the files of a tree are uploads.
func TestATreeIsWrittenOnce(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	write(t, g.Home+"/old", "x")
	w := watchDir(t, g, &filesystemv1.WatchDirRequest{Path: "~"})
	res, body := post(t, g, treeURL(g, "path", "~"), guestapi.TreeType, tarOf(t, "new", "y", "old", "z", "link", "->old", "last", ""))
	if res.StatusCode != 200 {
		t.Fatalf("%d %s", res.StatusCode, body)
	}
	got := map[string]int{}
	for got["write last"] == 0 {
		got[describe(w.next(t))]++
	}
	// A link is there at once, and gets its time then.
	want := map[string]int{"create new": 1, "write new": 1, "write old": 1, "create link": 1, "chmod link": 1, "create last": 1, "write last": 1}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
