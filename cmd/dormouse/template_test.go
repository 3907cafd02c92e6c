package main

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// fakeBuild is what a build was asked for, and the names in its upload.
type fakeBuild struct {
	req    api.BuildTemplate
	names  []string
	upload string // where it is no tar file
}

// buildTemplate answers with a log; a template named "failing" fails.
func (f *fakeServer) buildTemplate(w http.ResponseWriter, r *http.Request) {
	b, err := readBuild(r)
	if err != nil {
		refuse(w, sandbox.KindInvalid, err.Error())
		return
	}
	f.mu.Lock()
	f.built = b
	f.mu.Unlock()
	writeJSON(w, api.BuildEvent{Step: "step 1 of 1: RUN make", Line: "one\x1b[31m"})
	writeJSON(w, api.BuildEvent{})
	writeJSON(w, api.BuildEvent{Step: "step 1 of 1: RUN make", Line: "two"})
	if b.req.Name == "failing" {
		writeJSON(w, api.BuildEvent{Error: &api.ErrorDetail{Code: "invalid", Message: "step 1 of 1: RUN make (line 2): exit status 2", Step: "step 1 of 1: RUN make"}})
		return
	}
	writeJSON(w, api.BuildEvent{Template: &api.Template{Name: b.req.Name, Digest: "d"}})
}

func readBuild(r *http.Request) (b fakeBuild, err error) {
	if media, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")); media == "application/json" {
		return b, json.NewDecoder(r.Body).Decode(&b.req)
	}
	parts, err := r.MultipartReader()
	if err != nil {
		return b, err
	}
	part, err := parts.NextPart()
	if err != nil {
		return b, err
	}
	if err := json.NewDecoder(part).Decode(&b.req); err != nil {
		return b, err
	}
	if part, err = parts.NextPart(); err != nil {
		return b, err
	}
	if b.req.Source != api.SourceDockerfile {
		data, err := io.ReadAll(part)
		b.upload = string(data)
		return b, err
	}
	for t := tar.NewReader(part); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			slices.Sort(b.names)
			return b, nil
		}
		if err != nil {
			return b, err
		}
		b.names = append(b.names, h.Name)
	}
}

// folder makes files in a folder named app.
func folder(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "app")
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestTemplateBuildSendsTheContext(t *testing.T) {
	f := newFake(t)
	dir := folder(t, map[string]string{
		"Dockerfile": "FROM x", ".dockerignore": "*.log\nsecret\n!secret/keep\nDockerfile\n", "main.go": "x", "a.log": "x", "secret/key": "x", "secret/keep": "x", "sub/b": "x",
	})
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	got := ask(t, "template", "build", dir, "--build-arg", "A=b=c", "--target", "x", "--size", "2GiB")
	if got.code != 0 || got.out != "app\n" || got.errOut != "step 1 of 1: RUN make\n  one [31m\n  two\n" {
		t.Errorf("exit status %d, %q, %q", got.code, got.out, got.errOut)
	}
	if r := f.built.req; r.Name != "app" || r.Source != "dockerfile" || r.Dockerfile != "Dockerfile" || r.Args["A"] != "b=c" || r.Target != "x" || r.ImageMiB != 2048 {
		t.Errorf("request: %+v", r)
	}
	if names := strings.Join(f.built.names, " "); names != ".dockerignore Dockerfile link main.go secret/keep sub/ sub/b" {
		t.Errorf("sent: %s", names)
	}
	other := folder(t, map[string]string{"d/File": "FROM x", ".dockerignore": "*"})
	if got := ask(t, "template", "build", other, "-f", "d/File", "-t", "y", "--json"); got.code != 0 || !strings.Contains(got.out, `"digest": "d"`) {
		t.Errorf("exit status %d, %q, %q", got.code, got.out, got.errOut)
	}
	if names := strings.Join(f.built.names, " "); names != ".dockerignore d/File" || f.built.req.Dockerfile != "d/File" {
		t.Errorf("sent: %s", names)
	}
}

func TestTemplateBuildFromOtherSources(t *testing.T) {
	f := newFake(t)
	file := filepath.Join(t.TempDir(), "x.tar")
	if err := os.WriteFile(file, []byte("archive"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args   []string
		want   api.BuildTemplate
		upload string
	}{
		{[]string{"--image", "debian:12"}, api.BuildTemplate{Name: "x", Source: "image", Image: "debian:12"}, ""},
		{[]string{"--packages", "git,g++", "--packages", "curl", "--suite", "sid"}, api.BuildTemplate{
			Name: "x", Source: "packages", Suite: "sid", Packages: []string{"git", "g++", "curl"},
		}, ""},
		{[]string{"--archive", file, "--image", "a:1"}, api.BuildTemplate{Name: "x", Source: "archive", Image: "a:1"}, "archive"},
		{[]string{"--rootfs", file}, api.BuildTemplate{Name: "x", Source: "rootfs"}, "archive"},
	} {
		got := ask(t, append([]string{"template", "build", "-t", "x"}, tt.args...)...)
		r := f.built.req
		if got.code != 0 || r.Source != tt.want.Source || r.Image != tt.want.Image || r.Suite != tt.want.Suite || !slices.Equal(r.Packages, tt.want.Packages) || r.Name != "x" || f.built.upload != tt.upload {
			t.Errorf("%v: exit status %d, %q: %+v, %q", tt.args, got.code, got.errOut, r, f.built.upload)
		}
	}
}

// A password is read from standard input: arguments can be seen by others.
func TestTemplateBuildTakesThePasswordFromStandardInput(t *testing.T) {
	f := newFake(t)
	got := dormouse(t, t.Context(), strings.NewReader("s3cret\n"), "template", "build", "--image", "ghcr.io/a/b", "-t", "x",
		"--registry", "ghcr.io", "--username", "me", "--password-stdin")
	if login := f.built.req.Registries["ghcr.io"]; got.code != 0 || login.Username != "me" || login.Password != "s3cret" {
		t.Errorf("exit status %d, %q: %+v", got.code, got.errOut, f.built.req)
	}
}

func TestTemplateBuildErrors(t *testing.T) {
	newFake(t)
	dir := folder(t, map[string]string{"Dockerfile": "FROM x"})
	empty := folder(t, map[string]string{"x": ""})
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{dir, "-t", "failing"}, 2, "step 1 of 1: RUN make (line 2): exit status 2"},
		{[]string{}, 2, "give one source"},
		{[]string{dir, "--image", "x"}, 2, "give one source"},
		{[]string{"--rootfs", "x", "--archive", "y"}, 2, "give one source"},
		{[]string{"--packages", "git", "--image", "y"}, 2, "give one source"},
		{[]string{"--image", "y", "--suite", "sid", "-t", "x"}, 2, "--suite is for --packages"},
		{[]string{"--image", "x"}, 2, "--tag NAME"},
		{[]string{dir, "--build-arg", "A"}, 2, "NAME=VALUE"},
		{[]string{dir, "--username", "me"}, 2, "belong together"},
		{[]string{dir, "--password-stdin"}, 2, "belong together"},
		{[]string{empty}, 1, "the Dockerfile"},
	} {
		if got := ask(t, append([]string{"template", "build"}, tt.args...)...); got.code != tt.code || !strings.Contains(got.errOut, tt.says) || got.out != "" {
			t.Errorf("%v: exit status %d, %q, %q", tt.args, got.code, got.out, got.errOut)
		}
	}
}

func TestTemplateLsAndRm(t *testing.T) {
	newFake(t)
	for _, args := range [][]string{{"templates"}, {"template"}, {"template", "ls"}} {
		if got := ask(t, args...); got.code != 0 || !strings.Contains(got.out, "base") {
			t.Errorf("%v: exit status %d, %q", args, got.code, got.out)
		}
	}
	want := "name           app\nsize           3.0 MiB\nmin disk       1 GiB\n"
	if got := ask(t, "template", "get", "app"); got.code != 0 || !strings.Contains(got.out, "start          /bin/sh -c \"serve it\"\n") ||
		!strings.Contains(got.out, "  interval     1.5s\n  retries      4\n") || !strings.HasPrefix(got.out, want) {
		t.Errorf("get: exit status %d, %q", got.code, got.out)
	}
	if got := ask(t, "template", "get", "app", "--json"); got.code != 0 || !strings.Contains(got.out, `"interval_seconds": 1.5`) {
		t.Errorf("get --json: exit status %d, %q", got.code, got.out)
	}
	if got := ask(t, "template", "log", "app"); got.code != 0 || got.out != "make image\n  evil [31m\n" {
		t.Errorf("log: exit status %d, %q", got.code, got.out)
	}
	if got := ask(t, "template", "log", "other"); got.code != 3 {
		t.Errorf("log of one that is not there: exit status %d", got.code)
	}
	got := ask(t, "template", "rm", "used", "other")
	if got.code != 5 || got.out != "other\n" || !strings.Contains(got.errOut, "delete template used: ") || !strings.Contains(got.errOut, "abc") {
		t.Errorf("exit status %d, %q, %q", got.code, got.out, got.errOut)
	}
	if got := ask(t, "template", "rm"); got.code != 2 {
		t.Errorf("rm without a name: exit status %d", got.code)
	}
}
