package host_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/template/oci/ocitest"
)

// musl is another C library than Debian's; it can be run as a program.
func musl(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile("/lib/ld-musl-x86_64.so.1")
	testkit.Require(t, "musl", err == nil, "the package musl is missing")
	return string(data)
}

// TestRealImages boots images that have little: each works, or says why not.
func TestRealImages(t *testing.T) {
	notInEveryLab(t)
	agent, templates := realHostAndTemplates(t)
	busybox := testkit.StaticBusybox(t)
	tools := []ocitest.Entry{ocitest.File("bin/busybox", busybox).Moded(0o755)}
	for _, applet := range []string{"sh", "id", "cat", "ls", "pwd", "hostname", "touch", "grep", "stat", "nslookup"} {
		tools = append(tools, ocitest.Link("bin/"+applet, "/bin/busybox"))
	}
	passwd := ocitest.File("etc/passwd", "root:x:0:0:root:/root:/bin/ash\nguest:x:405:100:guest:/dev/null:/sbin/nologin\napp:x:1000:1000::/home/app:/bin/ash\n")
	for _, tt := range []struct {
		name   string
		tree   []ocitest.Entry
		config map[string]any
		runs   []run
	}{
		{
			"no bash, a closed etc, a user without a home",
			append(tools, ocitest.Dir("etc").Moded(0o555), passwd.Moded(0o444), ocitest.File("etc/group", "root:x:0:\nusers:x:100:app\n").Moded(0o444),
				ocitest.File("etc/hosts", "").Moded(0o444), ocitest.File("etc/resolv.conf", "nameserver 192.0.2.7\n").Moded(0o444)),
			map[string]any{"User": "app", "Env": []string{"PATH=/bin", "COLOUR=blue"}},
			[]run{
				{[]string{"/bin/sh", "-c", "id -un; pwd; echo $COLOUR"}, "app\n/\nblue\n"},
				{[]string{"id", "-G"}, "1000 100\n"},
				{[]string{"/bin/sh", "-c", "hostname | grep -c . ; grep -c $(hostname) /etc/hosts; grep -c 192.0.2.7 /etc/resolv.conf"}, "1\n1\n0\n"},
				{[]string{"/bin/sh", "-c", "touch /tmp/x && stat -c %U /tmp/x"}, "app\n"},
				{[]string{"bash", "-c", "true"}, "!command not found: \"bash\""},
			},
		},
		{
			"one program and nothing else, as a number",
			[]ocitest.Entry{ocitest.File("busybox", busybox).Moded(0o755)},
			map[string]any{"User": "65532:65532", "WorkingDir": "/srv/app"},
			[]run{
				{[]string{"/busybox", "id", "-u"}, "65532\n"},
				{[]string{"/busybox", "pwd"}, "/srv/app\n"},
				{[]string{"/bin/sh", "-c", "true"}, "!no such file or directory"},
			},
		},
		{
			"only musl",
			[]ocitest.Entry{passwd, ocitest.File("lib/ld-musl-x86_64.so.1", musl(t)).Moded(0o755), ocitest.Link("lib64", "/lib")},
			nil,
			[]run{{[]string{"/lib64/ld-musl-x86_64.so.1"}, "*musl libc (x86_64)"}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			image := ocitest.ImageOf(ocitest.Tar(t, tt.tree...))
			image.Config = tt.config
			made, err := templates.Import(t.Context(), template.Import{Name: "tiny", From: template.Layout{Dir: image.LayoutOf(t)}}, nil)
			if err != nil {
				t.Fatal(err)
			}
			id := sandbox.NewID()
			_, err = agent.Create(t.Context(), host.CreateRequest{
				ID: id, Deadline: time.Now().Add(10 * time.Minute),
				Spec: sandbox.Spec{Template: made.Name, VCPUs: 1, MemMiB: 256, DiskMiB: 1024},
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range tt.runs {
				r.check(t, agent, id)
			}
			if _, err := agent.Destroy(t.Context(), string(id), ""); err != nil {
				t.Error(err)
			}
		})
	}
}

// run is a command, and its output; behind a "!" a part of the error with which
// it cannot be started, and behind a "*" a part of what it prints on either
// stream.
type run struct {
	argv []string
	want string
}

func (r run) check(t *testing.T, agent *host.Agent, id sandbox.ID) {
	t.Helper()
	res, err := agent.Exec(t.Context(), string(id), host.Command{Cmd: r.argv[0], Args: r.argv[1:]}, nil, 1<<20)
	part, refused := strings.CutPrefix(r.want, "!")
	anywhere, loose := strings.CutPrefix(r.want, "*")
	switch {
	case refused:
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%q: %+v, %v", r.argv, res, err)
		}
	case err != nil:
		t.Errorf("%q: %v", r.argv, err)
	case loose:
		if !strings.Contains(string(res.Stdout)+string(res.Stderr), anywhere) {
			t.Errorf("%q: %q, %q", r.argv, res.Stdout, res.Stderr)
		}
	case string(res.Stdout) != r.want:
		t.Errorf("%q: %q (stderr %q, %s), want %q", r.argv, res.Stdout, res.Stderr, res.End.Status, r.want)
	}
}
