package tree_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/internal/tree"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func rootOf(t testing.TB, dir string) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = root.Close() })
	return root
}

func do(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

var longAgo = time.Date(2001, 2, 3, 4, 5, 6, 789, time.UTC)

// sample is a directory with something of everything.
func sample(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	removable(t, dir)
	in := func(name string) string { return filepath.Join(dir, name) }
	do(t,
		os.MkdirAll(in("a/deep/er"), 0o755),
		os.Mkdir(in("empty"), 0o750),
		os.Mkdir(in("Grüße 🐿"), 0o755),
		os.WriteFile(in("a/file"), []byte("hello"), 0o644),
		os.WriteFile(in("a/deep/er/nothing"), nil, 0o600),
		os.WriteFile(in("a/tool"), bytes.Repeat([]byte("x"), 300<<10), 0o755),
		os.WriteFile(in("Grüße 🐿/line\nbreak \xff"), []byte("odd"), 0o644),
		os.WriteFile(in(strings.Repeat("n", 200)), []byte("long"), 0o444),
		os.Link(in("a/tool"), in("a/deep/again")),
		os.Symlink("file", in("a/link")),
		os.Symlink("/etc/passwd", in("out")),
		os.Symlink("../../../..", in("a/up")),
		os.Mkdir(in("sealed"), 0o755),
		os.WriteFile(in("sealed/in"), []byte("s"), 0o400),
		os.Chmod(in("sealed"), 0o555),
	)
	for _, name := range []string{"a/file", "empty", "sealed", "a"} {
		do(t, os.Chtimes(in(name), longAgo, longAgo))
	}
	ts := unix.NsecToTimespec(longAgo.UnixNano())
	do(t, unix.UtimesNanoAt(unix.AT_FDCWD, in("out"), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	return dir
}

// removable opens what a sample has sealed, before the test's directories go.
func removable(t testing.TB, dir string) {
	t.Cleanup(func() { do(t, os.Chmod(dir+"/sealed", 0o755)) })
}

func packed(t testing.TB, dir string) (*bytes.Buffer, tree.Report) {
	t.Helper()
	var buf bytes.Buffer
	report, err := tree.Pack(t.Context(), &buf, rootOf(t, dir), nil)
	if err != nil {
		t.Fatal(err)
	}
	return &buf, report
}

// picture tells all that a copy keeps. Times are those of files, links and
// directories that carry longAgo; others would tell the test's own.
func picture(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	inodes := map[uint64]string{}
	do(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		text := info.Mode().String()
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			text += " -> " + to
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" %d %.20q", len(data), data)
			ino := info.Sys().(*syscall.Stat_t).Ino
			if first, ok := inodes[ino]; ok {
				text += " is " + first
			}
			inodes[ino] = name
		}
		if info.ModTime().Equal(longAgo) {
			text += " of old"
		}
		if name != "." {
			out[name] = text
		}
		return nil
	}))
	return out
}

func TestRoundTrip(t *testing.T) {
	from, to := sample(t), t.TempDir()
	removable(t, to)
	stream, report := packed(t, from)
	want := tree.Report{Files: 10, Directories: 7, Bytes: 5 + 300<<10 + 3 + 4 + 1}
	if diff := cmp.Diff(want, report); diff != "" {
		t.Errorf("packed (-want +got):\n%s", diff)
	}
	if measured, err := tree.Measure(t.Context(), rootOf(t, from)); err != nil || measured != report {
		t.Errorf("measured %+v, %v; packed %+v", measured, err, report)
	}
	var progress counter
	got, err := tree.Unpack(stream, rootOf(t, to), tree.Options{Progress: &progress})
	if err != nil || got != report || int64(progress) != report.Bytes {
		t.Fatalf("unpacked %+v (%d bytes told), %v; packed %+v", got, progress, err, report)
	}
	if diff := cmp.Diff(picture(t, from), picture(t, to)); diff != "" {
		t.Errorf("(-source +copy):\n%s", diff)
	}
	// Again over what is there, through another stream.
	again, _ := packed(t, from)
	var relayed bytes.Buffer
	if through, err := tree.Relay(&relayed, again, nil); err != nil || through != report {
		t.Fatalf("relayed %+v, %v", through, err)
	}
	if os.Geteuid() != 0 {
		do(t, os.Chmod(filepath.Join(to, "sealed"), 0o755)) // nobody else replaces files there
	}
	if _, err := tree.Unpack(&relayed, rootOf(t, to), tree.Options{}); err != nil {
		t.Fatal(err)
	}
	do(t, os.Chmod(filepath.Join(to, "sealed"), 0o555))
	for _, name := range []string{"empty", "sealed", "a"} { // a directory that was there keeps its own time
		do(t, os.Chtimes(filepath.Join(to, name), longAgo, longAgo))
	}
	if diff := cmp.Diff(picture(t, from), picture(t, to)); diff != "" {
		t.Errorf("copied again (-source +copy):\n%s", diff)
	}
}

type counter int64

func (c *counter) Write(p []byte) (int, error) { *c += counter(len(p)); return len(p), nil }

func TestModesAndTheTreeItself(t *testing.T) {
	from := t.TempDir()
	do(t, os.WriteFile(from+"/f", nil, 0o600), os.Chmod(from+"/f", 0o777|fs.ModeSetuid), os.Chmod(from, 0o777|fs.ModeSticky), os.Chtimes(from, longAgo, longAgo))
	for _, made := range []bool{true, false} {
		to := t.TempDir()
		do(t, os.Chmod(to, 0o700))
		stream, _ := packed(t, from)
		_, err := tree.Unpack(stream, rootOf(t, to), tree.Options{Mask: 0o022, New: made})
		do(t, err)
		f, err := os.Stat(to + "/f")
		do(t, err)
		d, err := os.Stat(to)
		do(t, err)
		want := map[bool]fs.FileMode{true: 0o755, false: 0o700}[made]
		if f.Mode() != 0o755 || d.Mode() != want|fs.ModeDir || d.ModTime().Equal(longAgo) != made {
			t.Errorf("made: %v: the file has %v, the directory %v of %v", made, f.Mode(), d.Mode(), d.ModTime())
		}
	}
}

func TestWhatIsLeftOut(t *testing.T) {
	from := t.TempDir()
	do(t, syscall.Mkfifo(from+"/fifo", 0o644), os.WriteFile(from+"/"+tree.TempNew+"x", nil, 0o600), os.WriteFile(from+"/f", nil, 0o600))
	stream, report := packed(t, from)
	want := tree.Report{Files: 1, Directories: 1, Skipped: 1, FirstSkipped: "fifo"}
	if report != want {
		t.Errorf("packed %+v", report)
	}
	to := t.TempDir()
	if got, err := tree.Unpack(stream, rootOf(t, to), tree.Options{}); err != nil || got != want {
		t.Errorf("unpacked %+v, %v", got, err)
	}
	if names := picture(t, to); len(names) != 1 {
		t.Errorf("there is %v", names)
	}
	if _, err := tree.Pack(t.Context(), io.Discard, rootOf(t, "/proc/self"), nil); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("/proc: %v", err)
	}
}

// TestEveryCutIsAnError: no beginning of a stream is taken for the whole.
func TestEveryCutIsAnError(t *testing.T) {
	from := t.TempDir()
	do(t, os.Mkdir(from+"/d", 0o755), os.WriteFile(from+"/d/a", bytes.Repeat([]byte("a"), 700), 0o644), os.WriteFile(from+"/b", nil, 0o644), os.Symlink("b", from+"/l"))
	stream, _ := packed(t, from)
	whole := stream.Bytes()
	for n := range len(whole) {
		if n%512 > 1 && n%37 != 0 {
			continue
		}
		for _, take := range []func(r io.Reader) error{
			func(r io.Reader) error {
				_, err := tree.Unpack(r, rootOf(t, t.TempDir()), tree.Options{})
				return err
			},
			func(r io.Reader) error { _, err := tree.Relay(io.Discard, r, nil); return err },
		} {
			if err := take(bytes.NewReader(whole[:n])); !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), "cut off") {
				t.Fatalf("%d bytes of %d: %v", n, len(whole), err)
			}
			if n%512 != 0 {
				continue // the kind of error matters at every byte, its source at some
			}
			pulled := errors.New("the plug was pulled")
			if err := take(io.MultiReader(bytes.NewReader(whole[:n]), failing{pulled})); !errors.Is(err, pulled) {
				t.Fatalf("a source that breaks after %d bytes: %v", n, err)
			}
		}
	}
	left := t.TempDir()
	if _, err := tree.Unpack(bytes.NewReader(whole[:1536+512]), rootOf(t, left), tree.Options{}); err == nil {
		t.Error("a part passed")
	}
	for name := range picture(t, left) {
		if strings.Contains(name, "dormouse") {
			t.Errorf("%s is left", name)
		}
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func TestAPackerThatFailsSaysWhyAndNeverEnds(t *testing.T) {
	from := t.TempDir()
	do(t, os.WriteFile(from+"/f", bytes.Repeat([]byte("f"), 1<<20), 0o600))
	shrinking := &hook{at: 1, do: func() { do(t, os.Truncate(from+"/f", 500<<10)) }}
	var stream bytes.Buffer
	_, err := tree.Pack(t.Context(), &stream, rootOf(t, from), shrinking)
	if !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), `"f": it became shorter`) {
		t.Fatalf("packed: %v", err)
	}
	_, got := tree.Unpack(bytes.NewReader(stream.Bytes()), rootOf(t, t.TempDir()), tree.Options{})
	if !sandbox.Is(got, sandbox.KindConflict) || got.Error() != err.Error() {
		t.Errorf("unpacked: %v, packed: %v", got, err)
	}
	var relayed bytes.Buffer
	if _, got := tree.Relay(&relayed, bytes.NewReader(stream.Bytes()), nil); !sandbox.Is(got, sandbox.KindConflict) {
		t.Errorf("relayed: %v", got)
	}
	if _, got := tree.Unpack(&relayed, rootOf(t, t.TempDir()), tree.Options{}); !sandbox.Is(got, sandbox.KindConflict) {
		t.Errorf("unpacked what was relayed: %v", got)
	}
}

// hook does something once so many bytes have passed.
type hook struct {
	seen, at int
	do       func()
}

func (h *hook) Write(p []byte) (int, error) {
	if h.seen += len(p); h.seen >= h.at && h.do != nil {
		h.do()
		h.do = nil
	}
	return len(p), nil
}

// entry is one of a stream that a test makes by hand.
type entry struct {
	tar.Header
	data string
}

func handmade(t testing.TB, entries ...entry) *bytes.Buffer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		e.Size = int64(len(e.data))
		if e.Mode == 0 {
			e.Mode = 0o644
		}
		if e.Typeflag == tar.TypeXGlobalHeader {
			e.Mode = 0
		}
		do(t, w.WriteHeader(&e.Header))
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	do(t, w.Close())
	return &buf
}

func file(name, data string) entry { return entry{tar.Header{Typeflag: tar.TypeReg, Name: name}, data} }

func link(kind byte, name, to string) entry {
	return entry{tar.Header{Typeflag: kind, Name: name, Linkname: to}, ""}
}

func folder(name string) entry {
	return entry{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, ""}
}

// TestAttacks: whatever a stream holds, nothing outside the directory changes, nor
// what links inside it lead to.
func TestAttacks(t *testing.T) {
	sym, hard := byte(tar.TypeSymlink), byte(tar.TypeLink)
	for name, tt := range map[string]struct {
		entries []entry
		says    string // empty: it is taken
	}{
		"up":                       {[]entry{file("../outside/victim", "evil")}, "leads upwards"},
		"up in the middle":         {[]entry{file("a/../../outside/victim", "evil")}, "leads upwards"},
		"up, for nothing":          {[]entry{file("a/../b", "evil")}, "leads upwards"},
		"absolute":                 {[]entry{file("/tmp/x", "evil")}, "absolute"},
		"quoted":                   {[]entry{file("/a\nb\x1b[31m", "evil")}, `"/a\nb\x1b[31m"`},
		"through a link":           {[]entry{link(sym, "l", "../outside"), file("l/victim", "evil")}, `"l" is a symbolic link there`},
		"through an absolute link": {[]entry{link(sym, "l", "OUTSIDE"), file("l/victim", "evil")}, "a symbolic link there"},
		"through a link inside":    {[]entry{folder("d"), link(sym, "l", "d"), file("l/x", "evil")}, "a symbolic link there"},
		"a directory over a link":  {[]entry{link(sym, "l", "../outside"), folder("l")}, "a symbolic link there"},
		"through what was there":   {[]entry{file("old/victim", "evil")}, "a symbolic link there"},
		"onto a link":              {[]entry{link(sym, "l", "../outside/victim"), file("l", "evil")}, ""},
		"onto what was there":      {[]entry{file("oldfile", "evil")}, ""},
		"a hard link out":          {[]entry{link(hard, "h", "../outside/victim"), file("h", "evil")}, "leads upwards"},
		"a hard link through one":  {[]entry{link(hard, "h", "old/victim"), file("h", "evil")}, `"old" is a symbolic link`},
		"a hard link to a link":    {[]entry{link(hard, "h", "oldfile"), file("h", "evil")}, "a symbolic link"},
		"a hard link to nothing":   {[]entry{link(hard, "h", "nothing")}, "not there"},
		"a hard link to itself":    {[]entry{file("f", "x"), link(hard, "f", "f")}, ""},
		"a file as the tree":       {[]entry{file(".", "evil")}, "tree itself"},
		"a link as the tree":       {[]entry{link(sym, ".", "/")}, "tree itself"},
		"a file, then below it":    {[]entry{file("f", "x"), file("f/g", "x")}, `"f" is a file there, not a directory`},
		"a file over a directory":  {[]entry{folder("d"), file("d", "x")}, `"d": a directory is in its place`},
		"a link over a directory":  {[]entry{folder("d"), link(sym, "d", "/")}, `"d": a directory is in its place`},
		"too deep":                 {[]entry{file(strings.Repeat("d/", tree.MaxDepth)+"f", "x")}, "directories deep"},
		"a long name":              {[]entry{file(strings.Repeat("n", 300), "x")}, "name too long"},
		"a note that is none":      {[]entry{{tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "dormouse-tree {"}}, ""}}, "not understood"},
	} {
		t.Run(name, func(t *testing.T) {
			base := t.TempDir()
			to, outside := base+"/to", base+"/outside"
			do(t,
				os.Mkdir(to, 0o755), os.Mkdir(outside, 0o755), os.WriteFile(outside+"/victim", []byte("mine"), 0o600),
				os.Symlink("../outside", to+"/old"), os.Symlink("../outside/victim", to+"/oldfile"),
			)
			before := picture(t, outside)
			for i := range tt.entries {
				if tt.entries[i].Linkname == "OUTSIDE" {
					tt.entries[i].Linkname = outside
				}
			}
			_, err := tree.Unpack(handmade(t, tt.entries...), rootOf(t, to), tree.Options{})
			if tt.says == "" && err != nil || tt.says != "" && (err == nil || !strings.Contains(err.Error(), tt.says)) {
				t.Errorf("got %v, want %q", err, tt.says)
			}
			if kind := sandbox.KindOf(err); err != nil && kind != sandbox.KindInvalid && kind != sandbox.KindConflict {
				t.Errorf("%v is of kind %s", err, kind)
			}
			if diff := cmp.Diff(before, picture(t, outside)); diff != "" {
				t.Errorf("outside:\n%s", diff)
			}
			for name := range picture(t, to) {
				if strings.Contains(name, ".dormouse-") {
					t.Errorf("%s is left", name)
				}
			}
		})
	}
}

// TestStreamsOfOthers: streams of other programs are taken as far as
// they say the same.
func TestStreamsOfOthers(t *testing.T) {
	device := entry{tar.Header{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3}, ""}
	foreign := entry{tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "of git"}}, ""}
	stream := handmade(t, foreign, file("./no/directory/said", "x"), device, file("no/directory/either", "y"), file("no/up", "z"))
	stream.Write(make([]byte, 20<<10)) // a full record
	to := t.TempDir()
	report, err := tree.Unpack(stream, rootOf(t, to), tree.Options{})
	if want := (tree.Report{Files: 3, Bytes: 3, Skipped: 1, FirstSkipped: "null"}); err != nil || report != want {
		t.Errorf("got %+v, %v", report, err)
	}
	want := map[string]string{
		"no": "drwxr-xr-x", "no/directory": "drwxr-xr-x", "no/up": `-rw-r--r-- 1 "z"`,
		"no/directory/said": `-rw-r--r-- 1 "x"`, "no/directory/either": `-rw-r--r-- 1 "y"`,
	}
	if diff := cmp.Diff(want, picture(t, to)); diff != "" {
		t.Error(diff)
	}
	for name, bad := range map[string]io.Reader{
		"not a tar":   strings.NewReader(strings.Repeat("nonsense", 200)),
		"nothing":     strings.NewReader(""),
		"what trails": io.MultiReader(handmade(t), io.LimitReader(zeroes{}, 5<<20)),
	} {
		if _, err := tree.Unpack(bad, rootOf(t, t.TempDir()), tree.Options{}); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestMemoryIsFlat: neither a large file nor many entries are kept in memory.
func TestMemoryIsFlat(t *testing.T) {
	const entries, size = 3000, 64 << 20
	r, w := io.Pipe()
	go func() {
		tw := tar.NewWriter(w)
		err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "big", Mode: 0o644, Size: size})
		if err == nil {
			_, err = io.CopyN(tw, zeroes{}, size)
		}
		for i := 0; err == nil && i < entries; i++ {
			err = tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("%0200d", i), Mode: 0o755})
		}
		_ = w.CloseWithError(errors.Join(err, tw.Close()))
	}()
	to := t.TempDir()
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	fds := testkit.OpenFDs(t)
	var most int
	root := rootOf(t, to)
	if _, err := tree.Unpack(r, root, tree.Options{Progress: &hook{at: 1, do: func() { most = testkit.OpenFDs(t) }}}); err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 4<<20 {
		t.Errorf("the heap grew by %d KiB", grown>>10)
	}
	if n := testkit.OpenFDs(t); n > fds+1 || most > fds+4 {
		t.Errorf("%d descriptors before, %d during and %d after", fds, most, n)
	}
}

func TestUnreadable(t *testing.T) {
	testkit.Root(t)
	base := t.TempDir()
	from, to := base+"/from", base+"/to"
	do(t, os.MkdirAll(from+"/d", 0o755), os.WriteFile(from+"/d/secret", nil, 0o600), os.Mkdir(to, 0o755))
	for d := base; d != "/tmp" && d != "/"; d = filepath.Dir(d) {
		do(t, os.Chmod(d, 0o755))
	}
	var stream bytes.Buffer
	err := kernel.AsUser(4321, 4322, nil, func() error {
		_, err := tree.Pack(t.Context(), &stream, rootOf(t, from), nil)
		return err
	})
	if !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), `"d/secret": open: permission denied`) {
		t.Errorf("packed: %v", err)
	}
	err = kernel.AsUser(4321, 4322, nil, func() error {
		_, err := tree.Unpack(handmade(t, file("x", "y")), rootOf(t, to), tree.Options{})
		return err
	})
	if !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), `"x": open: permission denied`) {
		t.Errorf("unpacked: %v", err)
	}
}

func TestAFullDisk(t *testing.T) {
	testkit.Root(t)
	to := t.TempDir()
	if err := unix.Mount("tmpfs", to, "tmpfs", 0, "size=1m"); err != nil {
		testkit.Require(t, "mount", false, err.Error())
	}
	t.Cleanup(func() { do(t, unix.Unmount(to, unix.MNT_DETACH)) })
	root, err := os.OpenRoot(to)
	do(t, err)
	defer func() { _ = root.Close() }()
	_, err = tree.Unpack(handmade(t, file("fits", "x"), file("d/too much", strings.Repeat("x", 2<<20))), root, tree.Options{})
	if !sandbox.Is(err, sandbox.KindNoSpace) || !strings.Contains(err.Error(), `"d/too much": write: no space left on device`) {
		t.Errorf("got %v", err)
	}
	if diff := cmp.Diff(map[string]string{"fits": `-rw-r--r-- 1 "x"`, "d": "drwxr-xr-x"}, picture(t, to)); diff != "" {
		t.Error(diff)
	}
}

// FuzzUnpack: no stream reaches beyond its directory, and what is unpacked can be
// packed again.
func FuzzUnpack(f *testing.F) {
	for _, entries := range [][]entry{
		{folder("d"), file("d/f", "x"), link(tar.TypeSymlink, "l", "../outside"), link(tar.TypeLink, "h", "d/f")},
		{link(tar.TypeSymlink, "l", "../outside"), file("l/victim", "evil")},
		{file("../outside/victim", "evil")},
		{file("old/victim", "evil")},
	} {
		f.Add(handmade(f, entries...).Bytes())
	}
	stream, _ := packed(f, sample(f))
	f.Add(stream.Bytes()[:8<<10])
	f.Fuzz(func(t *testing.T, data []byte) {
		base := t.TempDir()
		to, outside := base+"/to", base+"/outside"
		do(t, os.Mkdir(to, 0o755), os.Mkdir(outside, 0o755), os.WriteFile(outside+"/victim", []byte("mine"), 0o600), os.Symlink("../outside", to+"/old"))
		before := picture(t, outside)
		root := rootOf(t, to)
		_, err := tree.Unpack(bytes.NewReader(data), root, tree.Options{})
		if diff := cmp.Diff(before, picture(t, outside)); diff != "" {
			t.Fatalf("outside:\n%s", diff)
		}
		if names, err := os.ReadDir(base); err != nil || len(names) != 2 {
			t.Fatalf("beside it: %v, %v", names, err)
		}
		if _, relayed := tree.Relay(io.Discard, bytes.NewReader(data), nil); err == nil && relayed != nil && !strings.Contains(relayed.Error(), "archive/tar") {
			t.Errorf("unpacked, but not relayed: %v", relayed)
		}
		if os.Geteuid() == 0 { // others may have made what they cannot read
			if _, err := tree.Pack(t.Context(), io.Discard, root, nil); err != nil {
				t.Errorf("pack what was unpacked: %v", err)
			}
		}
	})
}
