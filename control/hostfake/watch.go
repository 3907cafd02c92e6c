package hostfake

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
)

// Watch plays what happens in a directory: it tells until it returns, and tell waits
// for whoever is told. ErrLost says that something was not told.
type Watch func(ctx context.Context, req *hostv1.WatchDirRequest, tell func(kind, name string) error) error

// ErrLost ends a watch that has lost events.
var ErrLost = errors.New("events were lost")

// SetWatch says what happens in the directories of sandboxes. Without it nothing
// ever does.
func (h *Host) SetWatch(watch Watch) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watch = watch
}

// WatchDir implements the contract.
func (h *Host) WatchDir(ctx context.Context, req *connect.Request[hostv1.WatchDirRequest], stream *connect.ServerStream[hostv1.WatchDirResponse]) error {
	if err := h.enter(ctx, "WatchDir", req.Msg.GetId()); err != nil {
		return err
	}
	_, ctx, done, err := h.visit(ctx, req.Msg.GetId())
	if err != nil {
		return err
	}
	defer done()
	h.mu.Lock()
	watch := h.watch
	h.mu.Unlock()
	started := &hostv1.WatchDirResponse_Started_{Started: &hostv1.WatchDirResponse_Started{}}
	if err := stream.Send(&hostv1.WatchDirResponse{Message: started}); err != nil {
		return err
	}
	if watch != nil {
		err = watch(ctx, req.Msg, func(kind, name string) error {
			event := &hostv1.WatchDirResponse_Event{Event: &hostv1.FileEvent{Type: kind, Name: name}}
			return stream.Send(&hostv1.WatchDirResponse{Message: event})
		})
	}
	switch {
	case errors.Is(err, ErrLost):
		return stream.Send(&hostv1.WatchDirResponse{Message: &hostv1.WatchDirResponse_Lost_{Lost: &hostv1.WatchDirResponse_Lost{}}})
	case err != nil:
		return hostapi.ToConnect(err)
	}
	<-ctx.Done()
	return hostapi.ToConnect(context.Cause(ctx))
}
