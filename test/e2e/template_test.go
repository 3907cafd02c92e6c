package e2e_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/oci/ocitest"
)

// busybox is a root file system with nothing but busybox, as a tar file.
func busybox(t testing.TB) []byte {
	t.Helper()
	tree := []ocitest.Entry{ocitest.File("bin/busybox", testkit.StaticBusybox(t)).Moded(0o755), ocitest.File("etc/passwd", "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")}
	for _, applet := range []string{"sh", "cat", "id", "echo", "ls", "pwd", "chmod", "mkdir", "sleep", "httpd", "wget", "grep"} {
		tree = append(tree, ocitest.Link("bin/"+applet, "busybox"))
	}
	return ocitest.Tar(t, tree...)
}

// TestTemplates takes templates through the API from every source to a sandbox
// and away again.
func TestTemplates(t *testing.T) {
	w := shared(t)
	root := busybox(t)
	image := ocitest.ImageOf(root)
	image.Config = map[string]any{"Env": []string{"PATH=/bin", "FROM_IMAGE=yes"}, "User": "app", "Cmd": []string{"/bin/sh"}}
	blobs, manifest := image.Parts(t)
	ref := ocitest.NewRegistry(t).Push(t, "1", blobs, manifest, ocitest.Manifest)
	registry, _, _ := strings.Cut(ref, "/")
	login := map[string]api.RegistryLogin{registry: {Username: ocitest.User, Password: ocitest.Password}}
	context := ocitest.Gzip(t, ocitest.Tar(t, ocitest.File("hello", "hello\n"), ocitest.File("Dockerfile", "FROM "+ref+`
ARG WHO
COPY --chown=app hello /srv/
USER root
RUN echo "built for $WHO as $(id -un)" >/srv/built && cat /srv/hello
USER app
WORKDIR /srv
`)))
	for _, tt := range []struct {
		req         api.BuildTemplate
		upload      []byte
		shell, want string
		logged      string
	}{
		{api.BuildTemplate{Name: "e2e-rootfs", Source: api.SourceRootFS}, root, "id -un; pwd", "root\n/\n", "tar file is sha256:"},
		{api.BuildTemplate{Name: "e2e-archive", Source: api.SourceArchive}, ocitest.Pack(t, image.LayoutOf(t)), "id -un; echo $FROM_IMAGE", "app\nyes\n", "layer 1 of 1"},
		{api.BuildTemplate{Name: "e2e-image", Image: ref, Registries: login}, nil, "id -un; echo $FROM_IMAGE", "app\nyes\n", "is sha256:"},
		{
			api.BuildTemplate{Name: "e2e-dockerfile", Args: map[string]string{"WHO": w.Instance}, Registries: login},
			context,
			"id -un; pwd; cat built hello", "app\n/srv\nbuilt for " + w.Instance + " as root\nhello\n", "RUN echo \"built for $WHO as $(id -un)\" >/srv/built && cat /srv/hello| hello",
		},
	} {
		t.Run(tt.req.Name, func(t *testing.T) {
			w := w.in(t)
			log := w.buildTemplate(tt.req, tt.upload)
			if !strings.Contains(log, tt.logged) || strings.Contains(log, ocitest.Password) {
				t.Errorf("log:\n%s", log)
			}
			req := small()
			req.Template = tt.req.Name
			box := w.create(req)
			res, err := w.Client.Exec(within(t, time.Minute), box.ID, api.Exec{Shell: tt.shell})
			if err != nil || res.Stdout != tt.want {
				t.Errorf("%q, %v, want %q", res.Stdout, err, tt.want)
			}
			err = w.Client.DeleteTemplate(within(t, time.Minute), tt.req.Name)
			if !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), box.ID) {
				t.Errorf("delete of a template with a sandbox on it: %v", err)
			}
			if _, err := w.Client.Delete(within(t, time.Minute), box.ID); err != nil {
				t.Fatal(err)
			}
			if err := w.Client.DeleteTemplate(within(t, time.Minute), tt.req.Name); err != nil {
				t.Errorf("delete: %v", err)
			}
		})
	}
}

// buildTemplate builds one and returns its log.
func (w world) buildTemplate(req api.BuildTemplate, upload []byte) string {
	w.t.Helper()
	var log strings.Builder
	news := func(e api.BuildEvent) { log.WriteString(e.Step + "| " + e.Line + "\n") }
	var err error
	if upload == nil {
		_, err = w.Client.BuildTemplate(within(w.t, 5*time.Minute), req, nil, news)
	} else {
		_, err = w.Client.BuildTemplate(within(w.t, 5*time.Minute), req, bytes.NewReader(upload), news)
	}
	if err != nil {
		w.t.Fatalf("%v\n%s", err, log.String())
	}
	return log.String()
}

// TestFailedTemplateBuild: the error has the step and its output, and nothing is
// left: no template, no sandbox.
func TestFailedTemplateBuild(t *testing.T) {
	w := shared(t)
	context := ocitest.Tar(t, ocitest.File("root.tar", string(busybox(t))), ocitest.File("Dockerfile", "FROM scratch\nADD root.tar /\nARG WHO\nRUN echo $WHO; cat /nonesuch\n"))
	req := api.BuildTemplate{Name: "e2e-failing", Args: map[string]string{"WHO": "somebody"}}
	_, err := w.Client.BuildTemplate(within(t, 5*time.Minute), req, bytes.NewReader(context), nil)
	var e *client.Error
	if !errors.As(err, &e) || e.Kind != sandbox.KindInvalid || e.Step != "step 3 of 3: RUN echo $WHO; cat /nonesuch" ||
		!strings.Contains(e.Message, "(line 4): exit status 1; its output ends with:\nsomebody\ncat: can't open '/nonesuch'") {
		t.Errorf("%+v", err)
	}
	list, err := w.Client.Templates(within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	for _, tmpl := range list {
		if tmpl.Name == req.Name {
			t.Errorf("it is there: %+v", tmpl)
		}
	}
}

func TestTemplateCommandLine(t *testing.T) {
	w := shared(t)
	dir := filepath.Join(t.TempDir(), "cli-app")
	ocitest.Write(t, filepath.Join(dir, "root.tar"), busybox(t))
	ocitest.Write(t, filepath.Join(dir, "Dockerfile"), []byte("FROM scratch\nADD root.tar /\nRUN echo cooked >/cooked\n"))
	out, log, code := w.CLI("", "template", "build", dir)
	if code != 0 || out != "cli-app\n" || !strings.Contains(log, "step 2 of 2: RUN echo cooked >/cooked\n") || strings.Contains(log, "/work/") {
		t.Errorf("build: status %d, %s, log:\n%s", code, out, log)
	}
	if out := w.cli(0, "", "run", "cli-app", "--mem", "256MiB", "--", "cat", "/cooked"); !strings.Contains(out, "cooked\n") {
		t.Errorf("run: %s", out)
	}
	if out := w.cli(0, "", "template", "ls"); !strings.Contains(out, "cli-app") {
		t.Errorf("ls: %s", out)
	}
	if out := w.cli(0, "", "template", "rm", "cli-app"); !strings.Contains(out, "cli-app\n") {
		t.Errorf("rm: %s", out)
	}
}

// TestSecondBuildTakesCachedSteps: what has not changed is not done again, neither
// in a second build nor before a change in the middle.
func TestSecondBuildTakesCachedSteps(t *testing.T) {
	w := shared(t)
	root := string(busybox(t))
	// The cache is everybody's, and these steps are this run's.
	lines := []string{
		"FROM scratch", "ADD root.tar /", "ENV PATH=/bin RUN_OF=" + w.Instance,
		"RUN cat /proc/sys/kernel/random/uuid >/first", "RUN cat /proc/sys/kernel/random/uuid >/second", "COPY note /note",
	}
	build := func(name, note string, lines []string) (log string, content []string) {
		t.Helper()
		log = w.buildTemplate(api.BuildTemplate{Name: name}, ocitest.Tar(t,
			ocitest.File("root.tar", root), ocitest.File("note", note), ocitest.File("Dockerfile", strings.Join(lines, "\n")+"\n")))
		req := small()
		req.Template = name
		box := w.create(req)
		content = strings.Fields(w.sh(box.ID, "cat /first /second /note"))
		w.destroy(box.ID)
		if len(content) != 3 {
			t.Fatalf("in %s there is %q", name, content)
		}
		return log, content
	}
	done := func(log string, want ...string) {
		t.Helper()
		var got []string
		for line := range strings.Lines(log) {
			if step, ok := strings.CutSuffix(line, "| done before\n"); ok {
				_, what, _ := strings.Cut(step, ": ")
				got = append(got, what)
			}
		}
		if strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Errorf("done before: %q, want %q, log:\n%s", got, want, log)
		}
	}
	log, first := build("e2e-cache-1", "one", lines)
	done(log)
	log, same := build("e2e-cache-2", "one", lines)
	if strings.Contains(log, "step ") || strings.Join(same, " ") != strings.Join(first, " ") {
		t.Errorf("the same again has %q, and not %q, log:\n%s", same, first, log)
	}
	log, later := build("e2e-cache-3", "two", lines)
	done(log, lines[1], lines[2], lines[3], lines[4])
	if later[0] != first[0] || later[1] != first[1] || later[2] != "two" {
		t.Errorf("with another file at the end there is %q, before %q", later, first)
	}
	lines[4] = "RUN echo changed; cat /proc/sys/kernel/random/uuid >/second"
	log, middle := build("e2e-cache-4", "two", lines)
	done(log, lines[1], lines[2], lines[3])
	if middle[0] != first[0] || middle[1] == first[1] || middle[2] != "two" {
		t.Errorf("with another step in the middle there is %q, before %q", middle, first)
	}
}
