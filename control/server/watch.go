package server

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/api"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const (
	// watchQueue is how many events wait here for a client. Beyond them the host is
	// not read, and the guest's own queue fills, which tells when it overflows.
	watchQueue = 256
	// partingLimit is how long a client may take to read why its stream ends.
	partingLimit = 2 * time.Second
)

// hostWatch is the host's side of a watch.
type hostWatch = connect.ServerStreamForClient[hostv1.WatchDirResponse]

// watchFiles tells what happens in a directory.
func (s *Server) watchFiles(w http.ResponseWriter, r *http.Request) error {
	t, q, err := fileTarget(r, "recursive")
	if err != nil {
		return err
	}
	recursive := false
	if q.Has("recursive") {
		if recursive, err = boolean("recursive", q.Get("recursive")); err != nil {
			return err
		}
	}
	session, done, err := s.enter(r.Context(), t.id)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithCancel(session)
	defer cancel()
	events, err := s.cfg.Host.WatchDir(ctx, connect.NewRequest(
		&hostv1.WatchDirRequest{Id: string(t.id), Path: t.path, User: t.user, Recursive: recursive}))
	if err != nil {
		return s.hostError(session, t.id, err)
	}
	defer func() { cancel(); _ = events.Close() }() // cancelled: what it says is no news
	if !events.Receive() {
		return s.hostError(session, t.id, whyNoMore(events.Err()))
	}
	if events.Msg().GetStarted() == nil {
		return fmt.Errorf("watch files: the host sent %T first, not the start", events.Msg().GetMessage())
	}
	s.meters.streams.Inc()
	defer s.meters.streams.Dec()
	v := newViewer(w)
	// A client that does not read is let go, but not without a chance to hear why.
	defer context.AfterFunc(session, func() {
		_ = v.control.SetWriteDeadline(time.Now().Add(partingLimit)) // tests' recorders have no connection
	})()
	v.say(api.WatchStart, struct{}{})
	if why := v.follow(events, cancel, s.cfg.KeepAlive); why != nil && r.Context().Err() == nil {
		v.say(api.WatchError, s.lastWords(session, r, t.id, why))
		_ = v.flush() // whoever is gone by now hears nothing
	}
	return nil // the client has been told, or is gone
}

// lastWords is what a client is told at the end of a stream.
func (s *Server) lastWords(session context.Context, r *http.Request, id sandbox.ID, why error) api.ErrorDetail {
	err := s.hostError(session, id, why)
	d := detail(err, requestID(r))
	if d.Code == string(sandbox.KindInternal) {
		s.cfg.Log.Error("internal error", "request", requestID(r), "op", r.Pattern, "sandbox", id, "err", err)
	}
	return d
}

func whyNoMore(err error) error {
	if err == nil {
		err = io.ErrUnexpectedEOF // the host says how it ends
	}
	return err
}

// viewer is a client that gets server-sent events.
type viewer struct {
	w       *bufio.Writer
	control *http.ResponseController
}

func newViewer(w http.ResponseWriter) *viewer {
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("X-Accel-Buffering", "no") // a proxy in between passes on what it has
	h.Set("Connection", "close")     // it may get a deadline that no later request must meet
	w.WriteHeader(http.StatusOK)
	return &viewer{bufio.NewWriterSize(w, 32<<10), http.NewResponseController(w)}
}

// follow passes events on until there are no more, and says why; nil if the client
// knows it, or is gone. Nobody reads the events any more when it returns: stop ends
// that.
func (v *viewer) follow(events *hostWatch, stop func(), keepAlive time.Duration) error {
	queue, ended := make(chan *hostv1.WatchDirResponse, watchQueue), make(chan struct{})
	enough := make(chan struct{})
	go func() {
		defer close(ended)
		defer close(queue)
		for events.Receive() {
			select {
			case queue <- events.Msg():
			case <-enough:
				return
			}
		}
	}()
	defer func() { close(enough); stop(); <-ended }()
	tick := time.NewTicker(keepAlive)
	defer tick.Stop()
	for v.flush() == nil {
		select {
		case msg, more := <-queue:
			if !more {
				return whyNoMore(events.Err())
			}
			tick.Reset(keepAlive)
			if v.tell(msg, queue) {
				_ = v.flush() // whoever is gone by now hears nothing
				return nil
			}
		case <-tick.C:
			_, _ = v.w.WriteString(": keep-alive\n\n") // flush has the error
		}
	}
	return nil
}

// tell writes an event and those that wait behind it, and says whether one was the
// last.
func (v *viewer) tell(msg *hostv1.WatchDirResponse, queue <-chan *hostv1.WatchDirResponse) (last bool) {
	for n := len(queue); ; n-- {
		switch m := msg.GetMessage().(type) {
		case *hostv1.WatchDirResponse_Event:
			v.say(api.WatchFile, api.FileEvent{Type: m.Event.GetType(), Name: m.Event.GetName()})
		case *hostv1.WatchDirResponse_Lost_:
			v.say(api.WatchOverflow, detail(errOverflow, ""))
			return true
		}
		if n == 0 {
			return false
		}
		msg = <-queue
	}
}

var errOverflow = sandbox.Errorf(sandbox.KindTransient, "events were lost: they came faster than they were read; look at the directory again, and watch it again")

// say writes one event; flush has the error.
func (v *viewer) say(event string, data any) {
	b, err := json.Marshal(data)
	if err != nil {
		panic(err) // our own types can always be encoded
	}
	_, _ = fmt.Fprintf(v.w, "event: %s\ndata: %s\n\n", event, b)
}

func (v *viewer) flush() error {
	if err := v.w.Flush(); err != nil {
		return err
	}
	return v.control.Flush()
}
