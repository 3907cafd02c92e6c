package template_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
)

// TestMain turns the test binary into a builder, which a test kills.
func TestMain(m *testing.M) {
	if dirs := os.Getenv("TEMPLATE_TEST_BUILDER"); dirs != "" {
		if err := builder(strings.Split(dirs, ":")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func builder(dirs []string) error {
	s, err := template.Open(template.Config{Dir: dirs[0], Cache: dirs[1], Keyring: dirs[2]})
	if err != nil {
		return err
	}
	if _, err = s.Kernel(context.Background(), template.KernelConfig{}, nil); err != nil {
		return err
	}
	if _, err = s.Build(context.Background(), recipe(), nil); err != nil {
		return err
	}
	if _, err = s.Import(context.Background(), tinyImport(), nil); err != nil {
		return err
	}
	if _, err = s.BuildDockerfile(context.Background(), tinyDockerfile(), nil); err != nil {
		return err
	}
	return s.Delete(context.Background(), "cooked")
}

func tinyDockerfile() template.Dockerfile {
	return template.Dockerfile{Name: "cooked", Context: tinyTar("Dockerfile", "FROM scratch\nCOPY Dockerfile /bin/\n")}
}

func tinyImport() template.Import {
	return template.Import{Name: "imported", From: template.Tar{Reader: tinyTar("bin/sh", "x")}}
}

// tinyTar needs no testing.T: a builder that is killed has none.
func tinyTar(name, text string) *bytes.Buffer {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	_ = w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(text))}) // cannot fail: it goes to memory
	_, _ = w.Write([]byte(text))
	_ = w.Close()
	return &buf
}

func builderCmd(t *testing.T, cfg template.Config, faults string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(),
		"TEMPLATE_TEST_BUILDER="+strings.Join([]string{cfg.Dir, cfg.Cache, cfg.Keyring}, ":"), "DORMOUSE_FAULT="+faults)
	return cmd
}

// fakeBoth is a mmdebstrap for images and for kernels.
func fakeBoth(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	writeKernelTree(t, dir)
	return `case "$*" in *--variant=extract*) mkdir -p "$root"; cp -r ` + dir + `/. "$root/"; exit 0;; esac` + fakeRoot
}

// durable lists the steps of a whole build: every point at which it may die.
func durable(t *testing.T) []string {
	t.Helper()
	var points []string
	fault.Observe(func(point string) {
		if !slices.Contains(points, point) {
			points = append(points, point)
		}
	})
	defer fault.Observe(nil)
	cfg := config(t)
	if err := builder([]string{cfg.Dir, cfg.Cache, cfg.Keyring}); err != nil {
		t.Fatal(err)
	}
	return points
}

func TestKilledAtEveryStep(t *testing.T) {
	newFakes(t, fakeBoth(t))
	points := durable(t)
	for _, must := range []string{"template/unpack", "template/context", "template/step", "template/delete", "template/furnish", "template/image", "template/cache", "template/publish", "osfs/template-publish/rename"} {
		if !slices.Contains(points, must) {
			t.Fatalf("the steps %v do not hold %s", points, must)
		}
	}
	testkit.Each(t, points, func(t *testing.T, point string) {
		cfg := config(t)
		out, err := builderCmd(t, cfg, point+"=kill").CombinedOutput()
		if err == nil || !strings.Contains(err.Error(), "killed") {
			t.Fatalf("builder: %v\n%s", err, out)
		}
		afterCrash(t, cfg)
	})
}

// afterCrash asks for: all or nothing, no leftovers, and a build that works.
func afterCrash(t *testing.T, cfg template.Config) {
	t.Helper()
	s := open(t, cfg)
	noTemp(t, cfg)
	for _, name := range []string{"small", "imported", "cooked"} {
		switch made, err := s.Get(name); {
		case err == nil:
			fsck(t, made.Image)
		case !sandbox.Is(err, sandbox.KindNotFound):
			t.Errorf("get after the crash: %v", err)
		}
	}
	if _, err := s.List(); err != nil {
		t.Errorf("list after the crash: %v", err)
	}
	if k, err := s.Kernel(t.Context(), template.KernelConfig{}, nil); err != nil || k.Release != fakeRelease {
		t.Errorf("kernel after the crash: %+v, %v", k, err)
	}
	fsck(t, build(t, s, recipe()).Image)
	imported, err := s.Import(t.Context(), tinyImport(), nil)
	if err != nil {
		t.Fatal(err)
	}
	fsck(t, imported.Image)
	cooked, err := s.BuildDockerfile(t.Context(), tinyDockerfile(), nil)
	if err != nil {
		t.Fatal(err)
	}
	fsck(t, cooked.Image)
	noTemp(t, cfg)
}

func TestFailedAtEveryStep(t *testing.T) {
	newFakes(t, fakeBoth(t))
	testkit.Each(t, durable(t), func(t *testing.T, point string) {
		cfg := config(t)
		out, err := builderCmd(t, cfg, point+"=error").CombinedOutput()
		if err == nil || !strings.Contains(string(out), fault.ErrInjected.Error()) {
			t.Fatalf("builder: %v\n%s", err, out)
		}
		if _, err := os.Stat(filepath.Join(cfg.Cache, "work")); err == nil {
			noTemp(t, cfg)
		}
		afterCrash(t, cfg)
	})
}

func TestKilledBuilderTakesItsToolsAlong(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	f := newFakes(t, "mkdir \"$root\"; sh -c 'exec 9>"+pipe+"; echo started >&9; sleep 1000' & wait")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := config(t)
	cmd := builderCmd(t, cfg, "")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	reader, err := os.Open(pipe)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reader.Close() }()
	if _, err := reader.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	live := open(t, cfg) // must not sweep what is alive
	if found, _ := filepath.Glob(filepath.Join(cfg.Cache, "work/*/root")); len(found) != 1 {
		t.Errorf("the running build's folder: %v", found)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	_ = reader.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := reader.Read(make([]byte, 1)); n != 0 || os.IsTimeout(err) {
		t.Errorf("the tool's child is still there: %v", err)
	}
	testkit.Eventually(t, 20*time.Second, "swept", func() bool {
		open(t, cfg)
		found, _ := filepath.Glob(filepath.Join(cfg.Cache, "work/*"))
		return len(found) == 0
	})
	f.script(t, "mmdebstrap", fakeRoot)
	fsck(t, build(t, live, recipe()).Image)
}
