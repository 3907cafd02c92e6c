package account_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/guest/account"
)

const (
	passwd = "# comment\nroot:x:0:0:root:/root:/bin/bash\nbroken:x:a:b::/:\nshort:x:1\n\nuser:x:1000:1000::/home/user:/bin/sh\nlast:x:7:8::/l:/bin/sh"
	group  = "root:x:0:\nsudo:x:27:user,other\nuser:x:1000:user\nwheel:x:10:usera\nbad:x:-1:user\n"
)

func dir(t testing.TB) account.Dir {
	t.Helper()
	d := t.TempDir()
	for name, text := range map[string]string{"passwd": passwd, "group": group} {
		if err := os.WriteFile(filepath.Join(d, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return account.Dir(d)
}

func TestUser(t *testing.T) {
	d := dir(t)
	got, err := d.User("user")
	want := account.User{Name: "user", UID: 1000, GID: 1000, Groups: []uint32{27}, Home: "/home/user", Shell: "/bin/sh"}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(diff, err)
	}
	if u, err := d.ByUID(7); err != nil || u.Name != "last" {
		t.Errorf("a last line without a newline: %v, %v", u, err)
	}
	for _, name := range []string{"", "broken", "short", "USER", "user:x", "# comment"} {
		if _, err := d.User(name); !errors.Is(err, account.ErrUnknown) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := account.Dir(t.TempDir()).User("root"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an image without passwd: %v", err)
	}
}

func TestNames(t *testing.T) {
	n := dir(t).Names()
	if got := []string{n.User(0), n.User(1000), n.User(4), n.Group(27), n.Group(99)}; !cmp.Equal(got, []string{"root", "user", "4", "sudo", "99"}) {
		t.Error(got)
	}
}

func TestResolve(t *testing.T) {
	u := account.User{Home: "/home/user"}
	for _, tt := range []struct{ path, workdir, want string }{
		{"", "", "/home/user"},
		{"", "/work", "/work"},
		{"", "~/w", "/home/user/w"},
		{"", "w", "/home/user/w"},
		{"a/b", "", "/home/user/a/b"},
		{"a/b", "/work", "/work/a/b"},
		{"~", "/work", "/home/user"},
		{"~/a", "/work", "/home/user/a"},
		{"~other/a", "", "/home/user/~other/a"},
		{"/a/../b/", "/work", "/b"},
		{"../../../x", "", "/x"},
	} {
		if got, err := u.Resolve(tt.path, tt.workdir); err != nil || got != tt.want {
			t.Errorf("%q in %q: %q, %v, want %q", tt.path, tt.workdir, got, err, tt.want)
		}
	}
	if _, err := u.Resolve("a\x00b", ""); err == nil {
		t.Error("a NUL byte is accepted")
	}
}

func FuzzResolve(f *testing.F) {
	f.Add("~/a", "w", "/home/user")
	f.Add("../..", "~", "")
	f.Fuzz(func(t *testing.T, path, workdir, home string) {
		got, err := account.User{Home: home}.Resolve(path, workdir)
		if err != nil {
			if !strings.ContainsRune(path, 0) {
				t.Error(err)
			}
			return
		}
		if !filepath.IsAbs(got) || filepath.Clean(got) != got {
			t.Errorf("%q is not absolute and clean", got)
		}
	})
}

// FuzzAccounts: the root of a guest writes these files. Whoever is found is
// named as he was asked for.
func FuzzAccounts(f *testing.F) {
	f.Add(passwd, group, "user")
	f.Add("a:b:1:2:c:d:e\na:::::::\n:x:0:0:::\n", "::::\nx:x:4294967296:\n", "a")
	f.Add("\xff:x:-1:1:::\x00", "\x00", "\xff")
	d := account.Dir(f.TempDir())
	f.Fuzz(func(t *testing.T, passwd, group, name string) {
		for file, text := range map[string]string{"passwd": passwd, "group": group} {
			if err := os.WriteFile(filepath.Join(string(d), file), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		u, err := d.User(name)
		if err == nil && (u.Name != name || name == "") {
			t.Errorf("asked for %q, found %+v", name, u)
		}
		if err != nil {
			return
		}
		if again, err := d.ByUID(u.UID); err != nil || again.UID != u.UID {
			t.Errorf("%q has uid %d, which is nobody's: %+v, %v", name, u.UID, again, err)
		}
	})
}
