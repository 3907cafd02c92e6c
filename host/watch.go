package host

import (
	"context"
	"io"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// FileEvent is one thing that happened in a watched directory.
type FileEvent struct {
	Type string // "create", "write", "remove", "rename" or "chmod"
	Name string // from the directory on; "." is itself
}

var eventTypes = map[filesystem.EventType]string{
	filesystem.EventType_EVENT_TYPE_CREATE: "create",
	filesystem.EventType_EVENT_TYPE_WRITE:  "write",
	filesystem.EventType_EVENT_TYPE_REMOVE: "remove",
	filesystem.EventType_EVENT_TYPE_RENAME: "rename",
	filesystem.EventType_EVENT_TYPE_CHMOD:  "chmod",
}

// Watch calls armed when the directory is watched, and then tell for each thing that
// happens in it, until the context or the watch ends. It waits for tell: nothing is
// kept here, and the guest keeps a bounded amount. Beyond that lost is true, after
// all events before the loss.
func (a *Agent) Watch(ctx context.Context, f FileRef, recursive bool, armed func() error, tell func(FileEvent) error) (lost bool, err error) {
	g, ctx, cancel, err := a.fileAgent(ctx, f)
	if err != nil {
		return false, err
	}
	defer cancel()
	ctx, watchdog := watchSilence(ctx)
	defer watchdog.Stop()
	req := connect.NewRequest(&filesystem.WatchDirRequest{Path: f.Path, Recursive: recursive})
	g.sign(req.Header(), f.User)
	req.Header().Set("Keepalive-Ping-Interval", strconv.Itoa(int(keepAlive/time.Second)))
	stream, err := g.files.WatchDir(ctx, req)
	if err != nil {
		return false, rpcError(ctx, err)
	}
	defer func() { _ = stream.Close() }() // its error was seen by Receive
	for stream.Receive() {
		watchdog.Stop() // a slow reader is not a silent guest
		if err := pass(stream.Msg(), armed, tell); err != nil {
			return false, err
		}
		watchdog.Reset(silenceKept)
	}
	err = stream.Err()
	switch {
	case err == nil:
		return false, rpcError(ctx, io.ErrUnexpectedEOF)
	case ctx.Err() == nil && connect.CodeOf(err) == connect.CodeDataLoss:
		return true, nil
	}
	return false, rpcError(ctx, err)
}

// pass hands one message of a watch on. Types of events that are not known here are
// left out.
func pass(msg *filesystem.WatchDirResponse, armed func() error, tell func(FileEvent) error) error {
	if msg.GetStart() != nil {
		return armed()
	}
	e := msg.GetFilesystem()
	kind, known := eventTypes[e.GetType()]
	if !known {
		return nil
	}
	if len(e.GetName()) > maxPathBytes {
		return sandbox.Errorf(sandbox.KindInternal, "the guest agent tells of a name of %d bytes, at most %d are allowed", len(e.GetName()), maxPathBytes)
	}
	return tell(FileEvent{kind, e.GetName()})
}
