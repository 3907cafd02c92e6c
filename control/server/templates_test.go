package server_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/control/hostfake"
	"github.com/dormouse-sandbox/dormouse/control/server"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// log collects what a build tells.
type buildLog struct{ lines []string }

func (l *buildLog) news(e api.BuildEvent) {
	if e.Line != "" {
		l.lines = append(l.lines, e.Step+"| "+e.Line)
	}
}

func TestBuildTemplateStreamsItsLog(t *testing.T) {
	r := newRig(t)
	upload := bytes.Repeat([]byte("x"), 3<<20)
	for _, tt := range []struct {
		name   string
		req    api.BuildTemplate
		upload io.Reader
		want   string
	}{
		{
			"a Dockerfile",
			api.BuildTemplate{Name: "a", Args: map[string]string{"V": "1"}},
			bytes.NewReader(upload),
			`step 1 of 2: COPY . .| dockerfile "", 3145728 bytes, arguments map[V:1], registry user ""`,
		},
		{
			"an archive",
			api.BuildTemplate{Name: "b", Source: api.SourceArchive, Image: "x:1"},
			bytes.NewReader(upload[:10]),
			`step 1 of 2: COPY . .| archive "x:1", 10 bytes, arguments map[], registry user ""`,
		},
		{
			"packages",
			api.BuildTemplate{Name: "d", Suite: "trixie", Packages: []string{"git", "g++"}},
			nil,
			`step 1 of 2: COPY . .| packages "trixie[git g++]", 0 bytes, arguments map[], registry user ""`,
		},
		{"an image of a registry", api.BuildTemplate{
			Name: "c", Image: "registry.example/x", Registries: map[string]api.RegistryLogin{"registry.example": {Username: "me", Password: "secret"}},
		}, nil, `step 1 of 2: COPY . .| image "registry.example/x", 0 bytes, arguments map[], registry user "me"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var l buildLog
			made, err := r.c.BuildTemplate(t.Context(), tt.req, tt.upload, l.news)
			if err != nil {
				t.Fatal(err)
			}
			if made.Name != tt.req.Name || made.Digest != "sha256:new" || made.Start[0] != "/app" || made.ExposedPorts[0] != "80/tcp" {
				t.Errorf("template: %+v", made)
			}
			want := &api.Healthcheck{Test: []string{"CMD", "/ok"}, IntervalSeconds: 1.5, Retries: 4}
			if diff := cmp.Diff(want, made.Healthcheck); diff != "" {
				t.Error(diff)
			}
			if len(l.lines) != 2 || l.lines[0] != tt.want || l.lines[1] != "step 2 of 2: RUN make| making" {
				t.Errorf("log: %q", l.lines)
			}
		})
	}
	got, err := r.c.Template(t.Context(), "b")
	if err != nil || got.Name != "b" || got.Source != "archive" {
		t.Errorf("%+v, %v", got, err)
	}
	if log, err := r.c.TemplateLog(t.Context(), "b"); err != nil || log != "the log of b\n" {
		t.Errorf("%q, %v", log, err)
	}
	for _, ask := range []func(string) error{
		func(name string) error { _, err := r.c.Template(t.Context(), name); return err },
		func(name string) error { _, err := r.c.TemplateLog(t.Context(), name); return err },
	} {
		if err := ask("nonesuch"); !sandbox.Is(err, sandbox.KindNotFound) {
			t.Errorf("a template that is not there: %v", err)
		}
		if err := ask("../x"); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("a name that is none: %v", err)
		}
	}
	list, err := r.c.Templates(t.Context())
	if err != nil || len(list) != 5 {
		t.Errorf("%+v, %v", list, err)
	}
	if err := r.c.DeleteTemplate(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	if err := r.c.DeleteTemplate(t.Context(), "a"); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("a second delete: %v", err)
	}
	if err := r.c.DeleteTemplate(t.Context(), hostfake.UsedTemplate); !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), "abc") {
		t.Errorf("delete of what is in use: %v", err)
	}
}

func TestFailedBuildNamesItsStep(t *testing.T) {
	r := newRig(t)
	var l buildLog
	_, err := r.c.BuildTemplate(t.Context(), api.BuildTemplate{Name: hostfake.FailingTemplate}, strings.NewReader("x"), l.news)
	var e *client.Error
	if !errors.As(err, &e) || e.Kind != sandbox.KindInvalid || e.Step != "step 2 of 2: RUN make" || !strings.Contains(e.Message, "exit status 2") || len(l.lines) != 2 {
		t.Errorf("%+v, log %q", err, l.lines)
	}
}

func TestBuildEndsWithItsClient(t *testing.T) {
	for name, leave := range map[string]func(r *rig, cancel func()){
		"the client goes away":   func(_ *rig, cancel func()) { cancel() },
		"the server is stopping": func(r *rig, _ func()) { go r.stop() },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			running, done := make(chan struct{}), make(chan error, 1)
			go func() {
				_, err := r.c.BuildTemplate(ctx, api.BuildTemplate{Name: hostfake.EndlessTemplate}, strings.NewReader("x"), func(e api.BuildEvent) {
					if e.Line == "making" {
						close(running)
					}
				})
				done <- err
			}()
			<-running
			leave(r, cancel)
			if err := <-done; err == nil {
				t.Error("no error")
			}
			testkit.Eventually(t, limit, "ended on the host", func() bool { return r.host.Builds() == 0 })
		})
	}
}

func TestBuildEndsWithItsKey(t *testing.T) {
	r := newRig(t, func(c *server.Config) { c.KeyCheck = 10 * time.Millisecond })
	made, err := r.c.CreateKey(t.Context(), "other")
	if err != nil {
		t.Fatal(err)
	}
	running, done := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := r.client(made.Secret).BuildTemplate(t.Context(), api.BuildTemplate{Name: hostfake.EndlessTemplate}, strings.NewReader("x"), func(e api.BuildEvent) {
			if e.Line == "making" {
				close(running)
			}
		})
		done <- err
	}()
	<-running
	if err := r.c.DeleteKey(t.Context(), made.ID); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !sandbox.Is(err, sandbox.KindUnauthorized) {
		t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
	}
	testkit.Eventually(t, limit, "ended on the host", func() bool { return r.host.Builds() == 0 })
}

// A long silence is no reason for a proxy to hang up.
func TestSilentBuildShowsThatItLives(t *testing.T) {
	r := newRig(t, func(c *server.Config) { c.KeepAlive = 10 * time.Millisecond })
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	empty := 0
	_, err := r.c.BuildTemplate(ctx, api.BuildTemplate{Name: hostfake.EndlessTemplate}, strings.NewReader("x"), func(e api.BuildEvent) {
		if e == (api.BuildEvent{}) {
			if empty++; empty == 3 {
				cancel()
			}
		}
	})
	if err == nil || empty < 3 {
		t.Errorf("%d signs of life, %v", empty, err)
	}
}

// TestConnectionOutlivesABuild: whether it has succeeded, or failed at once or later,
// what else comes over its connection is answered.
func TestConnectionOutlivesABuild(t *testing.T) {
	r := newRig(t)
	r.host.SetHook(func(_ context.Context, method, name string) error {
		if method == "BuildTemplate" && name == "refused" {
			return sandbox.Errorf(sandbox.KindInvalid, "there is no such image")
		}
		return nil
	})
	for _, name := range []string{"refused", hostfake.FailingTemplate, "good"} {
		for what, upload := range map[string]string{"an image": "", "an upload": "x"} {
			t.Run(name+" "+what, func(t *testing.T) {
				transport := &http.Transport{MaxConnsPerHost: 1}
				defer transport.CloseIdleConnections()
				c, err := client.New(client.Config{BaseURL: r.http.URL, Key: r.key, HTTPClient: &http.Client{Transport: transport}})
				if err != nil {
					t.Fatal(err)
				}
				var body io.Reader
				req := api.BuildTemplate{Name: name, Image: "x"}
				if upload != "" {
					body, req.Source = strings.NewReader(upload), api.SourceRootFS
				}
				if _, err := c.BuildTemplate(t.Context(), req, body, nil); (err == nil) != (name == "good") {
					t.Errorf("build: %v", err)
				}
				for range 3 {
					if _, err := c.Templates(t.Context()); err != nil {
						t.Errorf("afterwards: %v", err)
					}
				}
			})
		}
	}
}

func TestUploadThatBreaksOffBuildsNothing(t *testing.T) {
	r := newRig(t)
	_, err := r.c.BuildTemplate(t.Context(), api.BuildTemplate{Name: "cut"}, io.MultiReader(strings.NewReader("half"), failing{}), nil)
	if err == nil {
		t.Error("no error")
	}
	testkit.Eventually(t, limit, "ended on the host", func() bool { return r.host.Builds() == 0 })
	list, err := r.c.Templates(t.Context())
	if err != nil || len(list) != 1 {
		t.Errorf("%+v, %v", list, err)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("the disk is gone") }

func TestBadBuildRequests(t *testing.T) {
	r := newRig(t)
	form := func(parts ...string) string {
		text := ""
		for i := 0; i < len(parts); i += 2 {
			text += "--b\r\nContent-Disposition: form-data; name=\"" + parts[i] + "\"\r\n\r\n" + parts[i+1] + "\r\n"
		}
		return text + "--b--\r\n"
	}
	const multi = "multipart/form-data; boundary=b"
	for _, tt := range []struct {
		name, contentType, body, says string
		status                        int
	}{
		{"no name", "application/json", `{"image":"x"}`, "template", 400},
		{"a name that is a path", "application/json", `{"name":"../x","image":"x"}`, "template", 400},
		{"an unknown field", "application/json", `{"name":"x","imag":"x"}`, "unknown field", 400},
		{"an upload as JSON", "application/json", `{"name":"x","source":"dockerfile"}`, "multipart/form-data", 400},
		{"an image as an upload", multi, form("request", `{"name":"x","source":"image"}`, "upload", "x"), "without an upload", 400},
		{"packages as an upload", multi, form("request", `{"name":"x","source":"packages"}`, "upload", "x"), "without an upload", 400},
		{"a package that is an option", "application/json", `{"name":"x","packages":["--simulate"]}`, "--simulate", 400},
		{"a suite that is a path", "application/json", `{"name":"x","suite":"../x","packages":["git"]}`, "suite", 400},
		{"too many packages", "application/json", `{"name":"x","packages":["git"` + strings.Repeat(`,"git"`, 500) + `]}`, "501 packages", 400},
		{"a negative size", "application/json", `{"name":"x","image":"y","image_mib":-1}`, "image_mib is -1", 400},
		{"no request", multi, form("upload", "x"), `first part of the body must be`, 400},
		{"no upload", multi, form("request", `{"name":"x"}`), `second part of the body must be`, 400},
		{"another part", multi, form("request", `{"name":"x"}`, "file", "x"), `second part of the body must be`, 400},
		{"a request that is too large", multi, form("request", strings.Repeat(" ", 2<<20)), "larger than", 413},
		{"no boundary", "multipart/form-data", "x", "read body", 400},
		{"another media type", "text/plain", "x", "content type", 415},
		{"an upload that is cut off", multi, "--b\r\nContent-Disposition: form-data; name=\"request\"\r\n\r\n{\"name\":\"x\"}\r\n--b\r\nContent-Disposition: form-data; name=\"upload\"\r\n\r\nhalf", "read body", 400},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, r.http.URL+"/v1/templates", strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer "+r.key)
			req.Header.Set("Content-Type", tt.contentType)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }() // read only
			text, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != tt.status || !strings.Contains(string(text), tt.says) {
				t.Errorf("%s: %s, %v", resp.Status, text, err)
			}
		})
	}
	testkit.Eventually(t, limit, "ended on the host", func() bool { return r.host.Builds() == 0 })
}
