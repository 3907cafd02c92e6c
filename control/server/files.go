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
	stop := unblock(ctx, http.NewResponseController(w).SetWriteDeadline)
	defer stop()
	file, err := s.cfg.Host.ReadFile(ctx, connect.NewRequest(
		&hostv1.ReadFileRequest{Id: string(t.id), Path: t.path, User: t.user}))
	if err != nil {
		return s.hostError(ctx, t.id, err)
	}
	defer func() { _ = file.Close() }() // its error was seen by Receive
	if !file.Receive() {
		err := file.Err()
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return s.hostError(ctx, t.id, err)
	}
	head, isHead := file.Msg().GetMessage().(*hostv1.ReadFileResponse_Size)
	if !isHead {
		return fmt.Errorf("read file: the host sent %T first, not the size", file.Msg().GetMessage())
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Disposition", "attachment")
	if head.Size >= 0 {
		w.Header().Set("Content-Length", strconv.FormatInt(head.Size, 10))
	}
	w.WriteHeader(http.StatusOK)
	if err := sendFile(w, file, head.Size); err != nil {
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

func sendFile(w io.Writer, file *connect.ServerStreamForClient[hostv1.ReadFileResponse], size int64) error {
	var sent int64
	for file.Receive() {
		data := file.Msg().GetData()
		sent += int64(len(data))
		if _, err := w.Write(data); err != nil {
			return errAborted
		}
	}
	if file.Err() != nil || (size >= 0 && sent != size) {
		return errAborted
	}
	return nil
}

// writeFile streams a file in. When the client breaks off, the host's call is
// cancelled before its end, so that the host does not take a part for the whole.
func (s *Server) writeFile(w http.ResponseWriter, r *http.Request) error {
	t, _, err := fileTarget(r)
	if err != nil {
		return err
	}
	if err := checkMediaType(r, "application/octet-stream"); err != nil {
		return err
	}
	ctx, done, err := s.enter(r.Context(), t.id)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer unblock(ctx, http.NewResponseController(w).SetReadDeadline)()
	up := s.cfg.Host.WriteFile(ctx)
	err = up.Send(&hostv1.WriteFileRequest{Message: &hostv1.WriteFileRequest_Start_{
		Start: &hostv1.WriteFileRequest_Start{Id: string(t.id), Path: t.path, User: t.user},
	}})
	if err == nil {
		err = sendBody(up, r.Body)
	}
	var broken *bodyError
	switch {
	case err != nil && ctx.Err() != nil: // from here, so the body was cut off from here too
		return s.hostError(ctx, t.id, err) // the deferred cancel resets the host's stream, as below
	case errors.As(err, &broken):
		// The deferred cancel resets the host's stream. Closing it in order, as
		// CloseAndReceive does, could make the part look like the whole.
		return sandbox.Errorf(sandbox.KindInvalid, "read body: %w", broken.err)
	}
	// After a failed Send the host's reason is in the answer.
	resp, err := up.CloseAndReceive()
	if err != nil {
		return s.hostError(ctx, t.id, err)
	}
	return ok(w, api.Written{Path: resp.Msg.GetPath(), Size: resp.Msg.GetSize()})
}

// bodyError is the client's fault, not the host's.
type bodyError struct{ err error }

func (e *bodyError) Error() string { return e.err.Error() }

func sendBody(up *connect.ClientStreamForClient[hostv1.WriteFileRequest, hostv1.WriteFileResponse], body io.Reader) error {
	buf := make([]byte, uploadChunk)
	for {
		n, readErr := fill(body, buf)
		if n > 0 {
			msg := &hostv1.WriteFileRequest{Message: &hostv1.WriteFileRequest_Data{Data: buf[:n]}}
			if err := up.Send(msg); err != nil {
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
