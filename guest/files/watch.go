package files

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	filesystemv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
	"github.com/dormouse-sandbox/dormouse/guest/watch"
)

// MaxWatchers bounds the watchers that are asked for their events: nothing ends
// one whose client has left.
const MaxWatchers = 64

// maxEvents bounds the answer to one question for events: more wait for the next.
const maxEvents = 20_000

// namesAge is how old the names of users may be in the entries of events: reading
// them for each event would cost more than the event.
const namesAge = time.Second

// watchRequest is what both forms of a watch ask for.
type watchRequest interface {
	GetPath() string
	GetRecursive() bool
	GetIncludeEntry() bool
	GetAllowNetworkMounts() bool
}

// watching is a watch and what its events are told with.
type watching struct {
	*watch.Watch
	dir      string
	describe func(path string) *filesystemv1.EntryInfo // nil for no entries
	asking   sync.Mutex                                // held while events are taken, so that they stay in order
}

func (s *Server) openWatch(ctx context.Context, header http.Header, req watchRequest) (*watching, error) {
	path, _, err := s.target(header, req.GetPath())
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, rpcError(err)
	}
	if !info.IsDir() {
		return nil, errorf(connect.CodeInvalidArgument, "%s is %s, not a directory", path, describeAny(info.Mode()))
	}
	w := &watching{dir: path}
	if req.GetIncludeEntry() {
		w.describe = s.describer()
	}
	w.Watch, err = watch.Open(ctx, watch.Config{
		Dir: path, Recursive: req.GetRecursive(), Network: req.GetAllowNetworkMounts(), Unfinished: unfinished,
	})
	if err != nil {
		return nil, watchError(err)
	}
	return w, nil
}

// wire is an event as it is told. What is gone by then has no entry.
func (w *watching) wire(e watch.Event) *filesystemv1.FilesystemEvent {
	event := &filesystemv1.FilesystemEvent{Name: utf8(e.Name), Type: e.Type}
	if w.describe == nil {
		return event
	}
	switch e.Type {
	case filesystemv1.EventType_EVENT_TYPE_CREATE, filesystemv1.EventType_EVENT_TYPE_WRITE, filesystemv1.EventType_EVENT_TYPE_CHMOD:
		event.Entry = w.describe(filepath.Join(w.dir, e.Name))
	}
	return event
}

// describer gives entries for one watch. Two of its calls are never at the same
// time.
func (s *Server) describer() func(string) *filesystemv1.EntryInfo {
	var names account.Names
	var read time.Time
	return func(path string) *filesystemv1.EntryInfo {
		if now := time.Now(); now.Sub(read) > namesAge {
			names, read = s.identity.Accounts.Names(), now
		}
		e, err := entry(path, names)
		if err != nil {
			return nil
		}
		return e
	}
}

// unfinished knows the temporary names of uploads.
func unfinished(name string) (is, replaces bool) {
	if strings.HasPrefix(name, tempReplace) {
		return true, true
	}
	return strings.HasPrefix(name, tempNew), false
}

func watchError(err error) error {
	var said *connect.Error // by whoever ended the call
	if errors.As(err, &said) {
		return said
	}
	code := connect.CodeUnknown
	switch {
	case errors.Is(err, watch.ErrLost):
		code = connect.CodeDataLoss
	case errors.Is(err, watch.ErrGone), errors.Is(err, watch.ErrClosed):
		code = connect.CodeNotFound
	case errors.Is(err, watch.ErrNetwork):
		code = connect.CodeInvalidArgument
	case errors.Is(err, watch.ErrLimit):
		code = connect.CodeResourceExhausted
	case errors.Is(err, context.DeadlineExceeded):
		return errorf(connect.CodeDeadlineExceeded, "the timeout of the call has passed")
	case errors.Is(err, context.Canceled):
		code = connect.CodeCanceled
	default:
		return rpcError(err)
	}
	return connect.NewError(code, err)
}

// WatchDir tells what happens in a directory for as long as the call lasts.
func (s *Server) WatchDir(ctx context.Context, req *connect.Request[filesystemv1.WatchDirRequest], stream *connect.ServerStream[filesystemv1.WatchDirResponse]) error {
	w, err := s.openWatch(ctx, req.Header(), req.Msg)
	if err != nil {
		return err
	}
	defer func() { _ = w.Close() }() // nothing was written
	start := &filesystemv1.WatchDirResponse{Event: &filesystemv1.WatchDirResponse_Start{Start: &filesystemv1.WatchDirResponse_StartEvent{}}}
	if err := stream.Send(start); err != nil {
		return err
	}
	interval := guestapi.Keepalive(req.Header())
	for {
		events, err := nextWithin(ctx, w, interval)
		switch {
		case err != nil && ctx.Err() != nil:
			return watchError(context.Cause(ctx))
		case errors.Is(err, context.DeadlineExceeded):
			alive := &filesystemv1.WatchDirResponse{Event: &filesystemv1.WatchDirResponse_Keepalive{Keepalive: &filesystemv1.WatchDirResponse_KeepAlive{}}}
			if err := stream.Send(alive); err != nil {
				return err
			}
		case err != nil:
			return watchError(err)
		}
		for _, e := range events {
			if err := stream.Send(&filesystemv1.WatchDirResponse{Event: &filesystemv1.WatchDirResponse_Filesystem{Filesystem: w.wire(e)}}); err != nil {
				return err
			}
		}
	}
}

func nextWithin(ctx context.Context, w *watching, interval time.Duration) ([]watch.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, interval)
	defer cancel()
	return w.Next(ctx)
}

// watchers are those that are asked for their events.
type watchers struct {
	mu   sync.Mutex
	byID map[string]*watching
}

func (ws *watchers) add(w *watching) (id string, err error) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if len(ws.byID) >= MaxWatchers {
		return "", errorf(connect.CodeResourceExhausted, "there are %d watchers already: remove those that are not needed any more", MaxWatchers)
	}
	if ws.byID == nil {
		ws.byID = map[string]*watching{}
	}
	id = "w" + strings.ToLower(rand.Text())
	ws.byID[id] = w
	return id, nil
}

func (ws *watchers) get(id string, remove bool) (*watching, error) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	w := ws.byID[id]
	if w == nil {
		return nil, errorf(connect.CodeNotFound, "no watcher with id %q", id)
	}
	if remove {
		delete(ws.byID, id)
	}
	return w, nil
}

// Close ends all watchers that are asked for their events.
func (s *Server) Close() error {
	s.watchers.mu.Lock()
	open := s.watchers.byID
	s.watchers.byID = nil
	s.watchers.mu.Unlock()
	var errs []error
	for _, w := range open {
		errs = append(errs, w.Close())
	}
	return errors.Join(errs...)
}

// CreateWatcher starts to keep the events of a directory until they are asked for.
func (s *Server) CreateWatcher(ctx context.Context, req *connect.Request[filesystemv1.CreateWatcherRequest]) (*connect.Response[filesystemv1.CreateWatcherResponse], error) {
	w, err := s.openWatch(ctx, req.Header(), req.Msg)
	if err != nil {
		return nil, err
	}
	id, err := s.watchers.add(w)
	if err != nil {
		_ = w.Close() // nothing was written
		return nil, err
	}
	return connect.NewResponse(&filesystemv1.CreateWatcherResponse{WatcherId: id}), nil
}

// GetWatcherEvents gives what has happened since the call before, up to maxEvents.
// When a watcher has ended, the calls after its last events say why.
func (s *Server) GetWatcherEvents(_ context.Context, req *connect.Request[filesystemv1.GetWatcherEventsRequest]) (*connect.Response[filesystemv1.GetWatcherEventsResponse], error) {
	w, err := s.watchers.get(req.Msg.GetWatcherId(), false)
	if err != nil {
		return nil, err
	}
	w.asking.Lock()
	defer w.asking.Unlock()
	events, err := w.Take(maxEvents)
	if err != nil {
		return nil, watchError(err)
	}
	res := &filesystemv1.GetWatcherEventsResponse{}
	for _, e := range events {
		res.Events = append(res.Events, w.wire(e))
	}
	return connect.NewResponse(res), nil
}

// RemoveWatcher ends one.
func (s *Server) RemoveWatcher(_ context.Context, req *connect.Request[filesystemv1.RemoveWatcherRequest]) (*connect.Response[filesystemv1.RemoveWatcherResponse], error) {
	w, err := s.watchers.get(req.Msg.GetWatcherId(), true)
	if err != nil {
		return nil, err
	}
	_ = w.Close() // nothing was written
	return connect.NewResponse(&filesystemv1.RemoveWatcherResponse{}), nil
}
