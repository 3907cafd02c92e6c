package template_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/template/oci"
	"github.com/dormouse-sandbox/dormouse/template/oci/ocitest"
)

// fakeRunner stands in for a microVM: it knows the shell lines "write FILE TEXT" and
// "pipe FILE", which it does with debugfs, "fail TEXT" and "break", after which the
// disk is no file system any more. As device-mapper does, it leaves a file beside the
// image, which says what that is: another step's image must not be there.
type fakeRunner struct {
	runs []template.RunStep
}

func (f *fakeRunner) Run(ctx context.Context, r template.RunStep) error {
	f.runs = append(f.runs, r)
	seal, err := os.OpenFile(r.Image+".seal", os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := seal.Close(); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "cp", "--sparse=always", r.Image, r.Result).CombinedOutput(); err != nil {
		return fmt.Errorf("cp: %w: %s", err, out)
	}
	if err := os.Chmod(r.Result, 0o600); err != nil {
		return err
	}
	verb, rest, _ := strings.Cut(r.Command[len(r.Command)-1], " ")
	switch verb {
	case "write":
		name, text, _ := strings.Cut(rest, " ")
		say(r, "writing "+name)
		return f.write(ctx, r, name, text)
	case "pipe":
		return edit(ctx, r, "cd "+filepath.Dir(rest)+"\nmknod "+filepath.Base(rest)+" p\n")
	case "fail":
		say(r, rest)
		return sandbox.Errorf(sandbox.KindInvalid, "exit status 7")
	case "break":
		return os.WriteFile(r.Result, make([]byte, 8192), 0o600)
	}
	return errors.New("the fake does not know " + verb)
}

// say prints a line, as the command does.
func say(r template.RunStep, line string) {
	_, _ = r.Output.Write([]byte(line + "\n")) // the log of a build never fails
}

func (f *fakeRunner) write(ctx context.Context, r template.RunStep, name, text string) error {
	file := r.Result + ".content"
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		return err
	}
	// The guest writes its name and its resolver whenever it starts.
	text = fmt.Sprintf("rm %s\nwrite %s %s\nrm /etc/hosts\nwrite %s /etc/hosts\nrm /etc/hostname\nwrite %s /etc/hostname\n", name, file, name, file, file)
	return errors.Join(edit(ctx, r, text), os.Remove(file))
}

// edit runs a script of debugfs.
func edit(ctx context.Context, r template.RunStep, text string) error {
	script := r.Result + ".script"
	if err := os.WriteFile(script, []byte(text), 0o644); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "/usr/sbin/debugfs", "-w", "-f", script, r.Result).CombinedOutput()
	if err != nil {
		return fmt.Errorf("debugfs: %w: %s", err, out)
	}
	return os.Remove(script)
}

// kitchen is a registry with an image to build upon, and a store.
type kitchen struct {
	t      *testing.T
	cfg    template.Config
	store  *template.Store
	base   string // a reference
	runner *fakeRunner
	creds  map[string]oci.Credentials
}

func newKitchen(t *testing.T) *kitchen {
	needImageTools(t)
	k := &kitchen{t: t, cfg: config(t), runner: &fakeRunner{}}
	k.store = open(t, k.cfg)
	blobs, manifest := app(t).Parts(t)
	k.base = ocitest.NewRegistry(t).Push(t, "1", blobs, manifest, ocitest.Manifest)
	host, _, _ := strings.Cut(k.base, "/")
	k.creds = map[string]oci.Credentials{host: {Username: ocitest.User, Password: ocitest.Password}}
	return k
}

// build builds from a Dockerfile, in which BASE is the image, and files beside it.
func (k *kitchen) build(text string, files ...ocitest.Entry) (template.Template, *news, error) {
	k.t.Helper()
	n := &news{}
	text = strings.ReplaceAll(text, "BASE", k.base)
	entries := append([]ocitest.Entry{ocitest.File("Dockerfile", text)}, files...)
	made, err := k.store.BuildDockerfile(k.t.Context(), template.Dockerfile{
		Name: "built", Context: bytes.NewReader(ocitest.Gzip(k.t, ocitest.Tar(k.t, entries...))), Credentials: k.creds, Runner: k.runner,
	}, n.event)
	return made, n, err
}

func (k *kitchen) must(text string, files ...ocitest.Entry) (template.Template, *news) {
	k.t.Helper()
	made, n, err := k.build(text, files...)
	if err != nil {
		k.t.Fatal(err)
	}
	fsck(k.t, made.Image)
	return made, n
}

// has asks a template's file system.
func (k *kitchen) has(made template.Template, pairs ...[2]string) {
	k.t.Helper()
	for _, p := range pairs {
		if got := debugfs(k.t, made.Image, p[0]); !strings.Contains(got, p[1]) {
			k.t.Errorf("%s: %q is not in\n%s", p[0], p[1], got)
		}
	}
}

func TestDockerfileBuildsATemplate(t *testing.T) {
	k := newKitchen(t)
	made, n := k.must(`FROM BASE
ENV MODE=test
WORKDIR /work
COPY --chown=app:www --chmod=750 main.txt ./bin/
RUN write /work/out built
USER 4000
ENTRYPOINT ["/bin/net"]
HEALTHCHECK CMD true
COPY sub /copied
`, ocitest.File("main.txt", "main\n"), ocitest.File("sub/a/b", "b\n"), ocitest.Link("sub/link", "a/b"))
	k.has(made,
		[2]string{"cat /work/out", "built"},
		[2]string{"stat /work/bin/main.txt", "Mode:  0750"}, [2]string{"stat /work/bin/main.txt", "User:  1500   Group:    33"},
		[2]string{"cat /copied/a/b", "b"}, [2]string{"stat /copied/link", `Fast link dest: "a/b"`},
		// What the base image has went through a disk and back.
		[2]string{"stat /bin/sh", "Mode:  04755"}, [2]string{"stat /srv/data", "User: 70000   Group: 80000"}, [2]string{"stat /srv/data", "Links: 2"},
		[2]string{"ea_list /srv/data", `user.colour (4) = "blue"`}, [2]string{"ea_list /bin/net", "security.capability (20)"},
		[2]string{"cat /etc/hosts", "127.0.0.1 localhost"}, [2]string{"cat /etc/passwd", "user4000:x:4000:0"},
	)
	if got := debugfs(t, made.Image, "cat /etc/hostname"); got != "" {
		t.Errorf("the name of the build is in the template: %q", got)
	}
	if made.DefaultUser != "user4000" || made.DefaultWorkdir != "/work" || made.Env["MODE"] != "test" || made.Env["PATH"] == "" ||
		strings.Join(made.Config.Start, " ") != "/bin/net" || made.Config.Healthcheck == nil || made.Source != "Dockerfile" {
		t.Errorf("template: %+v, %+v", made, made.Config)
	}
	r := k.runner.runs[0]
	if strings.Join(r.Command, "|") != "/bin/sh|-c|write /work/out built" || r.User != "app" || r.Workdir != "/work" || r.Env["MODE"] != "test" {
		t.Errorf("run: %+v", r)
	}
	if log := n.log(); !strings.Contains(log, "writing /work/out") || !strings.Contains(strings.Join(n.steps, "\n"), "step 4 of 8: RUN write /work/out built") {
		t.Errorf("steps %q, log:\n%s", n.steps, log)
	}
	noTemp(t, k.cfg)
}

// TestDockerfileSaysWhatIsLeftOut: of the context, of an image and of what a step
// has made, also when that is in the cache; what is too much to list is counted.
func TestDockerfileSaysWhatIsLeftOut(t *testing.T) {
	k := newKitchen(t)
	files := []ocitest.Entry{ocitest.File("a", "a")}
	for i := range 120 {
		files = append(files, ocitest.Device(fmt.Sprintf("nodes/%d", i)))
	}
	text := "FROM BASE\nRUN pipe /srv/pipe\nCOPY a /a\n"
	for _, text := range []string{text, text + "COPY a /b\n"} {
		_, n := k.must(text, files...)
		for _, want := range []string{"left out: device /nodes/0 ", "left out: 20 more", "left out: pipe /srv/pipe"} {
			if !strings.Contains(n.log(), want) {
				t.Errorf("it does not say %q:\n%s", want, n.log())
			}
		}
	}
	if len(k.runner.runs) != 1 {
		t.Errorf("%d runs", len(k.runner.runs))
	}
}

func TestDockerfileStepsAreDoneOnce(t *testing.T) {
	k := newKitchen(t)
	text := "FROM BASE\nARG V=1\nCOPY a /a\nRUN write /one $V\nRUN write /two x\nCOPY b /b\n"
	a, b := ocitest.File("a", "a"), ocitest.File("b", "b")
	first, _ := k.must(text, a, b)
	runs := func(want int, why string) {
		t.Helper()
		if len(k.runner.runs) != want {
			t.Errorf("%s: %d runs, want %d", why, len(k.runner.runs), want)
		}
	}
	runs(2, "the first build")
	again, n := k.must(text, a, b)
	runs(2, "the same again")
	if again.Digest != first.Digest || strings.Contains(strings.Join(n.steps, " "), "step") {
		t.Errorf("the same again: steps %v", n.steps)
	}
	touched := a
	touched.Time = touched.Time.AddDate(20, 0, 0)
	k.must(text, touched, b)
	runs(2, "a context with other times")
	later, n := k.must(text, a, ocitest.File("b", "other"))
	runs(2, "a change behind the last run")
	if !strings.Contains(n.log(), "done before") || !strings.Contains(debugfs(t, later.Image, "cat /one"), "$V") {
		t.Errorf("log: %s", n.log())
	}
	k.has(later, [2]string{"cat /b", "other"}, [2]string{"cat /two", "x"}, [2]string{"ea_list /bin/net", "security.capability"})
	k.must(strings.Replace(text, "/two x", "/two y", 1), a, b)
	runs(3, "a change of the last run")
	k.must(text, ocitest.File("a", "other"), b)
	runs(5, "a change of a file before both")
	k.must(text, a.Moded(0o755), b)
	runs(7, "a change of its mode")
	k.must(strings.Replace(text, "V=1", "V=2", 1), a, b)
	runs(9, "a change of an argument")
	if err := os.RemoveAll(k.cfg.Cache); err != nil {
		t.Fatal(err)
	}
	k.must(text+"ENV A=b\n", a, b)
	runs(11, "a cache that has vanished")
	noTemp(t, k.cfg)
}

func TestDockerfileStages(t *testing.T) {
	k := newKitchen(t)
	made, n := k.must(`FROM BASE AS build
RUN write /out made
FROM build AS more
RUN write /more made
FROM BASE AS unused
RUN fail
FROM scratch
COPY --from=build /out /srv/data /from/build/
COPY --from=more /more /out /
COPY --from=more /bin /bin
`)
	k.has(made, [2]string{"cat /from/build/out", "made"}, [2]string{"cat /from/build/data", "hello"}, [2]string{"stat /from/build/data", "User:     0"},
		[2]string{"cat /more", "made"}, [2]string{"ea_list /bin/net", "security.capability"}, [2]string{"stat /bin/sh", "Mode:  04755"},
		[2]string{"cat /etc/passwd", "root:x:0:0"})
	if len(k.runner.runs) != 2 || strings.Contains(n.log(), "fail") || made.DefaultUser != "root" {
		t.Errorf("%d runs, user %q", len(k.runner.runs), made.DefaultUser)
	}
}

func TestDockerfileContext(t *testing.T) {
	k := newKitchen(t)
	archive := ocitest.Gzip(t, ocitest.Tar(t, ocitest.Dir("x"), ocitest.File("x/y", "unpacked").Owned(7, 8), ocitest.Hard("x/z", "x/y")))
	made, _ := k.must(`FROM BASE
COPY . /all
COPY *.txt one/?/*.go /match/
ADD a.tgz /added/
ADD a.txz /xz/
ADD no.xz /xz/
COPY a.tgz /plain
COPY --exclude=**/*.go one /one/
COPY <<END /etc/note
hello
END
COPY a.txt /srv/link
`,
		ocitest.File(".dockerignore", "# remark\nsecret\n**/*.log\n!keep.log\nDockerfile\n"), ocitest.File("secret/key", "x"), ocitest.File("b.log", "x"),
		ocitest.File("keep.log", "x"), ocitest.File("deep/c.log", "x"), ocitest.File("a.txt", "a"), ocitest.File("b.txt", "b"),
		ocitest.File("one/1/x.go", "x"), ocitest.File("one/1/y.md", "y"), ocitest.File("a.tgz", string(archive)),
		ocitest.File("a.txz", string(ocitest.Xz(t, ocitest.Tar(t, ocitest.File("q", "from xz"))))), ocitest.File("no.xz", "\xfd7zXZ\x00 but it is not"),
		ocitest.Link("out", "/etc/passwd"), ocitest.File("suid", "x").Moded(0o4755).Owned(99, 99))
	k.has(made,
		[2]string{"ls -p /all", "/keep.log/"}, [2]string{"ls -p /match", "/a.txt/"}, [2]string{"ls -p /match", "/x.go/"},
		[2]string{"cat /xz/q", "from xz"}, [2]string{"cat /xz/no.xz", "but it is not"}, [2]string{"cat /added/x/y", "unpacked"}, [2]string{"stat /added/x/y", "User:     7"}, [2]string{"stat /added/x/z", "Links: 2"},
		[2]string{"stat /plain", "Type: regular"}, [2]string{"ls -p /one/1", "/y.md/"}, [2]string{"cat /etc/note", "hello"},
		[2]string{"stat /all/out", `"/etc/passwd"`}, [2]string{"stat /all/suid", "Mode:  04755"}, [2]string{"stat /all/suid", "User:     0"},
	)
	for request, not := range map[string]string{"ls -p /all": "/secret/ /b.log/ /Dockerfile/", "ls -p /all/deep": "/c.log/", "ls -p /one/1": "/x.go/"} {
		got := debugfs(t, made.Image, request)
		for name := range strings.FieldsSeq(not) {
			if strings.Contains(got, name) {
				t.Errorf("%s is in %s:\n%s", name, request, got)
			}
		}
	}
}

func TestDockerfileFailures(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		files      []ocitest.Entry
		kind       sandbox.Kind
		says       []string
	}{
		{
			"a command that fails", "FROM BASE\nENV A=b\nRUN write /x y\nRUN fail no such compiler", nil, sandbox.KindInvalid,
			[]string{"step 3 of 3: RUN fail no such compiler (line 4): exit status 7", "its output ends with:\nno such compiler"},
		},
		{
			"a line for a shell that is not there", "FROM scratch\nCOPY a /a\nRUN fail",
			[]ocitest.Entry{ocitest.File("a", "")},
			sandbox.KindInvalid,
			[]string{"step 2 of 2: RUN fail (line 3): the image has no /bin/sh, with which", `RUN ["program", "argument"]`},
		},
		{
			"another shell that is not there", "FROM BASE\nSHELL [\"/bin/zsh\", \"-c\"]\nRUN fail", nil, sandbox.KindInvalid,
			[]string{"the image has no /bin/zsh, with which"},
		},
		{"a program that is not there", "FROM BASE\nRUN [\"/bin/nothing\"]", nil, sandbox.KindInvalid, []string{"(line 2): the image has no /bin/nothing"}},
		{"a disk that is broken by its command", "FROM BASE\nRUN break", nil, sandbox.KindInvalid, []string{"step 1 of 1: RUN break", "not an ext4"}},
		{"a source that is not there", "FROM BASE\nCOPY nothing /", nil, sandbox.KindInvalid, []string{"line 2, COPY nothing /", `"nothing" is not there`}},
		{"a source that is ignored", "FROM BASE\nCOPY a /", []ocitest.Entry{ocitest.File(".dockerignore", "*"), ocitest.File("a", "")}, sandbox.KindInvalid, []string{"left out by .dockerignore"}},
		{"a source that leads up", "FROM BASE\nCOPY ../../../../etc/shadow /x", nil, sandbox.KindInvalid, []string{"is not there"}},
		{"a source through a link that leads up", "FROM BASE\nCOPY link/shadow /x", []ocitest.Entry{ocitest.Link("link", "/etc")}, sandbox.KindInvalid, []string{"is not there"}},
		{"a context that leads up", "FROM BASE", []ocitest.Entry{ocitest.File("../../x", "")}, sandbox.KindInvalid, []string{"read context", "leads upwards"}},
		{"a destination that is a file", "FROM BASE\nCOPY a b /bin/sh/", []ocitest.Entry{ocitest.File("a", ""), ocitest.File("b", "")}, sandbox.KindInvalid, []string{"step 1 of 1", "is a file, not a directory"}},
		{"a file in place of a directory", "FROM BASE\nCOPY d /", []ocitest.Entry{ocitest.File("d/srv", "")}, sandbox.KindInvalid, []string{"/srv is a directory, and a file is to take its place"}},
		{"a directory in place of a file", "FROM BASE\nCOPY d /", []ocitest.Entry{ocitest.File("d/bin/sh/x", "")}, sandbox.KindInvalid, []string{"/bin/sh is a file, and a directory is to take its place"}},
		{"an owner that is not there", "FROM BASE\nCOPY --chown=nobody a /", []ocitest.Entry{ocitest.File("a", "")}, sandbox.KindInvalid, []string{"--chown=nobody: the user is not in /etc/passwd"}},
		{"a mode that is none", "FROM BASE\nCOPY --chmod=u+x a /", []ocitest.Entry{ocitest.File("a", "")}, sandbox.KindInvalid, []string{"must be octal"}},
		{"a user that is not there", "FROM BASE\nUSER nobody\nRUN write /x y", nil, sandbox.KindInvalid, []string{"step 2 of 2: RUN write /x y", `the user "nobody"`}},
		{"no Dockerfile language", "FROM BASE\nRUM true", nil, sandbox.KindInvalid, []string{"unknown instruction: RUM"}},
		{"an archive that leads up", "FROM BASE\nADD a.tar /x/", []ocitest.Entry{ocitest.File("a.tar", string(ocitest.Tar(t, ocitest.File("../../y", ""))))}, sandbox.KindInvalid, []string{"leads upwards"}},
		{"an image that is not there", "FROM BASEx", nil, sandbox.KindNotFound, []string{"line 1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := newKitchen(t)
			_, _, err := k.build(tt.text, tt.files...)
			if !sandbox.Is(err, tt.kind) {
				t.Fatalf("error of kind %s: %v", sandbox.KindOf(err), err)
			}
			for _, says := range tt.says {
				if !strings.Contains(err.Error(), says) {
					t.Errorf("%q is not in: %v", says, err)
				}
			}
			nothingLeft(t, k.cfg)
		})
	}
}

func TestDockerfileNeedsARunnerForRun(t *testing.T) {
	k := newKitchen(t)
	text := ocitest.Tar(t, ocitest.File("Dockerfile", "FROM scratch\nRUN true"))
	_, err := k.store.BuildDockerfile(t.Context(), template.Dockerfile{Name: "x", Context: bytes.NewReader(text)}, nil)
	if !sandbox.Is(err, sandbox.KindUnsupported) || !strings.Contains(err.Error(), "nothing here can run commands") {
		t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
	}
	_, err = k.store.BuildDockerfile(t.Context(), template.Dockerfile{Name: "x", Context: bytes.NewReader(text), File: "other"}, nil)
	if !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), `there is no "other" in it`) {
		t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
	}
}

// TestDirtyDiskIsWrittenBack: a VM that was switched off leaves a journal.
func TestDirtyDiskIsWrittenBack(t *testing.T) {
	k := newKitchen(t)
	dirty := &dirtyRunner{fakeRunner: k.runner, t: t}
	tarFile := ocitest.Tar(t, ocitest.File("Dockerfile", "FROM "+k.base+"\nRUN write /x y\n"))
	made, err := k.store.BuildDockerfile(t.Context(), template.Dockerfile{
		Name: "built", Context: bytes.NewReader(tarFile), Credentials: k.creds, Runner: dirty,
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	k.has(made, [2]string{"cat /x", "y"})
	if !dirty.was {
		t.Error("the disk was not dirty")
	}
	if found, _ := filepath.Glob(filepath.Join(k.cfg.Cache, "step/*/disk.ext4")); len(found) != 1 {
		t.Errorf("the step is not cached: %v", found)
	}
}

// dirtyRunner sets the flag that says so, as mounting does.
type dirtyRunner struct {
	*fakeRunner
	t   *testing.T
	was bool
}

func (d *dirtyRunner) Run(ctx context.Context, r template.RunStep) error {
	if err := d.fakeRunner.Run(ctx, r); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "/usr/sbin/debugfs", "-w", "-R", "feature needs_recovery", r.Result).CombinedOutput()
	d.was = strings.Contains(string(out), "needs_recovery")
	return err
}
