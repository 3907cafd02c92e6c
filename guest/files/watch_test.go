package files_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	filesystemv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
	"github.com/dormouse-sandbox/dormouse/guest/guesttest"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// watching is a stream of events that has started.
type watching struct {
	stream *connect.ServerStreamForClient[filesystemv1.WatchDirResponse]
	cancel context.CancelFunc
}

func watchDir(t *testing.T, g *guesttest.Guest, req *filesystemv1.WatchDirRequest) *watching {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	stream, err := g.Filesystem.WatchDir(ctx, connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() || stream.Msg().GetStart() == nil {
		t.Fatalf("the first message is %v (%v), not start", stream.Msg(), stream.Err())
	}
	return &watching{stream, cancel}
}

func describe(e *filesystemv1.FilesystemEvent) string {
	return strings.ToLower(strings.TrimPrefix(e.GetType().String(), "EVENT_TYPE_")) + " " + e.GetName()
}

// next gives the next event.
func (w *watching) next(t *testing.T) *filesystemv1.FilesystemEvent {
	t.Helper()
	for w.stream.Receive() {
		if e := w.stream.Msg().GetFilesystem(); e != nil {
			return e
		}
	}
	t.Fatalf("no event: %v", w.stream.Err())
	return nil
}

func (w *watching) want(t *testing.T, events ...string) {
	t.Helper()
	for _, want := range events {
		if got := describe(w.next(t)); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestWatchDir(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	done := g.Watch(t, 4<<20)
	if err := os.Mkdir(g.Home+"/d", 0o755); err != nil {
		t.Fatal(err)
	}
	w := watchDir(t, g, &filesystemv1.WatchDirRequest{Path: "d", IncludeEntry: true})
	write(t, g.Home+"/d/f", "12345")
	w.want(t, "create f")
	if e := w.next(t); describe(e) != "write f" || e.GetEntry().GetPath() != g.Home+"/d/f" || e.GetEntry().GetSize() != 5 || e.GetEntry().GetOwner() != guesttest.User {
		t.Errorf("got %v", e)
	}
	if err := os.Remove(g.Home + "/d/f"); err != nil {
		t.Fatal(err)
	}
	if e := w.next(t); describe(e) != "remove f" || e.GetEntry() != nil {
		t.Errorf("got %v", e)
	}
	if err := os.RemoveAll(g.Home + "/d"); err != nil {
		t.Fatal(err)
	}
	w.want(t, "remove .")
	if w.stream.Receive() || connect.CodeOf(w.stream.Err()) != connect.CodeNotFound {
		t.Errorf("after the directory: %v, %v", w.stream.Msg(), w.stream.Err())
	}
	w.cancel()
	done()
}

// TestAnUploadIsOneWriting is about uploads, which are renamed when they are complete.
func TestAnUploadIsOneWriting(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	write(t, g.Home+"/old", "x")
	w := watchDir(t, g, &filesystemv1.WatchDirRequest{Path: "~", Recursive: true})
	for _, path := range []string{"new", "old", "deep/er/file"} {
		if res, body := post(t, g, fileURL(g, "path", path), octets, strings.NewReader("y")); res.StatusCode != 200 {
			t.Fatalf("%d %s", res.StatusCode, body)
		}
	}
	got := map[string]int{}
	for got["write deep/er/file"] == 0 {
		got[describe(w.next(t))]++
	}
	for _, want := range []string{"create new", "write new", "write old", "create deep", "create deep/er", "create deep/er/file"} {
		if got[want] != 1 {
			t.Errorf("%d times %q", got[want], want)
		}
		delete(got, want)
	}
	delete(got, "write deep/er/file")
	for event := range got {
		if !strings.HasPrefix(event, "chmod deep") { // it got its owner
			t.Errorf("also %q", event)
		}
	}
}

func TestManyFileEvents(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	done := g.Watch(t, 4<<20)
	w := watchDir(t, g, &filesystemv1.WatchDirRequest{Path: "~", Recursive: true, IncludeEntry: true})
	// All of them are more than the kernel's queue holds, and a half is not: the watch
	// may be held up for as long as a half takes.
	const n = 10_000
	made, half := make(chan error, 1), make(chan struct{})
	go func() {
		for i := range n {
			if i == n/2 {
				select {
				case <-half:
				case <-t.Context().Done():
				}
			}
			dir := fmt.Sprintf("%s/dir-%d", g.Home, i/100)
			err := os.MkdirAll(dir, 0o755)
			if err == nil {
				err = os.WriteFile(fmt.Sprintf("%s/file-%d", dir, i), []byte("x"), 0o644)
			}
			if err != nil {
				made <- err
				return
			}
		}
		made <- nil
	}()
	seen := map[string]int{}
	peak := uint64(0)
	for i := range 2*n + n/100 {
		if i == n+n/200 {
			close(half)
		}
		e := w.next(t)
		seen[describe(e)]++
		if len(seen)%2000 == 0 {
			peak = max(peak, guesttest.Heap())
		}
		if e.GetEntry() == nil {
			t.Errorf("%s has no entry", describe(e))
		}
	}
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	for event, times := range seen {
		if times != 1 {
			t.Errorf("%d times %q", times, event)
		}
	}
	if len(seen) != 2*n+n/100 || peak > 48<<20 {
		t.Errorf("%d different events, at most %d MiB", len(seen), peak>>20)
	}
	w.cancel()
	done()
}

func TestWatchersThatAreAsked(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	done := g.Watch(t, 4<<20)
	res, err := g.Filesystem.CreateWatcher(t.Context(), connect.NewRequest(&filesystemv1.CreateWatcherRequest{Path: "~", Recursive: true, IncludeEntry: true}))
	if err != nil {
		t.Fatal(err)
	}
	id := res.Msg.GetWatcherId()
	ask := func() ([]*filesystemv1.FilesystemEvent, error) {
		res, err := g.Filesystem.GetWatcherEvents(t.Context(), connect.NewRequest(&filesystemv1.GetWatcherEventsRequest{WatcherId: id}))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetEvents(), nil
	}
	if events, err := ask(); err != nil || len(events) != 0 {
		t.Errorf("%v, %v", events, err)
	}
	const n = 10_000 // more than the kernel's own queue holds of them, which has room for a half
	var got []string
	for i := range n {
		write(t, fmt.Sprintf("%s/f%d", g.Home, i), "x")
		if i != n/2-1 && i != n-1 {
			continue
		}
		testkit.Eventually(t, 30*time.Second, "told of all", func() bool {
			events, err := ask()
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range events {
				got = append(got, describe(e))
			}
			return len(got) >= 2*(i+1)
		})
	}
	for i := range n {
		if got[2*i] != fmt.Sprintf("create f%d", i) || got[2*i+1] != fmt.Sprintf("write f%d", i) {
			t.Fatalf("file %d: %q", i, got[2*i:2*i+2])
		}
	}
	remove := func() error {
		_, err := g.Filesystem.RemoveWatcher(t.Context(), connect.NewRequest(&filesystemv1.RemoveWatcherRequest{WatcherId: id}))
		return err
	}
	if err := remove(); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "removed twice", remove(), connect.CodeNotFound)
	_, err = ask()
	wantCode(t, "asked after it was removed", err, connect.CodeNotFound)
	done()
}

func TestAWatcherThatIsNeverAsked(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	done := g.Watch(t, 8<<20)
	res, err := g.Filesystem.CreateWatcher(t.Context(), connect.NewRequest(&filesystemv1.CreateWatcherRequest{Path: "~"}))
	if err != nil {
		t.Fatal(err)
	}
	id := res.Msg.GetWatcherId()
	write(t, g.Home+"/a", "")
	write(t, g.Home+"/b", "")
	for i := range 40_000 {
		for _, name := range []string{"/a", "/b"} {
			if err := os.Chmod(g.Home+name, 0o600|os.FileMode(i%2)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if h := guesttest.Heap(); h > 48<<20 {
		t.Errorf("the heap is %d MiB", h>>20)
	}
	events := 0
	for err == nil {
		var res *connect.Response[filesystemv1.GetWatcherEventsResponse]
		res, err = g.Filesystem.GetWatcherEvents(t.Context(), connect.NewRequest(&filesystemv1.GetWatcherEventsRequest{WatcherId: id}))
		if err == nil {
			events += len(res.Msg.GetEvents())
		}
	}
	wantCode(t, "after the events that were kept", err, connect.CodeDataLoss)
	if events < 16_384 {
		t.Errorf("only %d events before the loss", events)
	}
	if _, err := g.Filesystem.RemoveWatcher(t.Context(), connect.NewRequest(&filesystemv1.RemoveWatcherRequest{WatcherId: id})); err != nil {
		t.Error(err)
	}
	done()
}

func TestTooManyWatchers(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	var err error
	n := 0
	for ; err == nil && n < 200; n++ {
		_, err = g.Filesystem.CreateWatcher(t.Context(), connect.NewRequest(&filesystemv1.CreateWatcherRequest{Path: "~"}))
	}
	wantCode(t, "one too many", err, connect.CodeResourceExhausted)
	if n < 20 {
		t.Errorf("already after %d", n)
	}
}

func TestWatchesThatCannotStart(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	write(t, g.Home+"/f", "")
	for path, code := range map[string]connect.Code{
		"missing": connect.CodeNotFound, "f": connect.CodeInvalidArgument, "a\x00b": connect.CodeInvalidArgument,
	} {
		stream, err := g.Filesystem.WatchDir(t.Context(), connect.NewRequest(&filesystemv1.WatchDirRequest{Path: path}))
		if err == nil {
			stream.Receive()
			err = stream.Err()
		}
		wantCode(t, path, err, code)
		_, err = g.Filesystem.CreateWatcher(t.Context(), connect.NewRequest(&filesystemv1.CreateWatcherRequest{Path: path}))
		wantCode(t, path, err, code)
	}
	req := connect.NewRequest(&filesystemv1.CreateWatcherRequest{Path: "~"})
	req.Header().Set("Authorization", "Basic bm9ib2R5Og==")
	_, err := g.Filesystem.CreateWatcher(t.Context(), req)
	wantCode(t, "an unknown user", err, connect.CodeUnauthenticated)
}

func TestWatchKeepaliveAndTimeout(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	req := connect.NewRequest(&filesystemv1.WatchDirRequest{Path: "~"})
	req.Header().Set("Keepalive-Ping-Interval", "1")
	began := time.Now()
	stream, err := g.Filesystem.WatchDir(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Start", "Keepalive"} {
		if !stream.Receive() || !strings.HasSuffix(fmt.Sprintf("%T", stream.Msg().GetEvent()), want) {
			t.Fatalf("got %T (%v), want %s", stream.Msg().GetEvent(), stream.Err(), want)
		}
	}
	cancel()
	if took := time.Since(began); took < time.Second {
		t.Errorf("a sign of life after %v", took)
	}

	ctx, cancel = context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	stream, err = g.Filesystem.WatchDir(ctx, connect.NewRequest(&filesystemv1.WatchDirRequest{Path: "~"}))
	if err == nil {
		for stream.Receive() { // on a slow machine not even the start
			continue
		}
		err = stream.Err()
	}
	wantCode(t, "its end", err, connect.CodeDeadlineExceeded)
}

func TestAClientThatLeavesEndsItsWatch(t *testing.T) {
	g := guesttest.Start(t, guesttest.Options{})
	done := g.Watch(t, 4<<20)
	for i := range 20 {
		dir := filepath.Join(g.Home, fmt.Sprint(i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		w := watchDir(t, g, &filesystemv1.WatchDirRequest{Path: dir, Recursive: true})
		write(t, dir+"/f", "x")
		w.cancel()
	}
	done()
}
