package up_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/cmd/dormouse/doctor"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

func TestMain(m *testing.M) {
	code := m.Run()
	rig.RemoveBinaries()
	os.Exit(code)
}

// person types commands. The config file that up writes is all they know of the
// server.
type person struct {
	t       testing.TB
	server  *rig.Server // for its data directory, and what is left of it
	program string
	env     []string
}

func newPerson(t testing.TB) person {
	t.Helper()
	home := t.TempDir()
	return person{
		t: t, server: rig.New(t, rig.Options{}), program: rig.Build(t).Dormouse,
		env: append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME="+home, "SUDO_UID=", "DORMOUSE_URL=", "DORMOUSE_API_KEY="),
	}
}

// types runs a command, says how long it took, and returns what it prints.
func (p person) types(status int, args ...string) string {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience(5*time.Minute)) // what reaches it is stuck
	defer cancel()
	cmd := exec.CommandContext(ctx, p.program, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.Env = &out, &errs, p.env
	begun := time.Now()
	err := cmd.Run()
	if cmd.ProcessState == nil {
		p.t.Fatal(err)
	}
	p.t.Logf("$ dormouse %s   # %v\n%s%s", strings.Join(args, " "), time.Since(begun).Round(10*time.Millisecond), &out, &errs)
	if code := cmd.ProcessState.ExitCode(); code != status {
		p.t.Fatalf("exit status %d, want %d", code, status)
	}
	return out.String()
}

// tells prints, when a test has failed, what the server has written down.
func (p person) tells(data string) {
	if !p.t.Failed() {
		return
	}
	entries, _ := filepath.Glob(filepath.Join(data, "host", "journal", "*.json")) // the pattern is a good one
	for _, path := range append(entries, filepath.Join(data, "server.log")) {
		text, err := os.ReadFile(path)
		p.t.Logf("%s: %v\n%s", path, err, text)
	}
}

// has checks for parts of what was printed.
func (p person) has(out string, parts ...string) {
	p.t.Helper()
	for _, part := range parts {
		if !strings.Contains(out, part) {
			p.t.Errorf("it does not say %q", part)
		}
	}
}

func decode[T any](p person, args ...string) (v T) {
	p.t.Helper()
	if err := json.Unmarshal([]byte(p.types(0, append([]string{"--json"}, args...)...)), &v); err != nil {
		p.t.Fatal(err)
	}
	return v
}

// TestFromUpToDown: a server is started and proves itself, is found up when it is
// asked for again, serves, and goes with all that it made but its data.
func TestFromUpToDown(t *testing.T) {
	p := newPerson(t)
	data := p.server.Data
	t.Cleanup(func() { p.types(0, "down", "--data", data) }) // by then there is nothing to stop, if all went well
	t.Cleanup(func() { p.tells(data) })
	up := append([]string{"up", "--detach", "--data", data, "--listen", "127.0.0.1:0"}, testkit.UpFlags()...)
	p.has(p.types(0, up...), "VMs run on qemu with ", "proof: in sandbox", "\n  42\n")
	again := p.types(0, up...)
	p.has(again, "server is up already", "proof: in sandbox", "\n  42\n")

	_, url, _ := strings.Cut(again, "server is up already: http://")
	address, _, _ := strings.Cut(url, "\n")
	p.has(p.types(0, "doctor", "--data", data, "--listen", address), "a Dormouse server answers at "+address, "Nothing that is needed is missing.")
	p.runs(decode[api.Host](p, "host"), decode[doctor.Report](p, "doctor", "--data", data, "--listen", address))

	p.has(p.types(0, "demo"), "proof: in sandbox")
	if out := p.types(0, "run", "base", "--", "python3", "-c", `print("hello")`); out != "hello\n" {
		t.Errorf("run prints %q", out)
	}
	p.types(7, "run", "base", "--", "sh", "-c", "exit 7")

	id := strings.TrimSpace(p.types(0, "create", "base"))
	if n := len(p.server.VMs()); n != 1 {
		t.Errorf("%d VMs run, want that of %s", n, id)
	}
	p.has(p.types(0, "down", "--data", data), "server stopped, 1 sandboxes ended")
	if left := p.server.Leftovers(); len(left) > 0 {
		t.Errorf("left on the machine after down:\n%s", strings.Join(left, "\n"))
	}
	p.has(p.types(0, "down", "--data", data), "server was not running, 0 sandboxes ended")
}

// runs checks that server and doctor say the same about what VMs are made of
// here, and that it is what is demanded.
func (p person) runs(host api.Host, report doctor.Report) {
	p.t.Helper()
	for _, part := range []struct {
		finding, demand, why string
		used                 bool
	}{
		{"kvm", "kvm", host.AcceleratorReason, host.Accelerator == "kvm"},
		{"device-mapper", "dm", host.DiskReason, host.DiskDriver == "dm"},
		{"cgroup v2", "cgroup", host.CgroupReason, host.Cgroup},
	} {
		at := slices.IndexFunc(report.Findings, func(f doctor.Finding) bool { return f.Name == part.finding })
		if at < 0 {
			p.t.Errorf("the doctor says nothing of %s: %+v", part.finding, report)
			continue
		}
		if found := report.Findings[at]; part.used != (found.Status == doctor.OK) {
			p.t.Errorf("%s: the server uses it: %v (%s); the doctor says: %s, %s", part.finding, part.used, part.why, found.Status, found.Found)
		}
		if testkit.Demanded(part.demand) && !part.used {
			p.t.Errorf("the server does without %s: %s", part.finding, part.why)
		}
	}
}
