package host_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/disk/dm"
	"github.com/dormouse-sandbox/dormouse/disk/qcow"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/netns"
	"github.com/dormouse-sandbox/dormouse/pager"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/snapshot"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/vmm/qemu"
)

// testInstance is in the name of everything that tests have on the machine: two
// runs at once, of two checkouts, do not sweep each other's.
var testInstance = fmt.Sprintf("h%04x", os.Getpid()&0xffff)

// realHost opens an agent on the real mechanisms, under software emulation.
func realHost(t *testing.T, change ...func(*host.Config)) *host.Agent {
	t.Helper()
	agent, _ := realHostAndTemplates(t, change...)
	return agent
}

// realSandboxes are sandboxes of an agent on the real mechanisms.
type realSandboxes struct {
	t     *testing.T
	agent *host.Agent
}

func (r realSandboxes) create(template string, memMiB int) sandbox.ID {
	r.t.Helper()
	id := sandbox.NewID()
	status, err := r.agent.Create(r.t.Context(), host.CreateRequest{
		ID: id, Deadline: time.Now().Add(time.Hour),
		Spec: sandbox.Spec{Template: template, VCPUs: 1, MemMiB: memMiB, DiskMiB: 4096},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Logf("created (%s): %v", status.Start, status.Phases)
	return id
}

// run returns all that a shell line prints.
func (r realSandboxes) run(id sandbox.ID, shell string) string {
	r.t.Helper()
	res, err := r.agent.Exec(r.t.Context(), string(id), host.Command{Cmd: "/bin/sh", Args: []string{"-c", shell}}, nil, 8<<20)
	if err != nil {
		r.t.Fatal(err)
	}
	return strings.TrimSpace(string(res.Stdout) + string(res.Stderr))
}

func (r realSandboxes) pause(id sandbox.ID) host.Saved {
	r.t.Helper()
	saved, err := r.agent.Pause(r.t.Context(), string(id))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Logf("paused: %v; memory %+v, disk %+v, %d bytes", saved.Phases, saved.Memory, saved.Disk, saved.Written)
	return saved
}

func (r realSandboxes) resume(id sandbox.ID) {
	r.t.Helper()
	_, phases, err := r.agent.Resume(r.t.Context(), host.ResumeRequest{ID: id, Deadline: time.Now().Add(time.Hour)})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Logf("resumed: %v", phases)
}

func (r realSandboxes) fork(id sandbox.ID, n int) []sandbox.ID {
	r.t.Helper()
	var reqs []host.CreateRequest
	var ids []sandbox.ID
	for range n {
		ids = append(ids, sandbox.NewID())
		reqs = append(reqs, host.CreateRequest{ID: ids[len(ids)-1], Deadline: time.Now().Add(time.Hour)})
	}
	copies, saved, err := r.agent.Fork(r.t.Context(), string(id), reqs)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, c := range copies {
		if c.Err != nil {
			r.t.Fatal(c.Err)
		}
	}
	r.t.Logf("forked into %d: %v, stopped %v", n, saved.Phases, saved.Stopped)
	return ids
}

func realHostAndTemplates(t *testing.T, change ...func(*host.Config)) (*host.Agent, *template.Store) {
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
	if err := testkit.Program("../cmd/dormouse-guest", guest); err != nil {
		t.Fatal(err)
	}
	assets, err := templates.Prepare(t.Context(), guest, nil)
	if err != nil {
		t.Fatal(err)
	}
	vmm, err := qemu.New(qemu.Config{Accelerator: testkit.Accelerator(), Reason: "the test says so", Log: log})
	if err != nil {
		t.Fatal(err)
	}
	networks, err := netns.Open(t.Context(), netns.Config{Instance: testInstance, Prepare: 1, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	runDir, err := os.MkdirTemp("/run", "dmtest-")
	if err != nil {
		t.Fatal(err)
	}
	store, pages := realSnapshots(t, dir, runDir, log)
	images := &host.StoreImages{Store: store, Pages: pages, Log: log}
	disks, closeDisks := realDisks(t, images, log)
	cfg := host.Config{
		Snapshots: store, Warm: true, Images: images,
		Dir: filepath.Join(dir, "host"), RunDir: runDir, Instance: testInstance,
		VMM: vmm, Disks: disks, Networks: host.Slots{Network: networks}, Templates: templates,
		Kernel: assets.Kernel.Image, Initrd: assets.Initrd, UIDBase: testUIDs, Log: log,
	}
	for _, c := range change {
		c(&cfg)
	}
	agent, err := host.Open(t.Context(), cfg)
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
		if err := errors.Join(closeDisks(), pages.Stop(ctx), store.Close()); err != nil {
			t.Error(err)
		}
		if err := networks.Close(); err != nil {
			t.Error(err)
		}
		if err := netns.Remove(ctx, netns.Config{Instance: testInstance}); err != nil {
			t.Error(err)
		}
		if err := errors.Join(os.RemoveAll(runDir), os.RemoveAll(runDir+".pages"), os.RemoveAll("/dev/dormouse-"+testInstance)); err != nil {
			t.Error(err)
		}
	})
	return agent, templates
}

// realDisks are the server's: where the kernel has device-mapper, disks are made by
// it, and qcow takes over what others have left.
func realDisks(t *testing.T, images *host.StoreImages, log *slog.Logger) (drivers []disk.Driver, closeAll func() error) {
	t.Helper()
	closeAll = func() error { return nil }
	mapper, err := dm.Open(dm.Config{Instance: testInstance, NodeDir: "/dev/dormouse-" + testInstance, Log: log})
	switch {
	case err == nil:
		drivers, closeAll, images.Sealer = append(drivers, mapper), mapper.Close, mapper
	case !sandbox.Is(err, sandbox.KindUnsupported):
		t.Fatal(err)
	}
	overlays, err := qcow.New(qcow.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return append(drivers, overlays), closeAll
}

// testUIDs is the first user ID of VMs.
const testUIDs = 1_999_000_000

// realSnapshots opens a store with its page server, which is the real program's.
func realSnapshots(t *testing.T, dir, runDir string, log *slog.Logger) (*snapshot.Store, *pager.Pager) {
	t.Helper()
	const pagerUID = testUIDs + 60000
	program := filepath.Join(dir, "dormouse")
	if err := testkit.Program("../cmd/dormouse", program); err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(dir, "snapshots")
	store, err := snapshot.Open(snapshot.Config{Dir: at, Group: pagerUID})
	if err != nil {
		t.Fatal(err)
	}
	pages, err := pager.Open(t.Context(), pager.Config{
		Dir: runDir + ".pages", Command: []string{program, "pager", "--store", at}, UID: pagerUID, GID: pagerUID, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	return store, pages
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

// TestRealPause takes a real VM through pauses, a snapshot and a fork: processes
// and files go on where they were.
func TestRealPause(t *testing.T) {
	notInALab(t)
	r := realSandboxes{t, realHost(t)}
	ctx, agent := t.Context(), r.agent
	id := r.create("base", 512)
	r.run(id, "head -c 3000000 /dev/urandom > big; sha256sum big > sum; mkdir -p /tmp/x; echo 1 > /tmp/x/generation")
	r.run(id, "nohup sh -c 'i=0; while sleep 0.1; do i=$((i+1)); echo $i > /tmp/count; done' > /dev/null 2>&1 & echo $! > /tmp/pid")
	for generation := range 3 {
		r.pause(id)
		r.resume(id)
		if got := r.run(id, "sha256sum -c sum"); got != "big: OK" {
			t.Errorf("generation %d: %q", generation, got)
		}
		before := r.run(id, "cat /tmp/count")
		testkit.Eventually(t, time.Minute, "the process runs on", func() bool { return r.run(id, "cat /tmp/count") != before })
		r.run(id, "head -c 1000000 /dev/urandom >> big; sha256sum big > sum; sync")
	}
	info, saved, err := agent.Snapshot(ctx, string(id), "kept", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("snapshot: %v, stopped %v; %+v", saved.Phases, saved.Stopped, info)
	r.run(id, "echo 2 > /tmp/x/generation; rm big; sync")
	if got := r.run(r.create("kept", 512), "cat /tmp/x/generation; sha256sum -c sum"); got != "1\nbig: OK" {
		t.Errorf("what is made of the snapshot says %q", got)
	}
	if got := r.run(r.create("base", 512), "ls -A /tmp"); strings.Contains(got, "x") {
		t.Errorf("another one has %q", got)
	}
	copied := r.fork(id, 1)[0]
	if got := r.run(copied, "hostname; cat /tmp/x/generation; ls big"); !strings.HasPrefix(got, string(copied)+"\n2\n") {
		t.Errorf("the copy says %q", got)
	}
	if console, _, err := agent.Console(string(copied), 0, 0); err != nil || !strings.Contains(string(console), "dormouse-guest") {
		t.Errorf("the copy's console: %q, %v", console, err)
	}
	r.powersOff(copied)
}

// powersOff lets a guest switch itself off. QEMU 7.2 does not survive that in a
// restored guest whose network card has the feature guest_announce.
func (r realSandboxes) powersOff(id sandbox.ID) {
	r.t.Helper()
	_, _ = r.agent.Exec(r.t.Context(), string(id), // which ends with the guest
		host.Command{Cmd: "/bin/sh", Args: []string{"-c", "sudo python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x4321fedc)'"}}, nil, 1<<20)
	var end host.Status
	testkit.Eventually(r.t, time.Minute, "it has powered itself off", func() bool {
		all := r.agent.List()
		i := slices.IndexFunc(all, func(s host.Status) bool { return s.ID == id && s.Cause != "" })
		if i >= 0 {
			end = all[i]
		}
		return i >= 0
	})
	if end.Cause != sandbox.CauseGuestExit {
		r.t.Errorf("it ended by %s: %s", end.Cause, end.Detail)
	}
}
