package template_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/template"
)

// fakeRoot is a mmdebstrap that fills its target with a small tree: what counts
// for an image is there (setuid, another owner, a link, a hole, a young file).
const fakeRoot = `
mkdir -p "$root/etc/ssh" "$root/usr/bin" "$root/home/user" "$root/var/log" "$root/tmp"
echo sudo >"$root/usr/bin/sudo"; chmod 4755 "$root/usr/bin/sudo"; touch -d 2023-05-06T07:08:09Z "$root/usr/bin/sudo"
ln -s sudo "$root/usr/bin/link"
ln "$root/usr/bin/sudo" "$root/usr/bin/hard"
chown 1000:1000 "$root/home/user"
truncate -s 40M "$root/usr/hole"
echo secret >"$root/etc/ssh/ssh_host_ed25519_key"
echo nameserver 192.0.2.1 >"$root/etc/resolv.conf"
echo host >"$root/etc/hostname"
ln -s /etc/passwd "$root/etc/machine-id"
`

// fakes is a PATH on which mmdebstrap is a script; it counts its runs.
type fakes struct{ dir string }

func newFakes(t *testing.T, mmdebstrap string) fakes {
	t.Helper()
	testkit.Root(t)
	for _, tool := range []string{"/usr/sbin/mke2fs", "/usr/sbin/debugfs"} {
		_, err := os.Stat(tool)
		testkit.Require(t, "e2fsprogs", err == nil, tool+" does not exist")
	}
	f := fakes{t.TempDir()}
	f.script(t, "mmdebstrap", mmdebstrap)
	t.Setenv("PATH", f.dir+":"+os.Getenv("PATH"))
	return f
}

// script installs a tool; $root is the last absolute path of its arguments.
func (f fakes) script(t *testing.T, name, body string) {
	t.Helper()
	text := fmt.Sprintf("#!/bin/sh\nset -e\necho \"$@\" >>%s/%s.runs\nfor a; do case $a in /*) root=$a;; esac; done\n%s\n", f.dir, name, body)
	if err := os.WriteFile(filepath.Join(f.dir, name), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

func (f fakes) runs(t *testing.T, name string) int {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(f.dir, name+".runs"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return bytes.Count(data, []byte("\n"))
}

func config(t *testing.T) template.Config {
	t.Helper()
	dir := t.TempDir()
	keyring := filepath.Join(dir, "keyring.gpg")
	if err := os.WriteFile(keyring, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	return template.Config{Dir: filepath.Join(dir, "published"), Cache: filepath.Join(dir, "cache"), Keyring: keyring}
}

func open(t *testing.T, cfg template.Config) *template.Store {
	t.Helper()
	s, err := template.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func recipe() template.Recipe {
	return template.Recipe{Name: "small", Suite: "bookworm", Packages: []string{"sudo"}, User: "user", ImageMiB: 64}
}

func build(t *testing.T, s *template.Store, r template.Recipe) template.Template {
	t.Helper()
	made, err := s.Build(t.Context(), r, nil)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// nothingLeft fails when there are temporary files, or anything published.
func nothingLeft(t *testing.T, cfg template.Config) {
	t.Helper()
	noTemp(t, cfg)
	for _, pattern := range []string{"*/template.json", ".image/*", ".kernel/*", ".initramfs/*"} {
		if found, _ := filepath.Glob(filepath.Join(cfg.Dir, pattern)); len(found) > 0 {
			t.Errorf("published in spite of the error: %v", found)
		}
	}
	for _, pattern := range []string{"image/*", "kernel/*"} {
		if found, _ := filepath.Glob(filepath.Join(cfg.Cache, pattern)); len(found) > 0 {
			t.Errorf("cached in spite of the error: %v", found)
		}
	}
}

func noTemp(t *testing.T, cfg template.Config) {
	t.Helper()
	var found []string
	for _, dir := range []string{cfg.Dir, cfg.Cache} {
		err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
			if strings.Contains(filepath.Base(path), ".tmp-") || filepath.Dir(path) == filepath.Join(cfg.Cache, "work") {
				found = append(found, path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(found) > 0 {
		t.Errorf("temporary files left: %v", found)
	}
}

// debugfs asks one question about an image.
func debugfs(t *testing.T, image, request string) string {
	t.Helper()
	out, err := exec.CommandContext(context.Background(), "/usr/sbin/debugfs", "-R", request, image).Output()
	if err != nil {
		t.Fatalf("debugfs %s: %v", request, err)
	}
	return string(out)
}

func fsck(t *testing.T, image string) {
	t.Helper()
	out, err := exec.CommandContext(context.Background(), "/usr/sbin/e2fsck", "-fn", image).CombinedOutput()
	if err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
}
