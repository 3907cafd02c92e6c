package hostfake

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// file is what was written: its bytes while it is small, always its hash.
type file struct {
	data []byte
	size int64
	hash string
	dir  bool
}

// keepBytes is up to what size the fake keeps a file's bytes. Reading
// "/pattern/N" returns N bytes of Pattern instead.
const keepBytes = 1 << 20

func entryOf(name string, f file) *hostv1.FileEntry {
	e := &hostv1.FileEntry{
		Name: path.Base(name), Path: name, Type: "file", Size: f.size, Mode: 0o644, Permissions: "-rw-r--r--",
		Owner: "user", Group: "user", ModifiedAt: timestamppb.Now(),
	}
	if f.dir {
		e.Type, e.Mode, e.Permissions = "directory", 0o755, "drwxr-xr-x"
	}
	return e
}

func missing(name string) error {
	return hostapi.ToConnect(sandbox.Errorf(sandbox.KindNotFound, "%s: no such file or directory", name))
}

// Hash is the SHA-256 of a file that was written; empty if there is none.
func (h *Host) Hash(id, name string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if b, ok := h.boxes[id]; ok {
		return b.files[name].hash
	}
	return ""
}

// on runs fn on a running sandbox's files.
func (h *Host) on(ctx context.Context, method, id string, fn func(files map[string]file) error) error {
	if err := h.enter(ctx, method, id); err != nil {
		return err
	}
	b, _, done, err := h.visit(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := b.callable(); err != nil {
		return hostapi.ToConnect(err)
	}
	return fn(b.files)
}

// StatFile implements the contract.
func (h *Host) StatFile(ctx context.Context, req *connect.Request[hostv1.StatFileRequest]) (*connect.Response[hostv1.StatFileResponse], error) {
	out := &hostv1.StatFileResponse{}
	err := h.on(ctx, "StatFile", req.Msg.GetId(), func(files map[string]file) error {
		f, ok := files[req.Msg.GetPath()]
		if !ok {
			return missing(req.Msg.GetPath())
		}
		out.Entry = entryOf(req.Msg.GetPath(), f)
		return nil
	})
	return connect.NewResponse(out), err
}

// ListDir implements the contract, for any depth the same.
func (h *Host) ListDir(ctx context.Context, req *connect.Request[hostv1.ListDirRequest]) (*connect.Response[hostv1.ListDirResponse], error) {
	out := &hostv1.ListDirResponse{}
	err := h.on(ctx, "ListDir", req.Msg.GetId(), func(files map[string]file) error {
		var names []string
		for name := range files {
			if strings.HasPrefix(name, strings.TrimSuffix(req.Msg.GetPath(), "/")+"/") {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		for _, name := range names {
			out.Entries = append(out.Entries, entryOf(name, files[name]))
		}
		return nil
	})
	return connect.NewResponse(out), err
}

// MakeDir implements the contract.
func (h *Host) MakeDir(ctx context.Context, req *connect.Request[hostv1.MakeDirRequest]) (*connect.Response[hostv1.MakeDirResponse], error) {
	out := &hostv1.MakeDirResponse{}
	err := h.on(ctx, "MakeDir", req.Msg.GetId(), func(files map[string]file) error {
		if _, ok := files[req.Msg.GetPath()]; ok {
			return hostapi.ToConnect(sandbox.Errorf(sandbox.KindExists, "%s exists", req.Msg.GetPath()))
		}
		files[req.Msg.GetPath()] = file{dir: true}
		out.Entry = entryOf(req.Msg.GetPath(), file{dir: true})
		return nil
	})
	return connect.NewResponse(out), err
}

// MoveFile implements the contract.
func (h *Host) MoveFile(ctx context.Context, req *connect.Request[hostv1.MoveFileRequest]) (*connect.Response[hostv1.MoveFileResponse], error) {
	out := &hostv1.MoveFileResponse{}
	err := h.on(ctx, "MoveFile", req.Msg.GetId(), func(files map[string]file) error {
		f, ok := files[req.Msg.GetSource()]
		if !ok {
			return missing(req.Msg.GetSource())
		}
		delete(files, req.Msg.GetSource())
		files[req.Msg.GetDestination()] = f
		out.Entry = entryOf(req.Msg.GetDestination(), f)
		return nil
	})
	return connect.NewResponse(out), err
}

// RemoveFile implements the contract.
func (h *Host) RemoveFile(ctx context.Context, req *connect.Request[hostv1.RemoveFileRequest]) (*connect.Response[hostv1.RemoveFileResponse], error) {
	err := h.on(ctx, "RemoveFile", req.Msg.GetId(), func(files map[string]file) error {
		delete(files, req.Msg.GetPath())
		return nil
	})
	return connect.NewResponse(&hostv1.RemoveFileResponse{}), err
}

// ReadFile implements the contract. The hook is asked again, as "ReadFile.data",
// before every piece.
func (h *Host) ReadFile(ctx context.Context, req *connect.Request[hostv1.ReadFileRequest], stream *connect.ServerStream[hostv1.ReadFileResponse]) error {
	id, name := req.Msg.GetId(), req.Msg.GetPath()
	var f file
	err := h.on(ctx, "ReadFile", id, func(files map[string]file) error {
		var ok bool
		if f, ok = files[name]; !ok && !strings.HasPrefix(name, "/pattern/") {
			return missing(name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if f.dir {
		return hostapi.ToConnect(sandbox.Errorf(sandbox.KindInvalid, "%s is a directory", name))
	}
	_, ctx, done, err := h.visit(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	var r io.Reader = bytes.NewReader(f.data)
	size := f.size
	if n, ok := strings.CutPrefix(name, "/pattern/"); ok {
		if size, err = strconv.ParseInt(n, 10, 64); err != nil {
			return missing(name)
		}
		r = Pattern(size)
	}
	if err := stream.Send(&hostv1.ReadFileResponse{Message: &hostv1.ReadFileResponse_Size{Size: size}}); err != nil {
		return err
	}
	buf := make([]byte, chunk)
	for {
		n, err := r.Read(buf)
		if err != nil {
			return nil // both readers end only at their end
		}
		if err := h.enter(ctx, "ReadFile.data", id); err != nil {
			return err
		}
		if ctx.Err() != nil { // it has ended or is paused, or the caller is gone
			return hostapi.ToConnect(context.Cause(ctx))
		}
		if err := stream.Send(&hostv1.ReadFileResponse{Message: &hostv1.ReadFileResponse_Data{Data: buf[:n]}}); err != nil {
			return err
		}
	}
}

// WriteFile implements the contract: without the caller's end there is no file.
func (h *Host) WriteFile(ctx context.Context, stream *connect.ClientStream[hostv1.WriteFileRequest]) (*connect.Response[hostv1.WriteFileResponse], error) {
	if !stream.Receive() {
		return nil, stream.Err()
	}
	start := stream.Msg().GetStart()
	if err := h.enter(ctx, "WriteFile", start.GetId()); err != nil {
		return nil, err
	}
	b, _, done, err := h.visit(ctx, start.GetId())
	if err != nil {
		return nil, err
	}
	defer done()
	var f file
	sum := sha256.New()
	for stream.Receive() {
		data := stream.Msg().GetData()
		sum.Write(data)
		f.size += int64(len(data))
		if f.size <= keepBytes {
			f.data = append(f.data, data...)
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	f.hash = hex.EncodeToString(sum.Sum(nil))
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := b.callable(); err != nil { // paused or ended meanwhile
		return nil, hostapi.ToConnect(sandbox.WithKind(sandbox.KindConflict, err))
	}
	b.files[start.GetPath()] = f
	return connect.NewResponse(&hostv1.WriteFileResponse{Path: start.GetPath(), Size: f.size}), nil
}
