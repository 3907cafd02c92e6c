package boot

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

func TestHostsFile(t *testing.T) {
	const local = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
	for name, tt := range map[string]struct{ old, want string }{
		"no file":           {"", local + "127.0.1.1 box # dormouse\n"},
		"the image's own":   {"127.0.0.1\tlocalhost\n10.0.0.9 db", "127.0.0.1\tlocalhost\n10.0.0.9 db\n127.0.1.1 box # dormouse\n"},
		"an earlier name":   {local + "127.0.1.1 old # dormouse\n1.2.3.4 x\n", local + "1.2.3.4 x\n127.0.1.1 box # dormouse\n"},
		"written once more": {local + "127.0.1.1 box # dormouse\n", local + "127.0.1.1 box # dormouse\n"},
	} {
		if got := hostsFile(tt.old, "box"); got != tt.want {
			t.Errorf("%s: got %q, want %q", name, got, tt.want)
		}
	}
}

func TestRewriteReplacesALink(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "resolv.conf")
	if err := os.Symlink("../run/systemd/resolve/stub-resolv.conf", path); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := rewrite(path, "nameserver 10.0.0.1\n"); err != nil {
			t.Fatal(err)
		}
	}
	if info, err := os.Lstat(path); err != nil || !info.Mode().IsRegular() {
		t.Errorf("%v, %v", info, err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "nameserver 10.0.0.1\n" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestParseSuper(t *testing.T) {
	testkit.Tool(t, "mke2fs")
	for _, block := range []string{"1024", "4096"} {
		image := filepath.Join(t.TempDir(), "disk")
		if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-b", block, image, "8M").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		data, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		blocks, size, err := parseSuper(data[1024:2048])
		if err != nil || blocks*size != 8<<20 {
			t.Errorf("block size %s: %d blocks of %d, %v", block, blocks, size, err)
		}
	}
}

func FuzzParseSuper(f *testing.F) {
	super := make([]byte, 1024)
	f.Add(super)
	super[0x38], super[0x39] = 0x53, 0xEF
	f.Add(super)
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) != 1024 {
			return
		}
		if _, size, err := parseSuper(data); err == nil && (size < 1024 || size > 64<<10) {
			t.Errorf("block size %d", size)
		}
	})
}

func TestModulesThatDoNotLoadAreNamed(t *testing.T) {
	dir := t.TempDir()
	if err := loadModules(dir); err != nil {
		t.Errorf("an empty folder: %v", err)
	}
	if err := loadModules(filepath.Join(dir, "missing")); err != nil {
		t.Errorf("no folder: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "10-nonsense.ko"), []byte("not a module"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := loadModules(dir); err == nil {
		t.Error("nonsense was loaded")
	}
}
