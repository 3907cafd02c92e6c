package boot

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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

// TestRewriteLeavesNothingOfTheOld, whichever is longer.
func TestRewriteLeavesNothingOfTheOld(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hostname")
	for _, want := range []string{"a-new-one\n", "another\n", "one-that-is-longer\n", "another-of-that-len\n", ""} {
		if err := rewrite(path, want); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
}

// TestRewriteOfWhatIsRightAlready, in a place that cannot be written.
func TestRewriteOfWhatIsRightAlready(t *testing.T) {
	const path = "/proc/sys/kernel/ostype"
	if err := rewrite(path, "Linux\n"); err != nil {
		t.Error(err)
	}
	if err := rewrite(path, "another\n"); err == nil {
		t.Error("the test's file can be written")
	}
}

// TestFilesThatAreNone: the root of a guest may have put anything there.
func TestFilesThatAreNone(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "hosts")
	if err := unix.Mkfifo(pipe, 0o644); err != nil {
		t.Fatal(err)
	}
	if text, err := readFile(pipe); err == nil {
		t.Errorf("a pipe has %q", text)
	}
	if err := rewrite(pipe, "127.0.0.1 localhost\n"); err != nil {
		t.Fatal(err)
	}
	if text, err := readFile(pipe); err != nil || text != "127.0.0.1 localhost\n" {
		t.Errorf("%q, %v", text, err)
	}
	if text, err := readFile("/dev/zero"); err == nil {
		t.Errorf("a device has %d bytes", len(text))
	}
	large := filepath.Join(dir, "large")
	if err := os.WriteFile(large, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(large, 1<<40); err != nil {
		t.Fatal(err)
	}
	if _, err := readFile(large); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("a file of a TiB: %v", err)
	}
}

func TestMachineID(t *testing.T) {
	const old = "0123456789abcdef0123456789abcdef\n"
	isNew := regexp.MustCompile(`^[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}\n$`)
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o444); err != nil {
			t.Fatal(err)
		}
		return path
	}
	read := func(path string) string {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	etc, dbus := file("etc", old), filepath.Join(dir, "dbus")
	if err := os.Symlink("etc", dbus); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(dir, "missing")
	if err := writeMachineID([]string{etc, dbus, missing}); err != nil {
		t.Fatal(err)
	}
	first := read(etc)
	if !isNew.MatchString(first) || read(dbus) != first {
		t.Errorf("%q, and by the link %q", first, read(dbus))
	}
	if info, err := os.Lstat(dbus); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link is %v, %v", info, err)
	}
	if _, err := os.Lstat(missing); err == nil {
		t.Error("a file was made that the image does not have")
	}
	if err := writeMachineID([]string{etc}); err != nil || read(etc) == first {
		t.Errorf("once more: %q, %v", read(etc), err)
	}
	for name, text := range map[string]string{"empty": "", "uninitialized": "uninitialized\n", "long": old + old} {
		path := file(name, text)
		if err := writeMachineID([]string{path}); err != nil || !isNew.MatchString(read(path)) {
			t.Errorf("%s: %q, %v", name, read(path), err)
		}
	}
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := writeMachineID([]string{pipe, etc}); err == nil || read(etc) == first {
		t.Errorf("a pipe: %v", err)
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

// FuzzHostsFile: the root of a guest writes this file. Ours is the last line of
// it, what he wrote stays, and writing it again changes nothing.
func FuzzHostsFile(f *testing.F) {
	f.Add("127.0.0.1\tlocalhost\n10.0.0.9 db", "box")
	f.Add("# dormouse\n\n\x00\xff", "b-x")
	f.Fuzz(func(t *testing.T, old, name string) {
		if strings.ContainsAny(name, "\n") {
			return // no name of a host
		}
		once := hostsFile(old, name)
		if !strings.HasSuffix(once, "127.0.1.1 "+name+" "+ours+"\n") {
			t.Errorf("it ends otherwise: %q", once)
		}
		for line := range strings.Lines(old) {
			line = strings.TrimRight(line, "\n")
			if !strings.HasSuffix(line, ours) && !strings.Contains(once, line+"\n") {
				t.Errorf("%q is lost", line)
			}
		}
		if twice := hostsFile(once, name); twice != once {
			t.Errorf("once %q, twice %q", once, twice)
		}
	})
}
