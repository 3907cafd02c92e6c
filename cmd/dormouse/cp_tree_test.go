package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/internal/tree"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// treeFake is a server whose sandboxes have a disk, and a directory of ours.
func treeFake(t *testing.T) (f *fakeServer, here string) {
	t.Helper()
	f = newFake(t)
	f.add(boxA)
	f.trees.disk, here = t.TempDir(), t.TempDir()
	must(t, os.MkdirAll(f.trees.disk+"/home", 0o755), os.MkdirAll(f.trees.disk+"/srv", 0o755))
	return f, here
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// plant makes a directory with something of everything.
func plant(t *testing.T, dir string) {
	t.Helper()
	must(
		t, os.MkdirAll(dir+"/sub/empty", 0o755), os.WriteFile(dir+"/f", []byte("hello"), 0o644), os.WriteFile(dir+"/sub/tool", []byte("#!"), 0o700),
		os.Symlink("f", dir+"/link"), os.Symlink("/etc", dir+"/out"), os.Link(dir+"/f", dir+"/sub/again"),
		os.Chtimes(dir+"/f", time.Unix(1e9, 0), time.Unix(1e9, 0)),
	)
}

// look tells what is below a directory: modes, and the content of files and links.
func look(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, text := strings.TrimPrefix(path, dir), info.Mode().String()
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += " " + string(data)
			if info.ModTime().Unix() == 1e9 {
				text += " of old"
			}
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			text += " " + to
		}
		if name != "" {
			out[name] = text
		}
		return nil
	}))
	return out
}

// TestCpTree: where a directory lands, as with cp -r.
func TestCpTree(t *testing.T) {
	f, here := treeFake(t)
	src, disk := here+"/src", f.trees.disk
	plant(t, src)
	want := look(t, src)
	must(t, os.Mkdir(here+"/there", 0o755))
	for _, step := range []struct {
		from, to string
		at       string // where the copy must be
	}{
		{src, "aaaab:new", disk + "/home/new"},
		{src + "/", "aaaab:/srv/deep/er/", disk + "/srv/deep/er"},
		{src, "aaaab:/srv", disk + "/srv/src"},
		{src, "aaaab:/srv", disk + "/srv/src"}, // over the one that is there
		{src + "/.", "aaaab:/srv/src", disk + "/srv/src"},
		{src + "/.", "aaaab:/contents", disk + "/contents"},
		{"aaaab:new", here + "/copy", here + "/copy"},
		{"aaaab:new", here + "/there", here + "/there/new"},
		{"aaaab:new/", here + "/there", here + "/there/new"},
		{"aaaab:new/.", here + "/content", here + "/content"},
		{"aaaab:new", "aaaab:/srv", disk + "/srv/new"},
		{"aaaab:new", "aaaab:other", disk + "/home/other"},
	} {
		if got := ask(t, "cp", "-r", step.from, step.to); got != (result{}) {
			t.Errorf("cp -r %s %s: %+v", step.from, step.to, got)
			continue
		}
		if diff := cmp.Diff(want, look(t, step.at)); diff != "" {
			t.Errorf("cp -r %s %s (-want +got):\n%s", step.from, step.to, diff)
		}
	}
	t.Chdir(src)
	if got := ask(t, "cp", "--recursive", ".", "aaaab:dot"); got != (result{}) {
		t.Errorf("cp -r .: %+v", got)
	}
	if diff := cmp.Diff(want, look(t, disk+"/home/dot")); diff != "" {
		t.Errorf("cp -r .:\n%s", diff)
	}
	if got := ask(t, "cp", "-r", "f", "aaaab:/a file"); got != (result{}) || f.files["/a file"] != "hello" {
		t.Errorf("a file with -r: %+v, %q", got, f.files)
	}
	if got := ask(t, "cp", "-r", "aaaab:/a file", here+"/back"); got != (result{}) {
		t.Errorf("a file with -r, back: %+v", got)
	}
}

func TestCpTreeTells(t *testing.T) {
	_, here := treeFake(t)
	src := here + "/src"
	plant(t, src)
	must(t, syscall.Mkfifo(src+"/sub/p\x1bpe", 0o600))
	for _, line := range [][]string{{src, "aaaab:a"}, {"aaaab:a", "aaaab:b"}, {"aaaab:b", here + "/b"}} {
		if line[0] != src { // the pipe is left out once
			must(t, os.RemoveAll(src+"/sub/p\x1bpe"))
		}
		got := ask(t, "--json", "cp", "-r", line[0], line[1])
		var made api.Tree
		if err := json.Unmarshal([]byte(got.out), &made); err != nil || got.code != 0 {
			t.Fatalf("%+v, %v", got, err)
		}
		if made.Files != 5 || made.Directories != 3 || made.Bytes != 7 || !strings.HasSuffix(made.Path, line[1][len(line[1])-1:]) {
			t.Errorf("%v: %+v", line, made)
		}
		if line[0] == src && (made.Skipped != 1 || made.FirstSkipped != "sub/p\x1bpe" || !strings.Contains(got.errOut, `1 left out: not a file, directory or link; the first is "sub/p\x1bpe"`)) {
			t.Errorf("what is left out: %+v, %q", made, got.errOut)
		}
	}
}

func TestCpTreeRefuses(t *testing.T) {
	f, here := treeFake(t)
	src := here + "/src"
	plant(t, src)
	f.files["/file"] = "x"
	must(t, os.WriteFile(here+"/file", []byte("mine"), 0o600), os.Symlink("/", here+"/home"), os.MkdirAll(f.trees.disk+"/srv/f", 0o755))
	for name, tt := range map[string]struct {
		line []string
		code int
		says string
	}{
		"onto a file in a sandbox": {[]string{src, "aaaab:/file"}, 5, "/file is there and is not a directory"},
		"onto a file here":         {[]string{"aaaab:/srv", here + "/file"}, 5, "file is there and is not a directory"},
		"onto a planted link":      {[]string{"aaaab:/home", here}, 5, "home is there and is not a directory"},
		"below nothing":            {[]string{"aaaab:/srv", here + "/no/such"}, 3, "no such file"},
		"to standard output":       {[]string{"aaaab:/srv", "-"}, 2, "standard output"},
		"into itself":              {[]string{"aaaab:/srv", "aaaab:/srv/f"}, 2, "lies in what is copied"},
		"onto itself":              {[]string{"aaaab:/home/.", "aaaab:" + "."}, 2, "lies in what is copied"},
		"a new one in itself":      {[]string{"aaaab:/home", "aaaab:new/er"}, 2, "lies in what is copied"},
		"nothing here":             {[]string{here + "/nothing", "aaaab:x"}, 3, "no such file"},
		"nothing there":            {[]string{"aaaab:nothing", here}, 3, "nothing"},
		"a directory for a file":   {[]string{src + "/.", "aaaab:/srv"}, 5, `"f": a directory is in its place there`},
	} {
		t.Run(name, func(t *testing.T) {
			got := ask(t, append([]string{"cp", "-r"}, tt.line...)...)
			if got.code != tt.code || !strings.Contains(got.errOut, tt.says) {
				t.Errorf("got %+v, want %d and %q", got, tt.code, tt.says)
			}
		})
	}
	if data, err := os.ReadFile(here + "/file"); err != nil || string(data) != "mine" {
		t.Errorf("the file has %q, %v", data, err)
	}
	f.trees.onWrite = func() error {
		return sandbox.Errorf(sandbox.KindNoSpace, "%q: write: no space left on device", "sub/tool")
	}
	must(t, os.Truncate(src+"/f", 64<<20))
	if got := ask(t, "cp", "-r", src, "aaaab:x"); got.code != 6 || !strings.Contains(got.errOut, `"sub/tool": write: no space left`) {
		t.Errorf("a full disk: %+v", got)
	}
}

// TestCpTreeFromAHostileGuest: what a guest sends stays in the copy, and a part is
// never taken for the whole.
func TestCpTreeFromAHostileGuest(t *testing.T) {
	f, here := treeFake(t)
	victim := here + "/victim"
	must(t, os.Mkdir(here+"/to", 0o755))
	stream := func(entries ...*tar.Header) []byte {
		var buf bytes.Buffer
		w := tar.NewWriter(&buf)
		for _, h := range entries {
			data := []byte{}
			if h.Typeflag == tar.TypeReg {
				data, h.Size = []byte("evil"), 4
			}
			h.Mode |= 0o666
			must(t, w.WriteHeader(h))
			_, err := w.Write(data)
			must(t, err)
		}
		must(t, w.Close())
		return buf.Bytes()
	}
	file := func(name string) *tar.Header { return &tar.Header{Typeflag: tar.TypeReg, Name: name} }
	link := func(name, to string) *tar.Header {
		return &tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
	}
	whole := stream(file("a"), file("b"))
	for name, tt := range map[string]struct {
		raw  []byte
		cut  bool
		code int
		says string
	}{
		"a name that leads up":      {stream(file("../victim")), false, 2, `"../victim": the name leads upwards`},
		"an absolute name":          {stream(file(victim)), false, 2, "absolute"},
		"through a link of its own": {stream(link("l", ".."), file("l/victim")), false, 5, "a symbolic link"},
		"escapes in a name":         {stream(file("/\x1b[2J")), false, 2, `"/\x1b[2J"`},
		"cut between entries":       {whole[:1024], true, 9, "EOF"},
		"cut, and ended in order":   {whole[:1024], false, 2, "cut off"},
		"cut in an entry":           {whole[:700], true, 9, "EOF"},
		"nothing":                   {nil, true, 9, "EOF"},
		"no tar":                    {bytes.Repeat([]byte("no"), 999), false, 2, "not a tar stream"},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, os.RemoveAll(here+"/to"), os.WriteFile(victim, []byte("mine"), 0o600))
			f.trees.raw, f.trees.cut = append([]byte{}, tt.raw...), tt.cut
			for _, to := range []string{here + "/to", "aaaab:copy"} {
				got := ask(t, "cp", "-r", "aaaab:/srv", to)
				if to == "aaaab:copy" { // another guest takes care of names
					if got.code == 0 {
						t.Errorf("to another sandbox: %+v", got)
					}
					continue
				}
				if got.code != tt.code || !strings.Contains(got.errOut, tt.says) || strings.ContainsRune(got.errOut, 0x1b) {
					t.Errorf("got %+v, want %d and %q", got, tt.code, tt.says)
				}
			}
			if data, err := os.ReadFile(victim); err != nil || string(data) != "mine" {
				t.Errorf("the victim has %q, %v", data, err)
			}
			for name := range look(t, here) {
				if strings.Contains(name, ".dormouse-") {
					t.Errorf("%s is left", name)
				}
			}
		})
	}
	f.trees.cut = false
	t.Run("modes", func(t *testing.T) {
		f.trees.raw = stream(&tar.Header{Typeflag: tar.TypeReg, Name: "f", Mode: 0o6777}, &tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o7777})
		if got := ask(t, "cp", "-r", "aaaab:/srv", here+"/modes"); got.code != 0 {
			t.Fatalf("%+v", got)
		}
		if diff := cmp.Diff(map[string]string{"/f": "-rwxr-xr-x evil", "/d": "drwxr-xr-x"}, look(t, here+"/modes")); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("a reason", func(t *testing.T) {
		var buf bytes.Buffer
		root, err := os.OpenRoot(t.TempDir())
		must(t, err)
		ctx, cancel := context.WithCancelCause(t.Context())
		must(t, root.WriteFile("f", nil, 0o600))
		cancel(sandbox.Errorf(sandbox.KindNoSpace, "so\x1b it is"))
		if _, err := tree.Pack(ctx, &buf, root, nil); err == nil {
			t.Fatal("packed")
		}
		f.trees.raw, f.trees.cut = buf.Bytes(), true
		for _, to := range []string{here + "/reason", "aaaab:reason"} {
			if got := ask(t, "cp", "-r", "aaaab:/srv", to); got.code != 6 || !strings.Contains(got.errOut, "so  it is") {
				t.Errorf("to %s: %+v", to, got)
			}
		}
	})
	t.Run("a link that a copy has planted", func(t *testing.T) {
		f.trees.raw, f.trees.cut = stream(link("out.csv", "../victim")), false
		if got := ask(t, "cp", "-r", "aaaab:/srv", here+"/planted"); got.code != 0 {
			t.Fatalf("%+v", got)
		}
		f.files["/out.csv"] = "new"
		if got := ask(t, "cp", "aaaab:/out.csv", here+"/planted"); got.code != 0 {
			t.Fatalf("%+v", got)
		}
		if data, err := os.ReadFile(victim); err != nil || string(data) != "mine" {
			t.Errorf("the victim has %q, %v", data, err)
		}
		if data, err := os.ReadFile(here + "/planted/out.csv"); err != nil || string(data) != "new" {
			t.Errorf("the copy has %q, %v", data, err)
		}
	})
}

// TestCpTreeStops: Ctrl-C does not wait for the rest.
func TestCpTreeStops(t *testing.T) {
	f, here := treeFake(t)
	must(t, os.WriteFile(here+"/endless", nil, 0o600), os.Truncate(here+"/endless", 1<<42))
	must(t, os.WriteFile(f.trees.disk+"/srv/endless", nil, 0o600), os.Truncate(f.trees.disk+"/srv/endless", 1<<42))
	must(t, os.Mkdir(here+"/src", 0o755), os.Rename(here+"/endless", here+"/src/endless"))
	for _, line := range [][]string{{here + "/src", "aaaab:up"}, {"aaaab:/srv", here + "/down"}, {"aaaab:/srv", "aaaab:across"}} {
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan result)
		go func() {
			done <- dormouse(t, ctx, strings.NewReader(""), append([]string{"cp", "-r"}, line...)...)
		}()
		testkit.Eventually(t, 20*time.Second, "under way", func() bool {
			for _, dir := range []string{f.trees.disk + "/home/up", here + "/down", f.trees.disk + "/home/across"} {
				if names, err := filepath.Glob(dir + "/.dormouse-*"); err == nil && len(names) > 0 {
					return true
				}
			}
			return false
		})
		cancel(interrupted{syscall.SIGINT})
		select {
		case got := <-done:
			if got.code != 130 || got.errOut != "" {
				t.Errorf("%v: %+v", line, got)
			}
		case <-time.After(testkit.Patience(20 * time.Second)):
			t.Fatalf("%v goes on", line)
		}
		testkit.Eventually(t, 20*time.Second, "cleaned up", func() bool {
			for _, dir := range []string{f.trees.disk + "/home/up", here + "/down", f.trees.disk + "/home/across"} {
				if names, err := filepath.Glob(dir + "/.dormouse-*"); err != nil || len(names) > 0 {
					return false
				}
			}
			return true
		})
	}
}
