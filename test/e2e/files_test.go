package e2e_test

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestFiles: everything that the file calls can do, with names as people give
// them.
func TestFiles(t *testing.T) {
	w := shared(t)
	id := w.box()
	c := w.Client
	ctx := within(t, 2*time.Minute)
	const dir = "/home/user/files test/Grüße 🐿"
	t.Cleanup(func() { w.sh(id, "rm -rf '/home/user/files test'") })
	check := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}

	made, err := c.MakeDir(ctx, id, dir, "")
	check("mkdir with parents", err)
	if made.Type != "directory" || made.Owner != "user" || made.Path != dir {
		t.Errorf("mkdir: %+v", made)
	}
	_, err = c.MakeDir(ctx, id, dir, "")
	t.Logf("mkdir of what is there: %v", err)

	text := "line one\nzwei\x00\xff\n"
	for _, name := range []string{"plain", "with space", "line\nbreak", "日本語.txt", `quote"'$HOME\`, "-rf", "a?b&c=d#e%20f"} {
		path := dir + "/" + name
		written, err := c.WriteFile(ctx, id, path, "", strings.NewReader(text))
		check("write "+name, err)
		if written.Path != path || written.Size != int64(len(text)) {
			t.Errorf("write %q: %+v", name, written)
		}
		if got := w.read(id, path); got != text {
			t.Errorf("%q has %q, want %q", name, got, text)
		}
		st, err := c.Stat(ctx, id, path, "")
		check("stat "+name, err)
		if st.Name != name || st.Size != int64(len(text)) || st.Type != "file" || st.Owner != "user" || st.Permissions == "" ||
			time.Since(st.ModifiedAt).Abs() > 5*time.Minute {
			t.Errorf("stat %q: %+v", name, st)
		}
	}
	list, err := c.ListDir(ctx, id, dir, "", 0)
	check("list", err)
	if len(list) != 7 {
		t.Errorf("list has %d entries, want 7: %+v", len(list), list)
	}

	_, err = c.WriteFile(ctx, id, dir+"/plain", "", strings.NewReader("new"))
	check("write over", err)
	if got := w.read(id, dir+"/plain"); got != "new" {
		t.Errorf("after writing over: %q", got)
	}
	_, err = c.WriteFile(ctx, id, dir+"/empty", "", bytes.NewReader(nil))
	check("write nothing", err)
	if got := w.read(id, dir+"/empty"); got != "" {
		t.Errorf("an empty file has %q", got)
	}

	moved, err := c.Move(ctx, id, dir+"/with space", dir+"/sub dir/moved", "")
	check("move", err)
	if moved.Path != dir+"/sub dir/moved" || w.read(id, moved.Path) != text {
		t.Errorf("move: %+v", moved)
	}
	if _, err := c.Stat(ctx, id, dir+"/with space", ""); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("the moved file at its old place: %v", err)
	}
	deep, err := c.ListDir(ctx, id, "/home/user/files test", "", 3)
	check("list to depth 3", err)
	if !has(deep, dir+"/sub dir/moved") {
		t.Errorf("a list to depth 3 lacks the moved file: %+v", deep)
	}

	w.sh(id, `cd "`+dir+`" && ln -s plain link && ln -s /nowhere broken && ln -s . loop`)
	if got := w.read(id, dir+"/link"); got != "new" {
		t.Errorf("through a link: %q", got)
	}
	st, err := c.Stat(ctx, id, dir+"/broken", "")
	check("stat a broken link", err)
	if st.Type != "symlink" || st.SymlinkTarget != "/nowhere" {
		t.Errorf("a broken link: %+v", st)
	}
	if _, err := c.ListDir(ctx, id, dir, "", 20); err != nil {
		t.Errorf("list a directory with a loop: %v", err)
	}

	_, err = c.WriteFile(ctx, id, "relative.txt", "", strings.NewReader("at home"))
	check("write a relative path", err)
	if got := w.sh(id, "cat ~/relative.txt && rm ~/relative.txt"); got != "at home" {
		t.Errorf("a relative path: %q", got)
	}
	_, err = c.WriteFile(ctx, id, dir+"/of root", "root", strings.NewReader("x"))
	check("write as root", err)
	if st, err := c.Stat(ctx, id, dir+"/of root", ""); err != nil || st.Owner != "root" {
		t.Errorf("written as root: %+v, %v", st, err)
	}

	check("remove a tree", c.Remove(ctx, id, "/home/user/files test", ""))
	check("remove what is not there", c.Remove(ctx, id, "/home/user/files test", ""))
	if _, err := c.ListDir(ctx, id, "/home/user/files test", "", 0); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("list what was removed: %v", err)
	}
}

func (w world) read(id, path string) string {
	w.t.Helper()
	body, _, err := w.Client.ReadFile(within(w.t, time.Minute), id, path, "")
	if err != nil {
		w.t.Fatalf("read %q: %v", path, err)
	}
	defer func() { _ = body.Close() }()
	data, err := io.ReadAll(body)
	if err != nil {
		w.t.Fatalf("read %q: %v", path, err)
	}
	return string(data)
}

func has(list []api.File, path string) bool {
	for _, f := range list {
		if f.Path == path {
			return true
		}
	}
	return false
}
