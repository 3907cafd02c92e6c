package watch_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	filesystemv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
	"github.com/dormouse-sandbox/dormouse/guest/watch"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

var verbs = map[filesystemv1.EventType]string{
	filesystemv1.EventType_EVENT_TYPE_CREATE: "create", filesystemv1.EventType_EVENT_TYPE_WRITE: "write",
	filesystemv1.EventType_EVENT_TYPE_REMOVE: "remove", filesystemv1.EventType_EVENT_TYPE_RENAME: "rename",
	filesystemv1.EventType_EVENT_TYPE_CHMOD: "chmod",
}

func open(t testing.TB, cfg watch.Config) *watch.Watch {
	t.Helper()
	w, err := watch.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func say(e watch.Event) string { return verbs[e.Type] + " " + e.Name }

// late is more than a watch waits before it tells what it found in a new directory.
const late = 60 * time.Millisecond

// collect gives all events up to now: up to a mark, and what was found in new
// directories, which is told later.
func collect(t testing.TB, w *watch.Watch, dir string) []string {
	t.Helper()
	got := upToMark(t, w, dir)
	time.Sleep(late) // whatever was found before the mark is due by then
	// With the first event after that it is told, and before the next one.
	got = append(got, upToMark(t, w, dir)...)
	got = append(got, upToMark(t, w, dir)...)
	return slices.DeleteFunc(got, func(s string) bool { return strings.Contains(s, ".mark-") })
}

// upToMark makes a file and gives all events up to that of its making.
func upToMark(t testing.TB, w *watch.Watch, dir string) []string {
	t.Helper()
	mark := fmt.Sprintf(".mark-%d", time.Now().UnixNano())
	must(t, write(filepath.Join(dir, mark), ""))
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience(30*time.Second))
	defer cancel()
	var got []string
	for !slices.Contains(got, "create "+mark) {
		events, err := w.Next(ctx)
		if err != nil {
			t.Fatalf("%v, after %q", err, got[max(0, len(got)-20):])
		}
		for _, e := range events {
			got = append(got, say(e))
		}
	}
	return got
}

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func write(path, content string) error { return os.WriteFile(path, []byte(content), 0o644) }

func TestWhatHappensToFiles(t *testing.T) {
	dir := t.TempDir()
	must(t, write(dir+"/old", "x"), os.Mkdir(dir+"/sub", 0o755))
	outside := t.TempDir()
	w := open(t, watch.Config{Dir: dir})
	must(t,
		write(dir+"/new", "x"),
		os.Chmod(dir+"/old", 0o600),
		os.Rename(dir+"/old", dir+"/moved"),
		os.Rename(dir+"/moved", outside+"/moved"),
		os.Rename(outside+"/moved", dir+"/back"),
		os.Remove(dir+"/new"),
		os.Mkdir(dir+"/made", 0o755),
		os.Chmod(dir+"/made", 0o700),
		os.Symlink("back", dir+"/link"),
		write(dir+"/sub/unseen", "x"),
		os.Chmod(dir, 0o755),
	)
	want := []string{
		"create new", "write new", "chmod old", "rename old", "create moved", "rename moved", "create back", "remove new",
		"create made", "chmod made", "create link", "chmod .",
	}
	if diff := cmp.Diff(want, collect(t, w, dir)); diff != "" {
		t.Error(diff)
	}
}

func TestWhatHappensBelow(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	must(t, os.MkdirAll(dir+"/a/b", 0o755), os.MkdirAll(outside+"/in/deep", 0o755), write(outside+"/in/deep/f", "x"),
		os.Chtimes(outside+"/in/deep/f", time.Unix(1e9, 0), time.Unix(1e9, 0))) // not of this tick of the clock
	w := open(t, watch.Config{Dir: dir, Recursive: true})
	must(t, write(dir+"/a/b/f", "x"), os.Rename(dir+"/a", dir+"/z"), write(dir+"/z/b/g", ""), os.Remove(dir+"/z/b/f"))
	got := collect(t, w, dir)
	want := []string{"create a/b/f", "write a/b/f", "rename a", "create z", "create z/b", "create z/b/g", "create z/b/f", "remove z/b/f"}
	if diff := cmp.Diff(want[:4], got[:4]); diff != "" {
		t.Error("moved within, first:", diff)
	}
	slices.Sort(got)
	slices.Sort(want) // what is found in a directory comes later than what happened elsewhere
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error("moved within:", diff)
	}
	must(t, os.Rename(dir+"/z/b", dir+"/b"), os.Mkdir(dir+"/z/b", 0o755), write(dir+"/z/b/other", ""), write(dir+"/b/one", ""))
	got = collect(t, w, dir)
	want = []string{"rename z/b", "create b", "create b/g", "create z/b", "create z/b/other", "create b/one"}
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error("another under its name:", diff)
	}
	must(t, os.Rename(dir+"/b", outside+"/b"), write(outside+"/b/unseen", "x"), os.Rename(outside+"/in", dir+"/in"), write(dir+"/in/deep/g", "x"))
	got = collect(t, w, dir)
	want = []string{"rename b", "create in", "create in/deep", "create in/deep/f", "create in/deep/g", "write in/deep/g"}
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error("moved out and in:", diff)
	}
	must(t, os.RemoveAll(dir+"/in"))
	want = []string{"remove in/deep/f", "remove in/deep/g", "remove in/deep", "remove in"}
	got = collect(t, w, dir)
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error("removed:", diff)
	}
}

// TestNothingIsLostInNewDirectories makes directories and files in them faster than
// watches can be armed. Each is told once, after what it is in.
func TestNothingIsLostInNewDirectories(t *testing.T) {
	dir := t.TempDir()
	w := open(t, watch.Config{Dir: dir, Recursive: true})
	const makers, each = 4, 150
	var want []string
	for m := range makers {
		for i := range each {
			top := fmt.Sprintf("m%d-%d", m, i)
			for _, d := range []string{top, top + "/a", top + "/a/b", top + "/a/b/c"} {
				want = append(want, "create "+d, "create "+d+"/f", "write "+d+"/f", "create "+d+"/empty")
			}
		}
	}
	var wg sync.WaitGroup
	for m := range makers {
		wg.Go(func() {
			for i := range each {
				top := fmt.Sprintf("%s/m%d-%d", dir, m, i)
				for _, d := range []string{top, top + "/a", top + "/a/b", top + "/a/b/c"} {
					if err := errors.Join(os.Mkdir(d, 0o755), write(d+"/f", "content"), write(d+"/empty", "")); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	got := collect(t, w, dir)
	seen := map[string]bool{".": true}
	for _, event := range got {
		name, isCreate := strings.CutPrefix(event, "create ")
		if !seen[filepath.Dir(strings.TrimPrefix(name, "write "))] {
			t.Errorf("%s comes before what it is in", event)
		}
		if isCreate {
			seen[name] = true
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%.2000s", diff)
	}
}

func TestManyEvents(t *testing.T) {
	dir := t.TempDir()
	before, fds := runtime.NumGoroutine(), testkit.OpenFDs(t)
	w := open(t, watch.Config{Dir: dir})
	// All of them are more than the kernel's queue holds, and one part is not: the
	// watch may be held up for as long as a part takes.
	const parts, each = 2, 5000
	var want, got []string
	for part := range parts {
		for i := range each {
			name := fmt.Sprintf("file-%d-%d", part, i)
			must(t, write(filepath.Join(dir, name), "x"))
			want = append(want, "create "+name, "write "+name)
		}
		got = append(got, collect(t, w, dir)...)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%.2000s", diff)
	}
	must(t, w.Close(), w.Close())
	if _, err := w.Next(t.Context()); !errors.Is(err, watch.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	testkit.Eventually(t, 5*time.Second, "without goroutines and descriptors", func() bool {
		return runtime.NumGoroutine() <= before && testkit.OpenFDs(t) <= fds
	})
}

// flood makes more events than the watch and the kernel together hold for a
// reader that does not read.
func flood(t *testing.T, dir string) {
	t.Helper()
	must(t, write(dir+"/a", ""), write(dir+"/b", ""))
	for i := range 40_000 { // one after the other, or the kernel would make one of them
		must(t, os.Chmod(dir+"/a", 0o600|os.FileMode(i%2)), os.Chmod(dir+"/b", 0o600|os.FileMode(i%2)))
	}
}

func TestALossIsSaid(t *testing.T) {
	dir := t.TempDir()
	w := open(t, watch.Config{Dir: dir})
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	flood(t, dir)
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 8<<20 {
		t.Errorf("the heap grew by %d MiB", grown>>20)
	}
	var got []string
	for {
		events, err := w.Next(t.Context())
		if err != nil {
			if !errors.Is(err, watch.ErrLost) || len(events) > 0 {
				t.Errorf("%v with %d events", err, len(events))
			}
			break
		}
		for _, e := range events {
			got = append(got, say(e))
		}
	}
	if len(got) < 16_384 || got[0] != "create a" || got[1] != "create b" {
		t.Fatalf("%d events, %q", len(got), got[:min(len(got), 3)])
	}
	for i, event := range got[2:] {
		if want := "chmod " + string("ab"[i%2]); event != want {
			t.Fatalf("event %d is %s, want %s: one before the loss is lost", i, event, want)
		}
	}
	if _, err := w.Take(10); !errors.Is(err, watch.ErrLost) {
		t.Errorf("once more: %v", err)
	}
}

func TestCloseWhileItWaitsForRoom(t *testing.T) {
	dir := t.TempDir()
	w := open(t, watch.Config{Dir: dir})
	flood(t, dir)
	must(t, w.Close())
}

func TestTheDirectoryIsGone(t *testing.T) {
	for name, tt := range map[string]struct {
		do   func(dir string) error
		want []string
	}{
		"removed": {os.Remove, []string{"remove ."}},
		"moved":   {func(dir string) error { return os.Rename(dir, dir+"-elsewhere") }, []string{"rename ."}},
	} {
		dir := filepath.Join(t.TempDir(), "d")
		must(t, os.Mkdir(dir, 0o755))
		w := open(t, watch.Config{Dir: dir, Recursive: true})
		must(t, tt.do(dir))
		var got []string
		var err error
		for err == nil {
			var events []watch.Event
			events, err = w.Next(t.Context())
			for _, e := range events {
				got = append(got, say(e))
			}
		}
		if diff := cmp.Diff(tt.want, got); diff != "" || !errors.Is(err, watch.ErrGone) {
			t.Errorf("%s: %s %v", name, diff, err)
		}
	}
}

func TestWhatCannotBeWatched(t *testing.T) {
	dir := t.TempDir()
	must(t, write(dir+"/f", ""))
	for path, want := range map[string]error{dir + "/missing": os.ErrNotExist, dir + "/f": syscall.ENOTDIR} {
		if _, err := watch.Open(t.Context(), watch.Config{Dir: path}); !errors.Is(err, want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := watch.Open(ctx, watch.Config{Dir: dir, Recursive: true}); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that has left: %v", err)
	}
}

// TestUnfinishedFiles renames them when they are complete.
func TestUnfinishedFiles(t *testing.T) {
	dir := t.TempDir()
	must(t, write(dir+"/old", "x"))
	w := open(t, watch.Config{Dir: dir, Recursive: true, Unfinished: func(name string) (bool, bool) {
		return strings.HasPrefix(name, ".tmp"), strings.HasPrefix(name, ".tmp-replace")
	}})
	must(t,
		write(dir+"/.tmp-new", "x"), os.Chmod(dir+"/.tmp-new", 0o600), os.Rename(dir+"/.tmp-new", dir+"/new"),
		write(dir+"/.tmp-replace", "y"), os.Rename(dir+"/.tmp-replace", dir+"/old"),
		write(dir+"/.tmp-given-up", "z"), os.Remove(dir+"/.tmp-given-up"),
		os.Mkdir(dir+"/d", 0o755), write(dir+"/d/.tmp-new", "x"), os.Rename(dir+"/d/.tmp-new", dir+"/d/new"),
	)
	want := []string{"create new", "write new", "write old", "create d", "create d/new", "write d/new"}
	if diff := cmp.Diff(want, collect(t, w, dir)); diff != "" {
		t.Error(diff)
	}
}
