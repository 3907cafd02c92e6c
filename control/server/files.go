package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/api"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// uploadChunk is how much of an upload travels in one message.
const uploadChunk = 128 << 10

// target is the file that a request is about.
type target struct {
	id         sandbox.ID
	path, user string
}

// fileTarget reads path and user from the query, and lets only those in extra
// stand beside them.
func fileTarget(r *http.Request, extra ...string) (target, url.Values, error) {
	id, err := pathID(r)
	if err != nil {
		return target{}, nil, err
	}
	q, err := query(r, append(extra, "path", "user")...)
	if err != nil {
		return target{}, nil, err
	}
	t := target{id, q.Get("path"), q.Get("user")}
	if err := checkPath("path", t.path); err != nil {
		return t, nil, err
	}
	return t, q, checkUser(t.user)
}

// query parses a request's query and refuses what it does not know.
func query(r *http.Request, allowed ...string) (url.Values, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "the query is not understood: %w", err)
	}
	for name, values := range q {
		if !slices.Contains(allowed, name) {
			return nil, unknownParameter(name)
		}
		if len(values) > 1 {
			return nil, sandbox.Errorf(sandbox.KindInvalid, "%s is given %d times, at most once is allowed", name, len(values))
		}
	}
	return q, nil
}

// readFile streams a file. What breaks after the first byte breaks the
// connection: the client must not take a part for the whole.
func (s *Server) readFile(w http.ResponseWriter, r *http.Request) error {
	t, _, err := fileTarget(r)
	if err != nil {
		return err
	}
	ctx, done, err := s.enter(r.Context(), t.id)
	if err != nil {
		return err
	}
	defer done()
	file, err := s.cfg.Host.ReadFile(ctx, connect.NewRequest(
		&hostv1.ReadFileRequest{Id: string(t.id), Path: t.path, User: t.user}))
	if err != nil {
		return s.hostError(ctx, t.id, err)
	}
	return sendDownload(ctx, s, w, t.id, file, func(m *hostv1.ReadFileResponse) (int64, string, bool) {
		head, ok := m.GetMessage().(*hostv1.ReadFileResponse_Size)
		if !ok {
			return 0, "", false
		}
		return head.Size, "application/octet-stream", true
	})
}

// readTree streams a directory, in the same way.
func (s *Server) readTree(w http.ResponseWriter, r *http.Request) error {
	t, _, err := fileTarget(r)
	if err != nil {
		return err
	}
	ctx, done, err := s.enter(r.Context(), t.id)
	if err != nil {
		return err
	}
	defer done()
	tree, err := s.cfg.Host.ReadTree(ctx, connect.NewRequest(
		&hostv1.ReadTreeRequest{Id: string(t.id), Path: t.path, User: t.user}))
	if err != nil {
		return s.hostError(ctx, t.id, err)
	}
	return sendDownload(ctx, s, w, t.id, tree, func(m *hostv1.ReadTreeResponse) (int64, string, bool) {
		return -1, api.TreeType, m.GetStarted() != nil
	})
}

// dataMessage is one message of a transfer.
type dataMessage[T any] interface {
	*T
	GetData() []byte
}

// sendDownload answers with what a host sends. Head reads its first message: a size,
// below 0 where it is not known, and the type of what comes.
func sendDownload[T any, M dataMessage[T]](
	ctx context.Context, s *Server, w http.ResponseWriter, id sandbox.ID,
	from *connect.ServerStreamForClient[T], head func(M) (size int64, mediaType string, ok bool),
) error {
	stop := unblock(ctx, http.NewResponseController(w).SetWriteDeadline)
	defer stop()
	defer func() { _ = from.Close() }() // its error was seen by Receive
	if !from.Receive() {
		err := from.Err()
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return s.hostError(ctx, id, err)
	}
	size, mediaType, ok := head(M(from.Msg()))
	if !ok {
		return fmt.Errorf("the host began with data (%T), not with what it is", from.Msg())
	}
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Content-Disposition", "attachment")
	if size >= 0 {
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
	}
	w.WriteHeader(http.StatusOK)
	if err := sendData[T, M](w, from, size); err != nil {
		return err
	}
	if !stop() {
		return errAborted // the connection is of no use any more
	}
	return nil
}

// unblock lets go of a client that does not read, or does not send, when the
// call ends for a reason of ours: without it the transfer would wait for the
// client. The returned function ends that and says whether it was in time.
func unblock(ctx context.Context, setDeadline func(time.Time) error) (stop func() bool) {
	return context.AfterFunc(ctx, func() {
		_ = setDeadline(time.Unix(1, 0)) // tests' recorders have no connection
	})
}

func sendData[T any, M dataMessage[T]](w http.ResponseWriter, from *connect.ServerStreamForClient[T], size int64) error {
	var sent int64
	for from.Receive() {
		data := M(from.Msg()).GetData()
		sent += int64(len(data))
		if _, err := w.Write(data); err != nil {
			return errAborted
		}
	}
	if from.Err() != nil || (size >= 0 && sent != size) {
		// What was written may have the reason at its end, as a tree has.
		_ = http.NewResponseController(w).Flush() // it is broken off anyway
		return errAborted
	}
	return nil
}

// writeFile streams a file in. When the client breaks off, the host's call is
// cancelled before its end, so that the host does not take a part for the whole.
func (s *Server) writeFile(w http.ResponseWriter, r *http.Request) error {
	resp, err := sendUpload(s, w, r, "application/octet-stream", s.cfg.Host.WriteFile, func(t target) *hostv1.WriteFileRequest {
		return &hostv1.WriteFileRequest{Message: &hostv1.WriteFileRequest_Start_{
			Start: &hostv1.WriteFileRequest_Start{Id: string(t.id), Path: t.path, User: t.user},
		}}
	}, func(data []byte) *hostv1.WriteFileRequest {
		return &hostv1.WriteFileRequest{Message: &hostv1.WriteFileRequest_Data{Data: data}}
	})
	if err != nil {
		return err
	}
	return ok(w, api.Written{Path: resp.GetPath(), Size: resp.GetSize()})
}

// writeTree streams a directory in, in the same way.
func (s *Server) writeTree(w http.ResponseWriter, r *http.Request) error {
	m, err := sendUpload(s, w, r, api.TreeType, s.cfg.Host.WriteTree, func(t target) *hostv1.WriteTreeRequest {
		return &hostv1.WriteTreeRequest{Message: &hostv1.WriteTreeRequest_Start_{
			Start: &hostv1.WriteTreeRequest_Start{Id: string(t.id), Path: t.path, User: t.user},
		}}
	}, func(data []byte) *hostv1.WriteTreeRequest {
		return &hostv1.WriteTreeRequest{Message: &hostv1.WriteTreeRequest_Data{Data: data}}
	})
	if err != nil {
		return err
	}
	return ok(w, api.Tree{
		Path: m.GetPath(), Files: m.GetFiles(), Directories: m.GetDirectories(), Bytes: m.GetBytes(),
		Skipped: m.GetSkipped(), FirstSkipped: m.GetFirstSkipped(),
	})
}

// sendUpload sends a request's body to a host, and returns what the host answers.
func sendUpload[Req, Res any](
	s *Server, w http.ResponseWriter, r *http.Request, mediaType string,
	open func(context.Context) *connect.ClientStreamForClient[Req, Res], start func(target) *Req, data func([]byte) *Req,
) (*Res, error) {
	t, _, err := fileTarget(r)
	if err != nil {
		return nil, err
	}
	if err := checkMediaType(r, mediaType); err != nil {
		return nil, err
	}
	ctx, done, err := s.enter(r.Context(), t.id)
	if err != nil {
		return nil, err
	}
	defer done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer unblock(ctx, http.NewResponseController(w).SetReadDeadline)()
	up := open(ctx)
	err = up.Send(start(t))
	if err == nil {
		err = sendBody(r.Body, func(b []byte) error { return up.Send(data(b)) })
	}
	var broken *bodyError
	switch {
	case err != nil && ctx.Err() != nil: // from here, so the body was cut off from here too
		return nil, s.hostError(ctx, t.id, err) // the deferred cancel resets the host's stream, as below
	case errors.As(err, &broken):
		// The deferred cancel resets the host's stream. Closing it in order, as
		// CloseAndReceive does, could make the part look like the whole.
		return nil, sandbox.Errorf(sandbox.KindInvalid, "read body: %w", broken.err)
	}
	// After a failed Send the host's reason is in the answer.
	resp, err := up.CloseAndReceive()
	if err != nil {
		return nil, s.hostError(ctx, t.id, err)
	}
	return resp.Msg, nil
}

// bodyError is the client's fault, not the host's.
type bodyError struct{ err error }

func (e *bodyError) Error() string { return e.err.Error() }

func sendBody(body io.Reader, send func([]byte) error) error {
	buf := make([]byte, uploadChunk)
	for {
		n, readErr := fill(body, buf)
		if n > 0 {
			if err := send(buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(readErr, io.EOF) {
			return nil
		}
		if readErr != nil {
			return &bodyError{readErr}
		}
	}
}

// fill reads until buf is full or r has an error, and returns that error as it
// is. io.ReadFull would make an early end and a broken connection look the same.
func fill(r io.Reader, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var more int
		more, err = r.Read(buf[n:])
		n += more
	}
	return n, err
}

func (s *Server) statFile(w http.ResponseWriter, r *http.Request) error {
	t, _, err := fileTarget(r)
	if err != nil {
		return err
	}
	return s.unary(w, r, t.id, func(ctx context.Context) (any, error) {
		resp, err := s.cfg.Host.StatFile(ctx, connect.NewRequest(
			&hostv1.StatFileRequest{Id: string(t.id), Path: t.path, User: t.user}))
		if err != nil {
			return nil, err
		}
		return fileOut(resp.Msg.GetEntry()), nil
	})
}

func (s *Server) listDir(w http.ResponseWriter, r *http.Request) error {
	t, q, err := fileTarget(r, "depth")
	if err != nil {
		return err
	}
	depth := 1
	if q.Has("depth") {
		if depth, err = within("depth", q.Get("depth"), 1, api.MaxListDepth); err != nil {
			return err
		}
	}
	return s.unary(w, r, t.id, func(ctx context.Context) (any, error) {
		resp, err := s.cfg.Host.ListDir(ctx, connect.NewRequest(
			&hostv1.ListDirRequest{Id: string(t.id), Path: t.path, User: t.user, Depth: uint32(depth)}))
		if err != nil {
			return nil, err
		}
		out := api.FileList{Entries: []api.File{}}
		for _, e := range resp.Msg.GetEntries() {
			out.Entries = append(out.Entries, fileOut(e))
		}
		return out, nil
	})
}

// pathBody reads a body that names one path.
func pathBody(w http.ResponseWriter, r *http.Request) (target, error) {
	id, err := pathID(r)
	if err != nil {
		return target{}, err
	}
	var req api.PathRequest
	if err := readBody(w, r, &req); err != nil {
		return target{}, err
	}
	if err := checkPath("path", req.Path); err != nil {
		return target{}, err
	}
	return target{id, req.Path, req.User}, checkUser(req.User)
}

func (s *Server) makeDir(w http.ResponseWriter, r *http.Request) error {
	t, err := pathBody(w, r)
	if err != nil {
		return err
	}
	return s.unary(w, r, t.id, func(ctx context.Context) (any, error) {
		resp, err := s.cfg.Host.MakeDir(ctx, connect.NewRequest(
			&hostv1.MakeDirRequest{Id: string(t.id), Path: t.path, User: t.user}))
		if err != nil {
			return nil, err
		}
		return fileOut(resp.Msg.GetEntry()), nil
	})
}

func (s *Server) removeFile(w http.ResponseWriter, r *http.Request) error {
	t, err := pathBody(w, r)
	if err != nil {
		return err
	}
	return s.unary(w, r, t.id, func(ctx context.Context) (any, error) {
		_, err := s.cfg.Host.RemoveFile(ctx, connect.NewRequest(
			&hostv1.RemoveFileRequest{Id: string(t.id), Path: t.path, User: t.user}))
		return struct{}{}, err
	})
}

func (s *Server) moveFile(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	var req api.MoveRequest
	if err := readBody(w, r, &req); err != nil {
		return err
	}
	if err := checkPath("source", req.Source); err != nil {
		return err
	}
	if err := checkPath("destination", req.Destination); err != nil {
		return err
	}
	if err := checkUser(req.User); err != nil {
		return err
	}
	return s.unary(w, r, id, func(ctx context.Context) (any, error) {
		resp, err := s.cfg.Host.MoveFile(ctx, connect.NewRequest(&hostv1.MoveFileRequest{
			Id: string(id), Source: req.Source, Destination: req.Destination, User: req.User,
		}))
		if err != nil {
			return nil, err
		}
		return fileOut(resp.Msg.GetEntry()), nil
	})
}
