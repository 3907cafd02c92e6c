package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// ErrOverflow ends a watch that has lost events because they came faster than they
// were read. All events before the loss were returned. Whoever wants to go on
// watches anew, and then looks at what is there.
var ErrOverflow = sandbox.Errorf(sandbox.KindTransient, "events were lost: they came faster than they were read")

// maxEventBytes bounds one line of a stream of events: a name, each byte of which
// may take six in JSON, and some words around it.
const maxEventBytes = 64 << 10

// WatchOptions says what of a directory to watch.
type WatchOptions struct {
	Recursive bool   // also what is below, and comes to be there
	User      string // whose paths are meant; empty: the template's default user
}

// Watch tells what happens in a directory. One goroutine reads it; Close may be
// called by any.
type Watch struct {
	ctx    context.Context // of the Watch call, which bounds the whole stream
	cancel context.CancelFunc
	body   io.ReadCloser
	lines  *bufio.Scanner
	ended  error
}

// Watch watches a directory, and returns when everything that happens from then on
// will be told. The context bounds the whole watch. The caller must Close.
func (c *Client) Watch(ctx context.Context, id, path string, opts WatchOptions) (*Watch, error) {
	p, err := sandboxPath(id, "/files/watch")
	if err != nil {
		return nil, err
	}
	q := fileQuery(path, opts.User)
	if opts.Recursive {
		q.Set("recursive", "true")
	}
	w := &Watch{}
	w.ctx, w.cancel = context.WithCancel(ctx)
	resp, err := c.send(w.ctx, call{method: http.MethodGet, path: p, query: q})
	if err != nil {
		w.cancel()
		return nil, err
	}
	w.body, w.lines = resp.Body, bufio.NewScanner(resp.Body)
	w.lines.Buffer(nil, maxEventBytes)
	for {
		name, _, err := w.event()
		if err != nil {
			_ = w.Close() // it never fails
			return nil, err
		}
		if name == api.WatchStart {
			return w, nil
		}
	}
}

// Next waits for the next event. After the last one it says why there are no more,
// again and again: ErrOverflow, an *Error of the server, or what broke the stream.
func (w *Watch) Next() (api.FileEvent, error) {
	for w.ended == nil {
		name, data, err := w.event()
		switch {
		case err != nil:
			w.ended = err
		case name == api.WatchFile:
			var e api.FileEvent
			if err := json.Unmarshal(data, &e); err != nil {
				w.ended = sandbox.Errorf(sandbox.KindInternal, "read an event: %w", err)
				break
			}
			return e, nil
		case name == api.WatchOverflow:
			w.ended = ErrOverflow
		case name == api.WatchError:
			w.ended = watchError(data)
		}
	}
	return api.FileEvent{}, w.ended
}

func watchError(data []byte) error {
	e := &Error{Kind: sandbox.KindInternal, Message: "the watch ended with an error that was not named"}
	var d api.ErrorDetail
	if json.Unmarshal(data, &d) == nil {
		e.fill(d)
	}
	return e
}

// event reads one server-sent event: lines of fields up to an empty one. Lines that
// begin with a colon are comments.
func (w *Watch) event() (name string, data []byte, err error) {
	for w.lines.Scan() {
		line := w.lines.Bytes()
		field, value, _ := strings.Cut(string(line), ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case len(line) == 0 && name != "":
			return name, bytes.TrimSuffix(data, []byte("\n")), nil
		case len(line) == 0:
			data = nil
		case field == "event":
			name = value
		case field == "data":
			data = append(append(data, value...), '\n')
		}
		if len(data) > maxEventBytes {
			return "", nil, sandbox.Errorf(sandbox.KindInternal, "read events: one has more than %d bytes", maxEventBytes)
		}
	}
	err = w.lines.Err()
	switch {
	case err == nil:
		err = io.ErrUnexpectedEOF // the server says how it ends
	case errors.Is(err, bufio.ErrTooLong):
		return "", nil, sandbox.Errorf(sandbox.KindInternal, "read events: a line has more than %d bytes", maxEventBytes)
	}
	return "", nil, networkError(w.ctx, "read events", err)
}

// Close ends the watch. It never fails and may be called twice.
func (w *Watch) Close() error {
	w.cancel()
	_ = w.body.Close() // cancelled: what it says is no news
	return nil
}
