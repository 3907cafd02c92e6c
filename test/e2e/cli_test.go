package e2e_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// cli runs the command line, which must end with a status and, on success, must
// be silent on standard error.
func (w world) cli(status int, stdin string, args ...string) string {
	w.t.Helper()
	stdout, stderr, code := w.CLI(stdin, args...)
	if code != status {
		w.t.Fatalf("dormouse %s: status %d, want %d\n%s%s", strings.Join(args, " "), code, status, stdout, stderr)
	}
	if status == 0 && stderr != "" {
		w.t.Errorf("dormouse %s says on standard error: %s", strings.Join(args, " "), stderr)
	}
	return stdout
}

// decode runs a command with --json and decodes what it prints, strictly.
func decode[T any](w world, args ...string) (v T) {
	w.t.Helper()
	out := w.cli(0, "", append([]string{"--json"}, args...)...)
	d := json.NewDecoder(strings.NewReader(out))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		w.t.Fatalf("dormouse --json %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return v
}

// TestCLI: the command line does what a person needs, against a real server.
func TestCLI(t *testing.T) {
	w := shared(t)
	t.Run("run", func(t *testing.T) {
		w := w.in(t)
		before := len(w.VMs())
		out := w.cli(0, "", "run", "base", "--mem", "256MiB", "--", "python3", "-c", "print(6*7)")
		if out != "42\n" {
			t.Errorf("it prints %q", out)
		}
		out, stderr, code := w.CLI("in and out\n", "run", "base", "--mem", "256MiB", "-e", "X=y z", "--", "sh", "-c", `cat; echo "$X" >&2; exit 7`)
		if out != "in and out\n" || stderr != "y z\n" || code != 7 {
			t.Errorf("input, both outputs and status: %q, %q, %d", out, stderr, code)
		}
		if n := len(w.VMs()); n != before {
			t.Errorf("%d VMs before, %d after", before, n)
		}
	})
	id := strings.TrimSpace(w.cli(0, "", "create", "base", "--mem", "256MiB", "--timeout", "1h", "--metadata", "from=cli"))
	if _, err := sandbox.ParseID(id); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.destroy(id) })
	t.Run("exec", func(t *testing.T) { w.in(t).cliExec(id) })
	t.Run("cp", func(t *testing.T) { w.in(t).cliCopy(id) })
	t.Run("look", func(t *testing.T) { w.in(t).cliLook(id) })
	t.Run("keys", func(t *testing.T) {
		w := w.in(t)
		k := decode[api.Key](w, "key", "create", "cli")
		list := w.cli(0, "", "key", "ls")
		if !strings.Contains(list, k.ID) || strings.Contains(list, k.Secret) {
			t.Errorf("key ls: %s", list)
		}
		w.cli(0, "", "key", "rm", k.ID)
		if list := w.cli(0, "", "key", "ls"); strings.Contains(list, k.ID) {
			t.Errorf("a revoked key is listed: %s", list)
		}
	})
	t.Run("completion", func(t *testing.T) {
		w := w.in(t)
		for _, shell := range []string{"bash", "zsh", "fish"} {
			if script := w.cli(0, "", "completion", shell); !strings.Contains(script, "dormouse") || len(script) < 1000 {
				t.Errorf("the script for %s has %d bytes", shell, len(script))
			}
		}
		if out, _, _ := w.CLI("", "__complete", "exec", id[:6]); !strings.Contains(out, id) {
			t.Errorf("Tab after exec %s offers %s", id[:6], out)
		}
	})
	t.Run("errors", func(t *testing.T) { w.in(t).cliErrors(id) })
	t.Run("rm", func(t *testing.T) {
		w := w.in(t)
		if out := w.cli(0, "", "rm", id[:8]); strings.TrimSpace(out) != id {
			t.Errorf("rm prints %q", out)
		}
		if strings.Contains(w.cli(0, "", "ls"), id) {
			t.Error("ls lists what was destroyed")
		}
		if out := w.cli(0, "", "ls", "-a"); !strings.Contains(out, id) || !strings.Contains(out, "user") {
			t.Errorf("ls -a lacks it, or its cause: %s", out)
		}
		if out := w.cli(0, "", "logs", id); len(out) == 0 {
			t.Error("the log is gone with the sandbox")
		}
		if _, stderr, code := w.CLI("", "exec", id, "--", "true"); code != 125 || !strings.Contains(stderr, "user") {
			t.Errorf("exec in what was destroyed: status %d, %s", code, stderr)
		}
	})
}

func (w world) cliExec(id string) {
	w.t.Helper()
	if out := w.cli(0, "piped\n", "exec", id, "--", "tr", "a-z", "A-Z"); out != "PIPED\n" {
		w.t.Errorf("a pipe: %q", out)
	}
	if out := w.cli(0, "", "exec", id[:5], "-u", "root", "-w", "/etc", "-e", "N=1", "--", "sh", "-c", "id -un; pwd; echo $N"); out != "root\n/etc\n1\n" {
		w.t.Errorf("user, directory and variable: %q", out)
	}
	w.cli(9, "", "exec", id, "--", "sh", "-c", "exit 9")
	w.cli(137, "", "exec", id, "--", "sh", "-c", "kill -9 $$")
	w.cli(124, "", "exec", id, "--timeout", "1s", "--", "sleep", "600")
	w.cli(125, "", "exec", id, "--", "no-such-program")
	r := decode[api.ExecResult](w, "exec", id, "--", "sh", "-c", "echo out; echo err >&2")
	if r.Stdout != "out\n" || r.Stderr != "err\n" || r.ExitCode != 0 || r.Status != "exit status 0" {
		w.t.Errorf("exec --json: %+v", r)
	}
}

func (w world) cliCopy(id string) {
	w.t.Helper()
	dir := w.t.TempDir()
	here := filepath.Join(dir, "a file")
	text := "some\x00bytes\xff"
	if err := os.WriteFile(here, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	w.cli(0, "", "cp", here, id+":work/")
	if out := w.cli(0, "", "cp", id+":work/a file", "-"); out != text {
		w.t.Errorf("there and back: %q", out)
	}
	back := filepath.Join(dir, "back")
	w.cli(0, "", "cp", id+":/etc/hostname", back)
	data, err := os.ReadFile(back)
	if err != nil || strings.TrimSpace(string(data)) != id {
		w.t.Errorf("a copied /etc/hostname has %q, %v", data, err)
	}
	w.cli(0, "from a pipe", "cp", "-", id+":/tmp/piped")
	if out := w.cli(0, "", "exec", id, "--", "cat", "/tmp/piped"); out != "from a pipe" {
		w.t.Errorf("from a pipe: %q", out)
	}
	w.cli(3, "", "cp", id+":/no/such", filepath.Join(dir, "none"))
	if _, err := os.Stat(filepath.Join(dir, "none")); err == nil {
		w.t.Error("a copy that failed left a file")
	}
	w.cliCopyTree(id, dir)
}

// cliCopyTree takes a directory there, from the one sandbox into another place of
// it, and back.
func (w world) cliCopyTree(id, dir string) {
	w.t.Helper()
	src := filepath.Join(dir, "src")
	if err := errors.Join(
		os.MkdirAll(src+"/sub/empty", 0o755), os.WriteFile(src+"/sub/tool", []byte("#!/bin/sh\necho runs\n"), 0o750),
		os.WriteFile(src+"/big", bytes.Repeat([]byte("big"), 1<<20), 0o644), os.Symlink("sub/tool", src+"/link"),
	); err != nil {
		w.t.Fatal(err)
	}
	made := decode[api.Tree](w, "cp", "-r", src, id+":tree")
	if want := (api.Tree{Path: "/home/user/tree", Files: 3, Directories: 3, Bytes: 3<<20 + 20}); made != want {
		w.t.Errorf("cp -r tells %+v, want %+v", made, want)
	}
	out := w.cli(0, "", "exec", id, "--", "sh", "-c", "cd tree && ./link && stat -c '%U %a' sub/tool && find . | sort | tr '\n' ' '")
	if want := "runs\nuser 750\n. ./big ./link ./sub ./sub/empty ./sub/tool "; out != want {
		w.t.Errorf("what is in the sandbox: %q, want %q", out, want)
	}
	w.cli(0, "", "cp", "-r", id+":tree", id+":/tmp")
	back := filepath.Join(dir, "tree again")
	w.cli(0, "", "cp", "-r", id+":/tmp/tree", back)
	for name, text := range map[string]string{"link": "#!/bin/sh\necho runs\n", "big": strings.Repeat("big", 1<<20)} {
		if data, err := os.ReadFile(filepath.Join(back, name)); err != nil || string(data) != text {
			w.t.Errorf("%s has %d bytes when it is back, want %d (%v)", name, len(data), len(text), err)
		}
	}
	w.cli(2, "", "cp", "-r", src+"/.", id+":/root/sealed") // the user has no rights there
	w.cli(0, "", "cp", "-r", "-u", "root", src+"/.", id+":/root/sealed")
	w.cli(2, "", "cp", "-r", id+":/root", filepath.Join(dir, "secrets"))
}

func (w world) cliLook(id string) {
	w.t.Helper()
	list := decode[api.SandboxList](w, "ls", "--metadata", "from=cli")
	if len(list.Sandboxes) != 1 || list.Sandboxes[0].ID != id {
		w.t.Errorf("ls --json: %+v", list)
	}
	if got := decode[api.Sandbox](w, "get", id); got.ID != id || got.State != "running" || got.MemMiB != 256 {
		w.t.Errorf("get --json: %+v", got)
	}
	if out := w.cli(0, "", "ls"); !strings.HasPrefix(out, "ID ") || !strings.Contains(out, id) || !strings.Contains(out, "running") {
		w.t.Errorf("ls: %s", out)
	}
	if out := w.cli(0, "", "ls", "-q", "--metadata", "from=cli"); out != id+"\n" {
		w.t.Errorf("ls -q: %q", out)
	}
	if out := w.cli(0, "", "logs", id); !strings.Contains(out, "\n") {
		w.t.Errorf("logs: %q", out)
	}
	if out := w.cli(0, "", "templates"); !strings.Contains(out, "base") {
		w.t.Errorf("templates: %s", out)
	}
	if p := decode[api.Ping](w, "ping", id); p.Millis <= 0 {
		w.t.Errorf("ping: %+v", p)
	}
	if m := decode[api.Metrics](w, "metrics", id); m.CPUCount != 1 {
		w.t.Errorf("metrics: %+v", m)
	}
	if h := decode[api.Host](w, "host"); h.Accelerator != testkit.Accelerator() {
		w.t.Errorf("host: %+v", h)
	}
	if s := decode[api.Sandbox](w, "timeout", id, "2h"); s.Deadline == nil {
		w.t.Errorf("timeout: %+v", s)
	}
}

// cliErrors: an error is one line that names the thing, with a status that says
// what kind it is, and nothing on standard output.
func (w world) cliErrors(id string) {
	w.t.Helper()
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"create", "nothing-like-it"}, 3, "nothing-like-it"},
		{[]string{"create", "../base"}, 2, "must match"},
		{[]string{"create", "--vcpus", "0"}, 2, "--vcpus must not be 0"},
		{[]string{"create", "--vcpus", "1000"}, 2, "from 1 to 32"},
		{[]string{"create", "--mem", "1MiB"}, 2, "from 128"},
		{[]string{"create", "--timeout", "-5s"}, 2, "timeout"},
		{[]string{"get", "aaaaaaaaaaaaaaaaaaaaaaaa"}, 3, "aaaaaaaaaaaaaaaaaaaaaaaa"},
		{[]string{"get", "../../etc"}, 2, "not a sandbox ID"},
		{[]string{"run", "nothing-like-it", "--", "true"}, 125, "nothing-like-it"},
		{[]string{"exec", id}, 125, "usage"},
		{[]string{"dance"}, 2, "dance"},
		{[]string{"ls", "--dance"}, 2, "--dance"},
	} {
		stdout, stderr, code := w.CLI("", tt.args...)
		if code != tt.code || stdout != "" || !strings.Contains(stderr, tt.says) || !strings.HasPrefix(stderr, "dormouse: ") ||
			strings.Count(strings.TrimSpace(stderr), "\n") != 0 {
			w.t.Errorf("dormouse %s: status %d, want %d, %q on standard output, and %q, want a line with %q",
				strings.Join(tt.args, " "), code, tt.code, stdout, stderr, tt.says)
		}
	}
}
