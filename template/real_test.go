package template_test

import (
	"bytes"
	"debug/elf"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/template"
)

// realStore publishes into a folder of its own and builds in the cache that all
// tests share: only the first run on a machine takes its minute.
func realStore(t *testing.T) (*template.Store, template.Config) {
	t.Helper()
	testkit.Root(t)
	testkit.Tool(t, "mmdebstrap")
	testkit.Require(t, "long", !testing.Short(), "it may download packages")
	cache := os.Getenv("DORMOUSE_CACHE")
	if cache == "" {
		cache = "/var/cache/dormouse"
	}
	cfg := template.Config{Dir: filepath.Join(t.TempDir(), "templates"), Cache: cache}
	return open(t, cfg), cfg
}

// guest stands in for the guest binary: this test is an ELF file too.
func guest(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRealAssets(t *testing.T) {
	s, cfg := realStore(t)
	a, err := s.Prepare(t.Context(), guest(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("kernel %s; base image %d MiB, %d MiB allocated", a.Kernel.Release, a.Base.ImageBytes>>20, a.Base.AllocatedBytes>>20)
	t.Run("a second time makes nothing anew", func(t *testing.T) {
		made := []string{a.Base.Image, a.Initrd, a.Kernel.Image}
		before := stat(t, made)
		began := time.Now()
		again, err := open(t, cfg).Prepare(t.Context(), guest(t), nil)
		if err != nil || again.Base.Digest != a.Base.Digest || again.Initrd != a.Initrd || again.Kernel != a.Kernel {
			t.Errorf("%+v, %v", again, err)
		}
		if took := time.Since(began); took > 20*time.Second { // it takes milliseconds, and hashes the guest binary
			t.Errorf("it took %v", took)
		}
		for i, after := range stat(t, made) {
			if !os.SameFile(before[i], after) || !before[i].ModTime().Equal(after.ModTime()) {
				t.Errorf("%s was made anew", made[i])
			}
		}
	})
	t.Run("image", func(t *testing.T) { realImage(t, a.Base) })
	t.Run("kernel", func(t *testing.T) { realKernel(t, a.Kernel) })
	t.Run("initramfs", func(t *testing.T) { realInitramfs(t, a) })
}

func stat(t *testing.T, paths []string) []os.FileInfo {
	t.Helper()
	var all []os.FileInfo
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, info)
	}
	return all
}

func realImage(t *testing.T, base template.Template) {
	fsck(t, base.Image)
	for _, tt := range []struct{ request, want string }{
		{"stat /usr/bin/sudo", "Mode:  04755"},
		{"stat /usr/bin/python", "Type: symlink"},
		{"stat /usr/bin/python3", "Inode:"},
		{"stat /usr/bin/git", "Mode:  0755"},
		{"stat /usr/bin/curl", "Mode:  0755"},
		{"stat /usr/bin/clear", "Mode:  0755"}, // ncurses-bin
		{"stat /etc/ssl/certs/ca-certificates.crt", "Type: regular"},
		{"stat /home/user", "User:  1000   Group:  1000"},
		{"cat /etc/passwd", "user:x:1000:1000::/home/user:/bin/bash"},
		{"cat /etc/sudoers.d/user", "NOPASSWD"},
		{"stat /etc/machine-id", "Size: 0"},
		{"stats", "Reserved GDT blocks:      127"}, // grows online to 1 TiB
	} {
		if got := debugfs(t, base.Image, tt.request); !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q is not in\n%s", tt.request, tt.want, got)
		}
	}
	if got := debugfs(t, base.Image, "ls -p /var/lib/apt/lists"); strings.Contains(got, "Packages") {
		t.Errorf("package lists are in the image:\n%s", got)
	}
	if base.AllocatedBytes > 400<<20 {
		t.Errorf("the image takes %d MiB on the disk", base.AllocatedBytes>>20)
	}
}

func realKernel(t *testing.T, k template.Kernel) {
	if !regexp.MustCompile(`^6\.1\.[0-9]+-[0-9]+-cloud-amd64$`).MatchString(k.Release) {
		t.Errorf("release %q", k.Release)
	}
	out := filepath.Join(t.TempDir(), "vmlinux")
	if err := template.ExtractELF(k.Image, out); err != nil {
		t.Fatal(err)
	}
	file, err := elf.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }() // read only
	if file.Machine != elf.EM_X86_64 || file.Type != elf.ET_EXEC || file.Section(".text") == nil {
		t.Errorf("the extracted kernel is %v %v", file.Machine, file.Type)
	}
}

func realInitramfs(t *testing.T, a template.Assets) {
	data, err := os.ReadFile(a.Initrd)
	if err != nil {
		t.Fatal(err)
	}
	list, files := unpack(t, data)
	at := map[string]int{}
	for i, line := range list {
		if _, name, ok := strings.Cut(line, "-"); ok && strings.Contains(line, " modules/") {
			name, _, _ = strings.Cut(name, ".ko")
			at[name] = i
		}
	}
	for _, pair := range [][2]string{
		{"virtio_ring", "virtio"},
		{"virtio", "virtio_mmio"},
		{"virtio", "virtio_blk"},
		{"failover", "net_failover"},
		{"net_failover", "virtio_net"},
		{"inet_diag", "tcp_diag"},
	} {
		if at[pair[0]] == 0 || at[pair[0]] >= at[pair[1]] {
			t.Errorf("%s is not loaded before %s:\n%s", pair[0], pair[1], strings.Join(list, "\n"))
		}
	}
	if at["overlay"] == 0 || at["virtio_rng"] == 0 {
		t.Errorf("a module is missing:\n%s", strings.Join(list, "\n"))
	}
	binary, err := os.ReadFile(guest(t))
	if err != nil || !bytes.Equal(files["init"], binary) {
		t.Errorf("/init has other bytes: %v", err)
	}
}
