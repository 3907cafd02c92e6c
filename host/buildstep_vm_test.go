package host_test

import (
	"bytes"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/template/oci"
	"github.com/dormouse-sandbox/dormouse/template/oci/ocitest"
)

// cook builds a Dockerfile whose RUN steps run in real VMs. In the text, BASE is
// an image with nothing but busybox.
func cook(t *testing.T, agent *host.Agent, templates *template.Store, text string, files ...ocitest.Entry) (template.Template, string, error) {
	t.Helper()
	tree := []ocitest.Entry{
		ocitest.File("bin/busybox", testkit.StaticBusybox(t)).Moded(0o755), ocitest.File("bin/net", "x").Moded(0o755).Attr("user.colour", "blue"),
		ocitest.File("etc/passwd", "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"),
	}
	for _, applet := range []string{"sh", "id", "cat", "ls", "wget", "echo", "sleep", "dd", "ln", "chmod", "stat", "hostname"} {
		tree = append(tree, ocitest.Hard("bin/"+applet, "bin/busybox"))
	}
	image := ocitest.ImageOf(ocitest.Tar(t, tree...))
	image.Config = map[string]any{"Env": []string{"PATH=/bin"}}
	blobs, manifest := image.Parts(t)
	ref := ocitest.NewRegistry(t)
	base := ref.Push(t, "1", blobs, manifest, ocitest.Manifest)
	registry, _, _ := strings.Cut(base, "/")
	entries := append([]ocitest.Entry{ocitest.File("Dockerfile", strings.ReplaceAll(text, "BASE", base))}, files...)
	var log strings.Builder
	made, err := templates.BuildDockerfile(t.Context(), template.Dockerfile{
		Name: "cooked", Context: bytes.NewReader(ocitest.Tar(t, entries...)), Runner: host.Steps{Agent: agent},
		Credentials: map[string]oci.Credentials{registry: {Username: ocitest.User, Password: ocitest.Password}},
		Args:        map[string]string{"RUN_ID": string(sandbox.NewID())}, // the cache is everybody's
	}, func(e template.Event) {
		if e.Line != "" {
			log.WriteString(e.Step + "| " + e.Line + "\n")
		}
	})
	return made, log.String(), err
}

// debugfs asks the file system of an image.
func debugfs(image, request string) (string, error) {
	out, err := exec.Command("/usr/sbin/debugfs", "-R", request, image).Output()
	return string(out), err
}

// notInEveryLab spares the lab what it has nothing to add to: what is in an image
// does not depend on the accelerator.
func notInEveryLab(t *testing.T) {
	t.Helper()
	if testkit.Accelerator() != "tcg" {
		testkit.Long(t, "half a minute where KVM is emulated")
	}
}

// TestRealDockerfile: commands run in microVMs, what they leave is in the
// template, and nothing of their sandboxes is left.
func TestRealDockerfile(t *testing.T) {
	notInEveryLab(t)
	agent, templates := realHostAndTemplates(t)
	testkit.Tool(t, "qemu-img")
	made, log, err := cook(t, agent, templates, `FROM BASE
ARG RUN_ID
WORKDIR /work
COPY hello.txt .
RUN cat hello.txt && echo "as $(id -un) in $(pwd)" && dd if=/dev/zero bs=1M count=20 2>/dev/null | cat > zeros && echo "$RUN_ID" > /id && ln hello.txt hard && chmod 4755 /bin/net && (sleep 1000 &)
USER app
RUN ["/bin/sh", "-c", "id -un; cat hello.txt > /tmp/mine; cat /id"]
COPY --chown=app hello.txt /home/app/
CMD ["/bin/ls"]
`, ocitest.File("hello.txt", "hello there\n"))
	if err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	for _, want := range []string{"| hello there", "| as root in /work", "RUN [\"/bin/sh\", \"-c\", \"id -un; cat hello.txt > /tmp/mine; cat /id\"]| app"} {
		if !strings.Contains(log, want) {
			t.Errorf("%q is not in the log:\n%s", want, log)
		}
	}
	if n := agent.Known(); n != 0 {
		t.Errorf("%d sandboxes of the build are left", n)
	}
	id := sandbox.NewID()
	_, err = agent.Create(t.Context(), host.CreateRequest{
		ID: id, Deadline: time.Now().Add(10 * time.Minute),
		Spec: sandbox.Spec{Template: made.Name, VCPUs: 1, MemMiB: 256, DiskMiB: 1024},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []run{
		{
			[]string{"sh", "-c", "id -un; pwd; cat hard /tmp/mine; stat -c '%a %s' /bin/net /work/zeros; stat -c %h /work/hard; stat -c %U /tmp/mine /home/app/hello.txt"},
			"app\n/work\nhello there\nhello there\n4755 1\n644 20971520\n2\napp\napp\n",
		},
		{[]string{"sh", "-c", "hostname; cat /etc/hostname"}, string(id) + "\n" + string(id) + "\n"},
	} {
		r.check(t, agent, id)
	}
	if _, err := agent.Destroy(t.Context(), string(id), ""); err != nil {
		t.Error(err)
	}
	// An image without a shell, and without any account.
	bare := []ocitest.Entry{ocitest.File("busybox", testkit.StaticBusybox(t)).Moded(0o755)}
	made, log, err = cook(t, agent, templates, "FROM scratch\nARG RUN_ID\nCOPY busybox /busybox\nRUN [\"/busybox\", \"cp\", \"/proc/sys/kernel/ostype\", \"/os\"]\nENV A=b\n", bare...)
	if err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	if log, err := debugfs(made.Image, "cat /os"); err != nil || log != "Linux\n" {
		t.Errorf("what a step without a shell has written: %q, %v", log, err)
	}
	_, log, err = cook(t, agent, templates, "FROM BASE\nARG RUN_ID\nRUN echo so far && cat /nonesuch")
	_, says, _ := strings.Cut(fmt.Sprint(err), "step 2 of 2: RUN echo so far && cat /nonesuch (line 3): exit status 1; its output ends with:\n")
	lines := strings.Split(strings.TrimSpace(says), "\n")
	slices.Sort(lines) // they come through two pipes, in either order
	if !sandbox.Is(err, sandbox.KindInvalid) || len(lines) < 2 || !strings.HasPrefix(lines[0], "cat: can't open '/nonesuch'") || lines[1] != "so far" {
		t.Errorf("error of kind %s: %v\n%s", sandbox.KindOf(err), err, log)
	}
	if n := agent.Known(); n != 1 { // the one that has ended above
		t.Errorf("%d sandboxes of a failed build are left", n-1)
	}
}
