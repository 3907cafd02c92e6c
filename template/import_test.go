package template_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/template/oci"
	"github.com/dormouse-sandbox/dormouse/template/oci/ocitest"
)

// news collects what a build tells.
type news struct {
	steps []string
	lines []string
}

func (n *news) event(e template.Event) {
	if len(n.steps) == 0 || n.steps[len(n.steps)-1] != e.Step {
		n.steps = append(n.steps, e.Step)
	}
	if e.Line != "" {
		n.lines = append(n.lines, e.Line)
	}
}

func (n *news) log() string { return strings.Join(n.lines, "\n") }

func needImageTools(t *testing.T) {
	t.Helper()
	testkit.Root(t)
	for _, tool := range []string{"/usr/sbin/mke2fs", "/usr/sbin/debugfs"} {
		_, err := os.Stat(tool)
		testkit.Require(t, "e2fsprogs", err == nil, tool+" does not exist")
	}
}

// app is an image with what is easily lost on the way to a file system.
func app(t *testing.T) *ocitest.Image {
	t.Helper()
	i := ocitest.ImageOf(
		ocitest.Tar(t, ocitest.Dir("etc"), ocitest.File("etc/passwd", "root:x:0:0::/root:/bin/sh\napp:x:1500:1500::/home/app:/bin/sh\n"),
			ocitest.File("etc/group", "root:x:0:\nwww:x:33:app\n"), ocitest.File("etc/machine-id", "0123456789abcdef\n"),
			ocitest.File("bin/sh", "x").Moded(0o4755), ocitest.File("gone", "x")),
		ocitest.Tar(t, ocitest.File(".wh.gone", ""), ocitest.File("srv/data", "hello\n").Owned(70_000, 80_000).Attr("user.colour", "blue"),
			ocitest.Hard("srv/other", "srv/data"), ocitest.Link("srv/link", "/srv/data").Owned(3, 4), ocitest.Device("dev/null"),
			ocitest.File("bin/net", "x").Moded(0o755).Attr("security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")),
	)
	i.Config = map[string]any{
		"Env": []string{"PATH=/usr/bin:/bin", "MODE=prod"}, "User": "app", "WorkingDir": "/srv/work",
		"Entrypoint": []string{"/bin/net"}, "Cmd": []string{"-p", "80"}, "ExposedPorts": map[string]any{"80/tcp": struct{}{}},
		"Labels": map[string]string{"a": "b"}, "Healthcheck": map[string]any{"Test": []string{"CMD-SHELL", "true"}, "Interval": 1_000_000_000},
	}
	return i
}

func importFrom(t *testing.T, s *template.Store, name string, from template.Source) (template.Template, *news) {
	t.Helper()
	n := &news{}
	made, err := s.Import(t.Context(), template.Import{Name: name, From: from}, n.event)
	if err != nil {
		t.Fatal(err)
	}
	return made, n
}

func TestImportKeepsWhatAnImageIs(t *testing.T) {
	needImageTools(t)
	cfg := config(t)
	s := open(t, cfg)
	made, n := importFrom(t, s, "app", template.Layout{Dir: app(t).LayoutOf(t)})
	fsck(t, made.Image)
	for _, tt := range []struct{ request, want string }{
		{"stat /bin/sh", "Mode:  04755"},
		{"stat /srv/data", "User: 70000   Group: 80000"},
		{"stat /srv/data", "Links: 2"},
		{"stat /srv/link", "User:     3   Group:     4"},
		{"stat /srv/link", `Fast link dest: "/srv/data"`},
		{"stat /srv/data", "mtime: 0x5f5e1000"},
		{"ea_list /srv/data", `user.colour (4) = "blue"`},
		{"ea_list /bin/net", "security.capability (20)"},
		{"stat /srv/work", "Type: directory"},
		{"stat /proc", "Type: directory"},
		{"stat /tmp", "Mode:  01777"},
		{"stat /etc/machine-id", "Size: 0"},
		{"cat /etc/hosts", "127.0.0.1 localhost"},
	} {
		if got := debugfs(t, made.Image, tt.request); !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q is not in\n%s", tt.request, tt.want, got)
		}
	}
	if got := debugfs(t, made.Image, "ls -p /"); strings.Contains(got, "/gone/") {
		t.Errorf("a whiteout is not done: %s", got)
	}
	if got := debugfs(t, made.Image, "ls -p /dev"); strings.Contains(got, "null") {
		t.Errorf("a device is in the image: %s", got)
	}
	want := template.Template{
		Name: "app", DefaultUser: "app", DefaultWorkdir: "/srv/work", Env: map[string]string{"PATH": "/usr/bin:/bin", "MODE": "prod"},
		Config: &template.ImageConfig{
			Start: []string{"/bin/net", "-p", "80"}, ExposedPorts: []string{"80/tcp"}, Labels: map[string]string{"a": "b"}, User: "app",
			Healthcheck: &template.Healthcheck{Test: []string{"CMD-SHELL", "true"}, Interval: 1e9},
		},
	}
	got := template.Template{Name: made.Name, DefaultUser: made.DefaultUser, DefaultWorkdir: made.DefaultWorkdir, Env: made.Env, Config: made.Config}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("template: %s", diff)
	}
	if steps := strings.Join(n.steps, ", "); steps != "fetch image, unpack, make image, publish" {
		t.Errorf("steps: %s", steps)
	}
	if log := n.log(); !strings.Contains(log, "layer 2 of 2") || !strings.Contains(log, "left out: device /dev/null") {
		t.Errorf("log: %s", log)
	}
	noTemp(t, cfg)
}

func TestImportFromEverySource(t *testing.T) {
	needImageTools(t)
	i := app(t)
	folder := i.LayoutOf(t)
	blobs, manifest := i.Parts(t)
	ref := ocitest.NewRegistry(t).Push(t, "1", blobs, manifest, ocitest.Manifest)
	cfg := config(t)
	s := open(t, cfg)
	first, _ := importFrom(t, s, "layout", template.Layout{Dir: folder})
	for name, from := range map[string]template.Source{
		"registry": template.Registry{Ref: ref, Credentials: oci.Credentials{Username: ocitest.User, Password: ocitest.Password}},
		"archive":  template.Archive{Reader: bytes.NewReader(ocitest.Pack(t, folder))},
	} {
		made, n := importFrom(t, s, name, from)
		if made.Digest != first.Digest || made.Image != first.Image || strings.Contains(n.log(), "layer 1") {
			t.Errorf("the same image from a %s is another template, or was unpacked again: %+v\n%s", name, made, n.log())
		}
		if strings.Contains(made.Source+n.log(), ocitest.Password) {
			t.Errorf("a password is kept: %s\n%s", made.Source, n.log())
		}
	}
	root := ocitest.Gzip(t, ocitest.Tar(t, ocitest.Dir("./"), ocitest.File("./bin/sh", "x").Moded(0o755), ocitest.File("./.wh.kept", "x")))
	made, _ := importFrom(t, s, "tar", template.Tar{Reader: bytes.NewReader(root)})
	if got := debugfs(t, made.Image, "ls -p /"); !strings.Contains(got, "/.wh.kept/") {
		t.Errorf("a file of a plain tar file was taken for a whiteout: %s", got)
	}
	again, n := importFrom(t, s, "tar", template.Tar{Reader: bytes.NewReader(root)})
	if again.Digest != made.Digest || len(n.steps) != 1 {
		t.Errorf("the same again: %+v, steps %v", again, n.steps)
	}
	noTemp(t, cfg)
}

// TestImportedAccounts: whoever an image runs as, a command can be run as, or it
// is said why not.
func TestImportedAccounts(t *testing.T) {
	needImageTools(t)
	passwd := ocitest.File("etc/passwd", "root:x:0:0::/root:/bin/sh\napp:x:1500:1600::/home/app:/bin/ash\nbroken:x\nuser77:x:5:5::/:\n")
	group := ocitest.File("etc/group", "root:x:0:\nwww:x:33:\n")
	shell := ocitest.File("bin/sh", "x").Moded(0o755)
	for _, tt := range []struct {
		name    string
		tree    []ocitest.Entry
		config  map[string]any
		user    string
		workdir string
		passwd  string // a line of it
		note    string
		says    string // of the error
	}{
		{name: "nobody is named", tree: []ocitest.Entry{passwd, shell}, user: "root"},
		{name: "a name", tree: []ocitest.Entry{passwd, shell}, config: map[string]any{"User": "app"}, user: "app", note: "/home/app, the home of app, is not there"},
		{name: "a name with its home", tree: []ocitest.Entry{passwd, ocitest.Dir("home/app")}, config: map[string]any{"User": "app"}, user: "app", note: "has no /bin/sh"},
		{name: "a number with an account", tree: []ocitest.Entry{passwd, shell}, config: map[string]any{"User": "1500"}, user: "app"},
		{name: "a number without one", tree: []ocitest.Entry{passwd, shell}, config: map[string]any{"User": "2000"}, user: "user2000", passwd: "user2000:x:2000:0::/:/bin/sh", note: "is now called user2000"},
		{name: "numbers of both", tree: []ocitest.Entry{passwd, shell}, config: map[string]any{"User": "2000:3000"}, user: "user2000", passwd: "user2000:x:2000:3000::/:/bin/sh"},
		{name: "a number and the name of a group", tree: []ocitest.Entry{passwd, group, shell}, config: map[string]any{"User": "2000:www"}, user: "user2000", passwd: "user2000:x:2000:33::/:/bin/sh"},
		{name: "a group that is not the account's", tree: []ocitest.Entry{passwd, group, shell}, config: map[string]any{"User": "app:www"}, user: "app", note: "the group www of the image's user is not kept"},
		{name: "no accounts at all", tree: []ocitest.Entry{ocitest.File("app", "x").Moded(0o755)}, user: "root", passwd: "root:x:0:0:root:/root:/bin/sh", note: "programs can be run, lines for a shell cannot"},
		{name: "no accounts, and a number", tree: []ocitest.Entry{shell}, config: map[string]any{"User": "65532"}, user: "user65532", passwd: "user65532:x:65532:0::/:/bin/sh"},
		{name: "accounts through a link", tree: []ocitest.Entry{ocitest.Link("etc", "/usr/etc"), ocitest.File("usr/etc/passwd", passwd.Data), shell}, config: map[string]any{"User": "app"}, user: "app"},
		{name: "a shell through an absolute link", tree: []ocitest.Entry{passwd, ocitest.Link("bin", "/usr/bin"), ocitest.Link("usr/bin/sh", "/bin/busybox"), ocitest.File("usr/bin/busybox", "x").Moded(0o755)}, user: "root", note: "/root, the home of root"},
		{name: "a closed /etc", tree: []ocitest.Entry{ocitest.Dir("etc").Moded(0o555), shell}, config: map[string]any{"User": "7"}, user: "user7", passwd: "user7:x:7:0::/:/bin/sh"},
		{name: "a directory", tree: []ocitest.Entry{passwd, shell}, config: map[string]any{"WorkingDir": "srv/../app//x"}, user: "root", workdir: "/app/x"},
		{name: "a name without an account", tree: []ocitest.Entry{passwd, shell}, config: map[string]any{"User": "nobody"}, says: `the user "nobody", who is not in its /etc/passwd`},
		{name: "a group that is not there", tree: []ocitest.Entry{passwd, shell}, config: map[string]any{"User": "app:nogroup"}, says: `the group "nogroup", which is not in its /etc/group`},
		{name: "a number whose name is taken", tree: []ocitest.Entry{passwd, shell}, config: map[string]any{"User": "77"}, says: "the name user77 is taken"},
		{name: "accounts that are a directory", tree: []ocitest.Entry{ocitest.Dir("etc/passwd")}, says: "read /etc/passwd"},
		{name: "accounts that are too large", tree: []ocitest.Entry{ocitest.File("etc/passwd", strings.Repeat("x", 2<<20))}, says: "at most 1048576"},
		{name: "an /etc that is a file", tree: []ocitest.Entry{ocitest.File("etc", "x")}, says: "make /etc: /etc is not a directory"},
		{name: "a /dev that is a link", tree: []ocitest.Entry{ocitest.Link("dev", "/tmp")}, says: "/dev is not a directory, but a sandbox has its own there"},
		{name: "a directory in a file", tree: []ocitest.Entry{shell}, config: map[string]any{"WorkingDir": "/bin/sh/x"}, says: "make the working directory"},
		{name: "a variable that no process can have", tree: []ocitest.Entry{shell}, config: map[string]any{"Env": []string{"A=\x00"}}, says: "NUL byte"},
		{name: "a variable without a name", tree: []ocitest.Entry{shell}, config: map[string]any{"Env": []string{"=x"}}, says: "a variable without a name"},
		{name: "variables that are too large", tree: []ocitest.Entry{shell}, config: map[string]any{"Env": []string{"A=" + strings.Repeat("x", 300<<10)}}, says: "at most 262144"},
		{name: "labels that are too large", tree: []ocitest.Entry{shell}, config: map[string]any{"Labels": map[string]string{"a": strings.Repeat("x", 600<<10)}}, says: "at most 524288"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			i := ocitest.ImageOf(ocitest.Tar(t, tt.tree...))
			i.Config = tt.config
			cfg := config(t)
			s := open(t, cfg)
			n := &news{}
			made, err := s.Import(t.Context(), template.Import{Name: "x", From: template.Layout{Dir: i.LayoutOf(t)}}, n.event)
			if tt.says != "" {
				if !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
				}
				nothingLeft(t, cfg)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if made.DefaultUser != tt.user || made.DefaultWorkdir != tt.workdir {
				t.Errorf("user %q in %q", made.DefaultUser, made.DefaultWorkdir)
			}
			if !strings.Contains(n.log(), tt.note) {
				t.Errorf("log: %s", n.log())
			}
			if got := debugfs(t, made.Image, "cat /etc/passwd"); !strings.Contains(got, tt.passwd) {
				t.Errorf("accounts: %s", got)
			}
		})
	}
}

func TestImportFailures(t *testing.T) {
	needImageTools(t)
	bomb := ocitest.ImageOf(ocitest.Tar(t, ocitest.File("f", strings.Repeat("x", 2<<20))))
	escape := ocitest.ImageOf(ocitest.Tar(t, ocitest.File("a", "")), ocitest.Tar(t, ocitest.File("../../../escaped", "x")))
	for _, tt := range []struct {
		name string
		imp  template.Import
		kind sandbox.Kind
		says string
	}{
		{"no name", template.Import{From: template.Tar{Reader: strings.NewReader("")}}, sandbox.KindInvalid, "template"},
		{"no source", template.Import{Name: "x"}, sandbox.KindInvalid, "needs a source"},
		{"a size of nothing", template.Import{Name: "x", From: template.Tar{Reader: strings.NewReader("")}, ImageMiB: 1}, sandbox.KindInvalid, "between 64"},
		{"no tar file", template.Import{Name: "x", From: template.Tar{Reader: strings.NewReader("hello")}}, sandbox.KindInvalid, `build template "x": unpack: tar file: it is not a whole tar file`},
		{"a bomb", template.Import{Name: "x", From: template.Layout{Dir: bomb.LayoutOf(t)}, Limits: oci.Limits{Bytes: 1 << 20}}, sandbox.KindInvalid, "more than 1048576 bytes"},
		{"an attack", template.Import{Name: "x", From: template.Layout{Dir: escape.LayoutOf(t)}}, sandbox.KindInvalid, "unpack: layer 2 of 2"},
		{"an image that is too small", template.Import{Name: "x", From: template.Tar{Reader: bytes.NewReader(ocitest.Tar(t, ocitest.File("f", strings.Repeat("x", 70<<20))))}, ImageMiB: 64}, sandbox.KindInvalid, "is too small"},
		{"no such folder", template.Import{Name: "x", From: template.Layout{Dir: "/nonexistent"}}, sandbox.KindInternal, "no such file"},
		{"a reader that breaks off", template.Import{Name: "x", From: template.Tar{Reader: brokenReader{}}}, sandbox.KindInternal, "the line is dead"},
		{"an archive that breaks off", template.Import{Name: "x", From: template.Archive{Reader: brokenReader{}}}, sandbox.KindInternal, "the line is dead"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := config(t)
			s := open(t, cfg)
			_, err := s.Import(t.Context(), tt.imp, nil)
			if !sandbox.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
			}
			nothingLeft(t, cfg)
		})
	}
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, errors.New("the line is dead") }

// TestWorkOfAnImportIsClosed: while an image is on the host as files, nobody but
// root can reach its setuid programs.
func TestWorkOfAnImportIsClosed(t *testing.T) {
	needImageTools(t)
	cfg := config(t)
	s := open(t, cfg)
	looked := 0
	_, err := s.Import(t.Context(), template.Import{Name: "x", From: template.Layout{Dir: app(t).LayoutOf(t)}}, func(e template.Event) {
		if e.Step != "unpack" || !strings.Contains(e.Line, "left out") {
			return
		}
		found, _ := filepath.Glob(filepath.Join(cfg.Cache, "work/*/*/root/bin/sh"))
		for _, path := range found {
			info, err := os.Stat(filepath.Dir(filepath.Dir(filepath.Dir(path))))
			if looked++; err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("the folder of the tree has mode %v, %v", info.Mode(), err)
			}
		}
	})
	if err != nil || looked == 0 {
		t.Errorf("looked at %d trees; %v", looked, err)
	}
}
