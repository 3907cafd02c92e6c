package files_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	filesystemv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
)

func wantCode(t *testing.T, what string, err error, code connect.Code) {
	t.Helper()
	if err == nil || connect.CodeOf(err) != code {
		t.Errorf("%s: got %v, want %v", what, err, code)
	}
}

func stat(t *testing.T, g *guesttest.Guest, path string) (*filesystemv1.EntryInfo, error) {
	t.Helper()
	res, err := g.Filesystem.Stat(t.Context(), connect.NewRequest(&filesystemv1.StatRequest{Path: path}))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetEntry(), nil
}

func TestStat(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	write(t, g.Home+"/f", "12345")
	for _, link := range [][2]string{{"f", "l1"}, {"l1", "l2"}, {"nowhere", "broken"}} {
		if err := os.Symlink(link[0], g.Home+"/"+link[1]); err != nil {
			t.Fatal(err)
		}
	}
	e, err := stat(t, g, "f")
	if err != nil {
		t.Fatal(err)
	}
	if e.GetName() != "f" || e.GetPath() != g.Home+"/f" || e.GetSize() != 5 || e.GetMode() != 0o644 || e.GetPermissions() != "-rw-r--r--" ||
		e.GetType() != filesystemv1.FileType_FILE_TYPE_FILE || e.GetOwner() != guesttest.User || e.GetGroup() != "testers" || e.GetModifiedTime() == nil {
		t.Errorf("file: %v", e)
	}
	if e, err := stat(t, g, "~"); err != nil || e.GetType() != filesystemv1.FileType_FILE_TYPE_DIRECTORY || !strings.HasPrefix(e.GetPermissions(), "d") {
		t.Errorf("directory: %v, %v", e, err)
	}
	if e, err := stat(t, g, "l2"); err != nil || e.GetSymlinkTarget() != g.Home+"/f" || e.GetType() != filesystemv1.FileType_FILE_TYPE_FILE || e.GetPermissions() != "-rw-r--r--" {
		t.Errorf("link: %v, %v", e, err)
	}
	if e, err := stat(t, g, "broken"); err != nil || e.GetSymlinkTarget() != g.Home+"/nowhere" || e.GetType() != filesystemv1.FileType_FILE_TYPE_SYMLINK {
		t.Errorf("broken link: %v, %v", e, err)
	}
	_, err = stat(t, g, "missing")
	wantCode(t, "missing", err, connect.CodeNotFound)
}

func TestMakeDir(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	write(t, g.Home+"/f", "")
	mkdir := func(path string) (*filesystemv1.EntryInfo, error) {
		res, err := g.Filesystem.MakeDir(t.Context(), connect.NewRequest(&filesystemv1.MakeDirRequest{Path: path}))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetEntry(), nil
	}
	if e, err := mkdir("a/b/c"); err != nil || e.GetPath() != g.Home+"/a/b/c" || e.GetPermissions() != "drwxr-xr-x" {
		t.Errorf("%v, %v", e, err)
	}
	_, err := mkdir("a/b")
	wantCode(t, "an existing directory", err, connect.CodeAlreadyExists)
	_, err = mkdir("f")
	wantCode(t, "an existing file", err, connect.CodeInvalidArgument)
	_, err = mkdir("f/g")
	wantCode(t, "below a file", err, connect.CodeInvalidArgument)
}

func TestMoveAndRemove(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	write(t, g.Home+"/f", "x")
	move := func(from, to string) (*filesystemv1.EntryInfo, error) {
		res, err := g.Filesystem.Move(t.Context(), connect.NewRequest(&filesystemv1.MoveRequest{Source: from, Destination: to}))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetEntry(), nil
	}
	remove := func(path string) error {
		_, err := g.Filesystem.Remove(t.Context(), connect.NewRequest(&filesystemv1.RemoveRequest{Path: path}))
		return err
	}
	if e, err := move("f", "new/place/g"); err != nil || e.GetPath() != g.Home+"/new/place/g" {
		t.Fatalf("%v, %v", e, err)
	}
	if _, err := os.Stat(g.Home + "/f"); err == nil {
		t.Error("the source is still there")
	}
	_, err := move("f", "h")
	wantCode(t, "a missing source", err, connect.CodeNotFound)
	for range 2 {
		if err := remove("new"); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(g.Home + "/new"); err == nil {
		t.Error("the directory is still there")
	}
	wantCode(t, "the root", remove("/"), connect.CodeInvalidArgument)
}

func TestListDir(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	if err := os.MkdirAll(g.Home+"/d/b/deep", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"a", "c", "b/f", "b/deep/g"} {
		write(t, g.Home+"/d/"+f, "")
	}
	for link, target := range map[string]string{"d/link": "b", "dlink": "d"} {
		if err := os.Symlink(target, g.Home+"/"+link); err != nil {
			t.Fatal(err)
		}
	}
	list := func(path string, depth uint32) ([]string, error) {
		res, err := g.Filesystem.ListDir(t.Context(), connect.NewRequest(&filesystemv1.ListDirRequest{Path: path, Depth: depth}))
		if err != nil {
			return nil, err
		}
		var names []string
		for _, e := range res.Msg.GetEntries() {
			names = append(names, strings.TrimPrefix(e.GetPath(), g.Home+"/"))
		}
		return names, nil
	}
	for _, tt := range []struct {
		path  string
		depth uint32
		want  string
	}{
		{"d", 0, "d/a d/b d/c d/link"},
		{"d", 1, "d/a d/b d/c d/link"},
		{"d", 2, "d/a d/b d/b/deep d/b/f d/c d/link"},
		{"d", 99, "d/a d/b d/b/deep d/b/deep/g d/b/f d/c d/link"},
		{"dlink", 1, "dlink/a dlink/b dlink/c dlink/link"},
		{"d/b/deep", 1, "d/b/deep/g"},
	} {
		got, err := list(tt.path, tt.depth)
		if diff := cmp.Diff(strings.Fields(tt.want), got); diff != "" || err != nil {
			t.Errorf("%s, depth %d: %s %v", tt.path, tt.depth, diff, err)
		}
	}
	_, err := list("missing", 1)
	wantCode(t, "missing", err, connect.CodeNotFound)
	_, err = list("d/a", 1)
	wantCode(t, "a file", err, connect.CodeInvalidArgument)
	if names, err := list("/", 1); err != nil || !slices.Contains(names, "/proc") {
		t.Errorf("/: %v, %v", names, err)
	}
}

// TestNamesThatAreNoText: names are bytes, answers are text.
func TestNamesThatAreNoText(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	write(t, g.Home+"/caf\xe9", "12345")
	if err := os.Symlink("\xff", g.Home+"/link"); err != nil {
		t.Fatal(err)
	}
	res, err := g.Filesystem.ListDir(t.Context(), connect.NewRequest(&filesystemv1.ListDirRequest{Path: "~"}))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range res.Msg.GetEntries() {
		got = append(got, e.GetName())
	}
	if want := []string{"caf\uFFFD", "link"}; !slices.Equal(got, want) {
		t.Errorf("listed %q, want %q", got, want)
	}
}
