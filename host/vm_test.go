package host_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk/qcow"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/netns"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/vmm/qemu"
)

// realHost opens an agent on the real mechanisms, under software emulation.
func realHost(t *testing.T) *host.Agent {
	t.Helper()
	testkit.Root(t)
	testkit.Tool(t, "qemu-system-x86_64")
	testkit.Tool(t, "mmdebstrap")
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	dir := t.TempDir()
	if err := openUp(dir); err != nil {
		t.Fatal(err)
	}
	cache := os.Getenv("DORMOUSE_CACHE")
	if cache == "" {
		cache = "/var/cache/dormouse"
	}
	templates, err := template.Open(template.Config{Dir: filepath.Join(dir, "templates"), Cache: cache, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	guest := filepath.Join(dir, "dormouse-guest")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", guest, "../cmd/dormouse-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	assets, err := templates.Prepare(t.Context(), guest, nil)
	if err != nil {
		t.Fatal(err)
	}
	vmm, err := qemu.New(qemu.Config{Accelerator: qemu.TCG, Reason: "the test says so", Log: log})
	if err != nil {
		t.Fatal(err)
	}
	disks, err := qcow.New(qcow.Config{})
	if err != nil {
		t.Fatal(err)
	}
	networks, err := netns.Open(t.Context(), netns.Config{Instance: "htest", Prepare: 1, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	runDir, err := os.MkdirTemp("/run", "dmtest-")
	if err != nil {
		t.Fatal(err)
	}
	agent, err := host.Open(t.Context(), host.Config{
		Dir: filepath.Join(dir, "host"), RunDir: runDir, Instance: "htest",
		VMM: vmm, Disks: disks, Networks: host.Slots{Network: networks}, Templates: templates,
		Kernel: assets.Kernel.Image, Initrd: assets.Initrd, UIDBase: 1_999_000_000, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background() // the test's own has ended
		if _, err := agent.DestroyAll(ctx, sandbox.CauseShutdown); err != nil {
			t.Error(err)
		}
		if err := agent.Close(); err != nil {
			t.Error(err)
		}
		if err := networks.Close(); err != nil {
			t.Error(err)
		}
		if err := netns.Remove(ctx, netns.Config{Instance: "htest"}); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(runDir); err != nil {
			t.Error(err)
		}
	})
	return agent
}

// openUp lets the VMM's own user pass through a test's private folders.
func openUp(dir string) error {
	for ; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o711); err != nil {
			return err
		}
	}
	return nil
}

// TestRealVM is the main job, on this level: create, run, read and write,
// destroy.
func TestRealVM(t *testing.T) {
	agent := realHost(t)
	ctx := t.Context()
	id := sandbox.NewID()
	status, err := agent.Create(ctx, host.CreateRequest{
		ID: id, Deadline: time.Now().Add(10 * time.Minute),
		Spec: sandbox.Spec{Template: "base", VCPUs: 1, MemMiB: 512, DiskMiB: 4096, Env: map[string]string{"COLOUR": "blue"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range status.Phases {
		t.Logf("%-10s %v", p.Name, p.Took.Round(time.Millisecond))
	}
	run := func(shell string) host.ExecResult {
		t.Helper()
		res, err := agent.Exec(ctx, string(id), host.Command{Cmd: "/bin/sh", Args: []string{"-c", shell}}, nil, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	for _, tt := range []struct{ shell, want string }{
		{"python3 -c 'print(6*7)'", "42\n"},
		{"whoami; pwd; hostname; echo $COLOUR", "user\n/home/user\n" + string(id) + "\nblue\n"},
		{"sudo id -u", "0\n"},
		{"nproc; df -BM --output=size / | tail -1 | tr -d ' M' | awk '{print ($1 > 3500)}'", "1\n1\n"},
		{"cat /proc/1/comm", "init\n"},
		{"date -u +%Y", time.Now().UTC().Format("2006\n")},
	} {
		if res := run(tt.shell); string(res.Stdout) != tt.want {
			t.Errorf("%s: %q (stderr %q, %s), want %q", tt.shell, res.Stdout, res.Stderr, res.End.Status, tt.want)
		}
	}
	if res := run("exit 7"); res.End.ExitCode != 7 {
		t.Errorf("exit 7: %+v", res.End)
	}

	data := make([]byte, 3<<20)
	_, _ = rand.Read(data)
	ref := host.FileRef{ID: string(id), Path: "/home/user/blob"}
	if _, _, err := agent.WriteFile(ctx, ref, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	var back bytes.Buffer
	err = agent.ReadFile(ctx, ref, func(int64) error { return nil }, func(b []byte) error { back.Write(b); return nil })
	if err != nil || sha256.Sum256(back.Bytes()) != sha256.Sum256(data) {
		t.Errorf("a file came back as %d bytes, %v", back.Len(), err)
	}
	run("sync")
	u, err := agent.Metrics(ctx, string(id))
	if err != nil || u.RSSBytes == 0 || u.OverlayBytes < int64(len(data)) || u.OverlayBytes > 64<<20 {
		t.Errorf("metrics: %+v, %v", u, err)
	}
	console, _, err := agent.Console(string(id), 0, 0)
	if err != nil || !strings.Contains(string(console), "dormouse-guest") {
		t.Errorf("console: %q, %v", console, err)
	}
	if _, err := agent.Destroy(ctx, string(id), ""); err != nil {
		t.Fatal(err)
	}
}
