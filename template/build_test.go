package template_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
)

func TestBuildPublishesAWholeImage(t *testing.T) {
	newFakes(t, fakeRoot)
	cfg := config(t)
	s := open(t, cfg)
	r := recipe()
	r.ImageMiB = 0
	made := build(t, s, r)

	fsck(t, made.Image)
	for _, tt := range []struct{ request, want string }{
		{"stat /usr/bin/sudo", "Mode:  04755"},
		{"stat /home/user", "User:  1000   Group:  1000"},
		{"stat /usr/bin/link", "Type: symlink"},
		{"stat /usr/bin/hard", "Links: 2"},
		{"cat /etc/sudoers.d/user", "user ALL=(ALL:ALL) NOPASSWD:ALL"},
		{"stat /etc/sudoers.d/user", "Mode:  0440"},
		{"stat /etc/machine-id", "Type: regular"}, // the link out of the tree is gone
		{"cat /etc/hostname", "sandbox"},
	} {
		if got := debugfs(t, made.Image, tt.request); !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q is not in\n%s", tt.request, tt.want, got)
		}
	}
	if got := debugfs(t, made.Image, "cat /etc/resolv.conf"); got != "" {
		t.Errorf("the host's resolver is in the image: %q", got)
	}
	if got := debugfs(t, made.Image, "ls /etc/ssh"); strings.Contains(got, "ssh_host") {
		t.Errorf("a host key is in the image: %s", got)
	}
	info, err := os.Stat(made.Image)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o444 {
		t.Errorf("image has mode %v", info.Mode())
	}
	if made.AllocatedBytes > 24<<20 || made.ImageBytes < 256<<20 || made.ImageBytes%(64<<20) != 0 {
		t.Errorf("image is %d bytes, %d allocated: not sparse, or not rounded", made.ImageBytes, made.AllocatedBytes)
	}
	if made.DefaultUser != "user" || made.DefaultWorkdir != "/home/user" || made.BuiltAt.IsZero() {
		t.Errorf("template is %+v", made)
	}
	list, err := s.List()
	if err != nil || len(list) != 1 || list[0].Digest != made.Digest || list[0].Image != made.Image {
		t.Errorf("list is %+v, %v", list, err)
	}
	noTemp(t, cfg)
}

func TestSameRecipeIsBuiltOnce(t *testing.T) {
	f := newFakes(t, fakeRoot)
	cfg := config(t)
	s := open(t, cfg)
	first := build(t, s, recipe())
	again := build(t, s, recipe())
	if f.runs(t, "mmdebstrap") != 1 || again.Digest != first.Digest {
		t.Errorf("%d runs, digests %s and %s", f.runs(t, "mmdebstrap"), first.Digest, again.Digest)
	}
	other := cfg
	other.Dir = t.TempDir()
	renamed := recipe()
	renamed.Name, renamed.Packages = "other", []string{"sudo", "sudo"}
	if got := build(t, open(t, other), renamed); f.runs(t, "mmdebstrap") != 1 || got.Digest != first.Digest || got.Name != "other" {
		t.Errorf("another store does not use the cache: %d runs, %+v", f.runs(t, "mmdebstrap"), got)
	}
	changed := recipe()
	changed.Packages = append(changed.Packages, "git")
	second := build(t, s, changed)
	if f.runs(t, "mmdebstrap") != 2 || second.Image == first.Image {
		t.Errorf("a changed recipe was not built: %d runs", f.runs(t, "mmdebstrap"))
	}
	if _, err := os.Stat(first.Image); err != nil {
		t.Errorf("the image that sandboxes may use is gone: %v", err)
	}
}

func TestCacheMayVanish(t *testing.T) {
	f := newFakes(t, fakeRoot)
	cfg := config(t)
	s := open(t, cfg)
	build(t, s, recipe())
	if err := os.RemoveAll(cfg.Cache); err != nil {
		t.Fatal(err)
	}
	build(t, s, recipe())
	if f.runs(t, "mmdebstrap") != 1 {
		t.Errorf("%d runs: what is published needs no cache", f.runs(t, "mmdebstrap"))
	}
	changed := recipe()
	changed.Revision = "2"
	build(t, s, changed)
}

func TestBadCacheIsBuiltAgain(t *testing.T) {
	f := newFakes(t, fakeRoot)
	cfg := config(t)
	build(t, open(t, cfg), recipe())
	found, _ := filepath.Glob(filepath.Join(cfg.Cache, "image/*/root.ext4"))
	if len(found) != 1 {
		t.Fatalf("cache holds %v", found)
	}
	if err := os.RemoveAll(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(found[0], 1000); err != nil {
		t.Fatal(err)
	}
	fsck(t, build(t, open(t, cfg), recipe()).Image)
	if f.runs(t, "mmdebstrap") != 2 {
		t.Errorf("%d runs", f.runs(t, "mmdebstrap"))
	}
}

func TestBuildIsDeterministic(t *testing.T) {
	newFakes(t, fakeRoot+"\ndate +%N >\"$root/tmp/now\"; sleep 1.1") // so that no two clocks agree by chance
	first := build(t, open(t, config(t)), recipe())
	second := build(t, open(t, config(t)), recipe())
	if first.Digest != second.Digest {
		a, _ := os.ReadFile(first.Image)
		b, _ := os.ReadFile(second.Image)
		for i := range a {
			if a[i] != b[i] {
				t.Fatalf("digests differ, from byte %#x on", i)
			}
		}
	}
}

func TestConcurrentBuildersShareOneBuild(t *testing.T) {
	f := newFakes(t, fakeRoot+"\nsleep 0.3")
	cfg := config(t)
	var wg sync.WaitGroup
	digests := make([]string, 6)
	for i := range digests {
		wg.Go(func() {
			s, err := template.Open(cfg) // flock works between open files: each store is like a process
			if err != nil {
				t.Error(err)
				return
			}
			made, err := s.Build(context.Background(), recipe(), nil)
			if err != nil {
				t.Error(err)
			}
			digests[i] = made.Digest
		})
	}
	wg.Wait()
	for _, d := range digests {
		if d != digests[0] || d == "" {
			t.Errorf("digests %v", digests)
		}
	}
	if got := f.runs(t, "mmdebstrap"); got != 1 {
		t.Errorf("%d builds", got)
	}
	noTemp(t, cfg)
}

func TestBuildFailures(t *testing.T) {
	for _, tt := range []struct {
		name       string
		mmdebstrap string
		mke2fs     string
		change     func(*template.Recipe, *template.Config)
		kind       sandbox.Kind
		says       string
	}{
		{
			name:       "mmdebstrap fails: the end of its log is in the error",
			mmdebstrap: "echo begin; seq 1000; echo 'E: Unable to locate package nonesuch' >&2; exit 3",
			kind:       sandbox.KindInvalid, says: "E: Unable to locate package nonesuch",
		},
		{
			name:       "mmdebstrap fails for a reason that is nobody's",
			mmdebstrap: "echo begin; seq 1000; echo 'E: something odd' >&2; exit 3",
			kind:       sandbox.KindInternal, says: "E: something odd",
		},
		{
			name: "mke2fs fails", mmdebstrap: fakeRoot, mke2fs: "echo 'mke2fs: bad magic' >&2; exit 1",
			kind: sandbox.KindInternal, says: "bad magic",
		},
		{
			name:       "the disk is full under mmdebstrap",
			mmdebstrap: "echo 'cannot write: No space left on device' >&2; seq 100; exit 1",
			kind:       sandbox.KindNoSpace, says: "exit status 1",
		},
		{
			name: "the image is too small for its content", mmdebstrap: fakeRoot + `dd if=/dev/zero of="$root/big" bs=1M count=80 2>/dev/null`,
			kind: sandbox.KindInvalid, says: "64 MiB is too small: the content needs 1",
		},
		{
			name: "the keyring is missing", mmdebstrap: fakeRoot,
			change: func(_ *template.Recipe, c *template.Config) { c.Keyring = "/nonexistent" },
			kind:   sandbox.KindUnsupported, says: "apt-get install debian-archive-keyring",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFakes(t, tt.mmdebstrap)
			if tt.mke2fs != "" {
				f.script(t, "mke2fs", tt.mke2fs)
			}
			cfg, r := config(t), recipe()
			if tt.change != nil {
				tt.change(&r, &cfg)
			}
			s := open(t, cfg)
			_, err := s.Build(t.Context(), r, nil)
			if !sandbox.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
			}
			if _, err := s.Get(r.Name); !sandbox.Is(err, sandbox.KindNotFound) {
				t.Errorf("get after a failed build: %v", err)
			}
			nothingLeft(t, cfg)
		})
	}
}

func TestMissingToolIsNamedWithItsCure(t *testing.T) {
	testkit.Root(t)
	cfg := config(t)
	s := open(t, cfg)
	t.Setenv("PATH", t.TempDir())
	_, err := os.Stat("/usr/sbin/mmdebstrap") // where PATH does not count
	testkit.Require(t, "no-mmdebstrap-in-sbin", err != nil, "mmdebstrap is in sbin")
	_, err = s.Build(t.Context(), recipe(), nil)
	if !sandbox.Is(err, sandbox.KindUnsupported) || !strings.Contains(err.Error(), "apt-get install mmdebstrap") {
		t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
	}
	nothingLeft(t, cfg)
}

// A real full disk: the cache lies on a tmpfs of 4 MiB.
func TestFullDiskIsNoSpace(t *testing.T) {
	for name, script := range map[string]string{
		"while packages are installed": `mkdir -p "$root"; dd if=/dev/zero of="$root/big" bs=1M count=20`,
		"while the image is made":      fakeRoot + `head -c 2M /dev/urandom >"$root/usr/big"`,
	} {
		t.Run(name, func(t *testing.T) {
			newFakes(t, script)
			cfg := config(t)
			if err := os.Mkdir(cfg.Cache, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("tmpfs", cfg.Cache, "tmpfs", 0, "size=4m"); err != nil {
				testkit.Require(t, "mount", false, err.Error())
			}
			t.Cleanup(func() {
				if err := testkit.Unmount(cfg.Cache); err != nil {
					t.Errorf("unmount: %v", err)
				}
			})
			s := open(t, cfg)
			_, err := s.Build(t.Context(), recipe(), nil)
			if !sandbox.Is(err, sandbox.KindNoSpace) {
				t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
			}
			nothingLeft(t, cfg)
		})
	}
}

func TestCancelledBuildEndsItsTools(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	newFakes(t, "mkdir \"$root\"; sh -c 'exec 9>"+pipe+"; echo started >&9; sleep 1000' & wait")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := config(t)
	s := open(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := s.Build(ctx, recipe(), nil)
		done <- err
	}()
	reader, err := os.Open(pipe)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reader.Close() }()
	if _, err := reader.Read(make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; !sandbox.Is(err, sandbox.KindTransient) {
		t.Errorf("cancelled build: %v", err)
	}
	// The grandchild holds the pipe open as long as it lives.
	_ = reader.SetReadDeadline(time.Now().Add(20 * time.Second))
	var rest bytes.Buffer
	if _, err := rest.ReadFrom(reader); err != nil {
		t.Errorf("the tool's child is still there: %v", err)
	}
	nothingLeft(t, cfg)
}

func TestWaitingForABuilderCanBeCancelled(t *testing.T) {
	newFakes(t, fakeRoot+"\nsleep 1000")
	cfg := config(t)
	s := open(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	running, done := make(chan struct{}, 100), make(chan struct{})
	go func() {
		defer close(done)
		_, _ = s.Build(ctx, recipe(), func(template.Event) { running <- struct{}{} }) // cancelled below
	}()
	<-running
	waiting, stop := context.WithCancel(t.Context())
	_, err := open(t, cfg).Build(waiting, recipe(), func(e template.Event) {
		if strings.Contains(e.Line, "another process builds this template") {
			stop()
		}
	})
	stop()
	if !sandbox.Is(err, sandbox.KindTransient) {
		t.Errorf("cancelled wait: %v", err)
	}
	cancel()
	<-done
	nothingLeft(t, cfg)
}

func TestProgressTellsStepsInOrder(t *testing.T) {
	newFakes(t, "echo 'I: extracting archives...'\n"+fakeRoot)
	var steps []string
	var lines int
	_, err := open(t, config(t)).Build(t.Context(), recipe(), func(e template.Event) {
		if len(steps) == 0 || steps[len(steps)-1] != e.Step {
			steps = append(steps, e.Step)
		}
		if strings.Contains(e.Line, "extracting archives") && e.Fraction > 0 {
			lines++
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(steps, ", "); got != "install packages, make image, publish" || lines != 1 {
		t.Errorf("steps %s; %d lines", got, lines)
	}
}
