package host_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem/filesystemconnect"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestWatch: what happens in a directory is told once and in order, from the moment
// that it is armed until its caller has had enough.
func TestWatch(t *testing.T) {
	r := newRig(t)
	home := agentProcess(t, r).Home
	agent := r.open()
	id := string(r.mustCreate())
	const many = 500
	ctx, enough := context.WithCancel(t.Context())
	defer enough()
	seen, first := map[string]int{}, make(chan struct{})
	lost, err := agent.Watch(ctx, host.FileRef{ID: id, Path: home}, true,
		func() error {
			if err := os.Mkdir(filepath.Join(home, "sub"), 0o755); err != nil {
				return err
			}
			go func() {
				for i := range many {
					if err := os.WriteFile(filepath.Join(home, "sub", fmt.Sprint(i)), []byte("x"), 0o644); err != nil {
						t.Error(err)
					}
				}
				<-first // what comes and goes before anybody looks is not told
				if err := errors.Join(os.Remove(filepath.Join(home, "sub", "0")), os.Mkdir(filepath.Join(home, "end"), 0o755)); err != nil {
					t.Error(err)
				}
			}()
			return nil
		},
		func(e host.FileEvent) error {
			seen[e.Type+" "+e.Name]++
			switch e.Type + " " + e.Name {
			case "create sub/0":
				close(first)
			case "create end":
				enough()
			}
			return nil
		})
	if lost || !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v, lost: %v", err, lost)
	}
	for i := range many {
		if name := fmt.Sprint("create sub/", i); seen[name] != 1 {
			t.Errorf("%s was told %d times", name, seen[name])
		}
	}
	if seen["create sub"] != 1 || seen["remove sub/0"] != 1 {
		t.Errorf("the directory: %d, the removal: %d", seen["create sub"], seen["remove sub/0"])
	}
}

func TestWatchOfWhatIsNoDirectory(t *testing.T) {
	r := newRig(t)
	home := agentProcess(t, r).Home
	agent := r.open()
	id := string(r.mustCreate())
	file := filepath.Join(home, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	never := func() error { return errors.New("it is armed") }
	for path, kind := range map[string]sandbox.Kind{home + "/no": sandbox.KindNotFound, file: sandbox.KindInvalid, "": sandbox.KindInvalid} {
		if lost, err := agent.Watch(t.Context(), host.FileRef{ID: id, Path: path}, false, never, nil); lost || !sandbox.Is(err, kind) {
			t.Errorf("%q: %v (lost: %v), want %s", path, err, lost, kind)
		}
	}
}

// watcher is an agent that tells what a test says, and ends with its error.
type watcher struct {
	filesystemconnect.UnimplementedFilesystemHandler
	events []*filesystem.FilesystemEvent
	err    error
}

func (w watcher) WatchDir(_ context.Context, _ *connect.Request[filesystem.WatchDirRequest], stream *connect.ServerStream[filesystem.WatchDirResponse]) error {
	start := &filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Start{Start: &filesystem.WatchDirResponse_StartEvent{}}}
	if err := stream.Send(start); err != nil {
		return err
	}
	for _, e := range w.events {
		if err := stream.Send(&filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Filesystem{Filesystem: e}}); err != nil {
			return err
		}
	}
	return w.err
}

// TestEndsOfAWatch: a loss is told apart from everything else, after what came
// before it, and a guest cannot tell names without end.
func TestEndsOfAWatch(t *testing.T) {
	create := filesystem.EventType_EVENT_TYPE_CREATE
	for name, tt := range map[string]struct {
		watcher watcher
		told    string
		lost    bool
		kind    sandbox.Kind
	}{
		"events were lost": {
			watcher{events: []*filesystem.FilesystemEvent{{Name: "a", Type: create}, {Name: "b", Type: create}}, err: connect.NewError(connect.CodeDataLoss, errors.New("too fast"))},
			"create a, create b", true, "",
		},
		"the directory is gone": {
			watcher{err: connect.NewError(connect.CodeNotFound, errors.New("it is gone"))}, "", false, sandbox.KindNotFound,
		},
		"the agent just stops": {watcher{}, "", false, sandbox.KindTransient},
		"a type from the future": {
			watcher{events: []*filesystem.FilesystemEvent{{Name: "a", Type: 99}, {Name: "b", Type: create}}, err: connect.NewError(connect.CodeDataLoss, errors.New(""))},
			"create b", true, "",
		},
		"a name without end": {
			watcher{events: []*filesystem.FilesystemEvent{{Name: strings.Repeat("n", 5000), Type: create}}}, "", false, sandbox.KindInternal,
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			mux := http.NewServeMux()
			mux.Handle(filesystemconnect.NewFilesystemHandler(tt.watcher))
			mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
			hostile(r, mux)
			agent := r.open()
			id := string(r.mustCreate())
			var told []string
			lost, err := agent.Watch(t.Context(), host.FileRef{ID: id, Path: "/"}, false, func() error { return nil }, func(e host.FileEvent) error {
				told = append(told, e.Type+" "+e.Name)
				return nil
			})
			if got := strings.Join(told, ", "); got != tt.told || lost != tt.lost || !tt.lost && !sandbox.Is(err, tt.kind) || tt.lost && err != nil {
				t.Errorf("told %q, lost: %v, %v (%s); want %q, %v, %s", got, lost, err, sandbox.KindOf(err), tt.told, tt.lost, tt.kind)
			}
		})
	}
}
