package server

import (
	"context"
	"errors"
	"io"
	"strings"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

var fileTypes = map[filesystem.FileType]string{
	filesystem.FileType_FILE_TYPE_FILE:      "file",
	filesystem.FileType_FILE_TYPE_DIRECTORY: "directory",
	filesystem.FileType_FILE_TYPE_SYMLINK:   "symlink",
}

func encodeFile(e *filesystem.EntryInfo) *hostv1.FileEntry {
	if e == nil {
		return nil
	}
	kind, ok := fileTypes[e.GetType()]
	if !ok {
		kind = "other"
	}
	return &hostv1.FileEntry{
		Name: e.GetName(), Path: e.GetPath(), Type: kind, Size: e.GetSize(), Mode: e.GetMode(), Permissions: e.GetPermissions(),
		Owner: e.GetOwner(), Group: e.GetGroup(), ModifiedAt: e.GetModifiedTime(), SymlinkTarget: e.GetSymlinkTarget(),
	}
}

// named is what names a file.
type named interface {
	GetId() string
	GetPath() string
	GetUser() string
}

func ref(m named) host.FileRef {
	return host.FileRef{ID: m.GetId(), Path: m.GetPath(), User: m.GetUser()}
}

func (s *server) StatFile(ctx context.Context, req *connect.Request[hostv1.StatFileRequest]) (*connect.Response[hostv1.StatFileResponse], error) {
	e, err := s.agent.Stat(ctx, ref(req.Msg))
	return answer(&hostv1.StatFileResponse{Entry: encodeFile(e)}, err)
}

func (s *server) ListDir(ctx context.Context, req *connect.Request[hostv1.ListDirRequest]) (*connect.Response[hostv1.ListDirResponse], error) {
	entries, err := s.agent.ListDir(ctx, ref(req.Msg), req.Msg.GetDepth())
	out := &hostv1.ListDirResponse{}
	for _, e := range entries {
		out.Entries = append(out.Entries, encodeFile(e))
	}
	return answer(out, err)
}

func (s *server) MakeDir(ctx context.Context, req *connect.Request[hostv1.MakeDirRequest]) (*connect.Response[hostv1.MakeDirResponse], error) {
	e, err := s.agent.MakeDir(ctx, ref(req.Msg))
	return answer(&hostv1.MakeDirResponse{Entry: encodeFile(e)}, err)
}

func (s *server) MoveFile(ctx context.Context, req *connect.Request[hostv1.MoveFileRequest]) (*connect.Response[hostv1.MoveFileResponse], error) {
	m := req.Msg
	e, err := s.agent.Move(ctx, host.FileRef{ID: m.GetId(), Path: m.GetSource(), User: m.GetUser()}, m.GetDestination())
	return answer(&hostv1.MoveFileResponse{Entry: encodeFile(e)}, err)
}

func (s *server) RemoveFile(ctx context.Context, req *connect.Request[hostv1.RemoveFileRequest]) (*connect.Response[hostv1.RemoveFileResponse], error) {
	return answer(&hostv1.RemoveFileResponse{}, s.agent.Remove(ctx, ref(req.Msg)))
}

func (s *server) ReadFile(ctx context.Context, req *connect.Request[hostv1.ReadFileRequest], stream *connect.ServerStream[hostv1.ReadFileResponse]) error {
	err := s.agent.ReadFile(ctx, ref(req.Msg),
		func(size int64) error {
			return stream.Send(&hostv1.ReadFileResponse{Message: &hostv1.ReadFileResponse_Size{Size: size}})
		},
		func(data []byte) error {
			return stream.Send(&hostv1.ReadFileResponse{Message: &hostv1.ReadFileResponse_Data{Data: data}})
		})
	return hostapi.ToConnect(err)
}

func (s *server) WriteFile(ctx context.Context, stream *connect.ClientStream[hostv1.WriteFileRequest]) (*connect.Response[hostv1.WriteFileResponse], error) {
	to, data, err := write(stream, (*hostv1.WriteFileRequest).GetStart, (*hostv1.WriteFileRequest).GetData)
	if err != nil {
		return nil, err
	}
	path, size, err := s.agent.WriteFile(ctx, to, data)
	return answer(&hostv1.WriteFileResponse{Path: path, Size: size}, err)
}

func (s *server) ReadTree(ctx context.Context, req *connect.Request[hostv1.ReadTreeRequest], stream *connect.ServerStream[hostv1.ReadTreeResponse]) error {
	err := s.agent.ReadTree(ctx, ref(req.Msg),
		func() error {
			return stream.Send(&hostv1.ReadTreeResponse{Message: &hostv1.ReadTreeResponse_Started_{Started: &hostv1.ReadTreeResponse_Started{}}})
		},
		func(data []byte) error {
			return stream.Send(&hostv1.ReadTreeResponse{Message: &hostv1.ReadTreeResponse_Data{Data: data}})
		})
	return hostapi.ToConnect(err)
}

func (s *server) WriteTree(ctx context.Context, stream *connect.ClientStream[hostv1.WriteTreeRequest]) (*connect.Response[hostv1.WriteTreeResponse], error) {
	to, data, err := write(stream, (*hostv1.WriteTreeRequest).GetStart, (*hostv1.WriteTreeRequest).GetData)
	if err != nil {
		return nil, err
	}
	made, err := s.agent.WriteTree(ctx, to, data)
	return answer(&hostv1.WriteTreeResponse{
		Path: made.Path, Files: made.Files, Directories: made.Directories, Bytes: made.Bytes,
		Skipped: made.Skipped, FirstSkipped: strings.ToValidUTF8(made.FirstSkipped, "\uFFFD"),
	}, err)
}

// write reads how a write begins: where to, and from then on what. start and data are
// what a message of it may have.
func write[M any, S interface {
	comparable
	named
}](stream *connect.ClientStream[M], start func(*M) S, data func(*M) []byte) (host.FileRef, io.Reader, error) {
	if !stream.Receive() {
		if err := stream.Err(); err != nil {
			return host.FileRef{}, nil, err
		}
		return host.FileRef{}, nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindInvalid, "a write needs a first message"))
	}
	var none S
	to := start(stream.Msg())
	if to == none {
		return host.FileRef{}, nil, hostapi.ToConnect(sandbox.Errorf(sandbox.KindInvalid, "the first message of a write must be start"))
	}
	return ref(to), &pieces{next: func() ([]byte, error) {
		if stream.Receive() {
			return data(stream.Msg()), nil
		}
		if err := stream.Err(); err != nil {
			return nil, err
		}
		return nil, io.EOF
	}}, nil
}

// pieces reads the data messages of an upload one after the other.
type pieces struct {
	next func() ([]byte, error)
	rest []byte
}

func (p *pieces) Read(b []byte) (int, error) {
	for len(p.rest) == 0 {
		data, err := p.next()
		if errors.Is(err, io.EOF) {
			return 0, io.EOF
		}
		if err != nil {
			return 0, sandbox.Errorf(sandbox.KindTransient, "the upload was cut: %w", err)
		}
		p.rest = data
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

func (s *server) WatchDir(ctx context.Context, req *connect.Request[hostv1.WatchDirRequest], stream *connect.ServerStream[hostv1.WatchDirResponse]) error {
	lost, err := s.agent.Watch(ctx, ref(req.Msg), req.Msg.GetRecursive(),
		func() error {
			return stream.Send(&hostv1.WatchDirResponse{Message: &hostv1.WatchDirResponse_Started_{Started: &hostv1.WatchDirResponse_Started{}}})
		},
		func(e host.FileEvent) error {
			return stream.Send(&hostv1.WatchDirResponse{Message: &hostv1.WatchDirResponse_Event{Event: &hostv1.FileEvent{Type: e.Type, Name: e.Name}}})
		})
	if lost {
		return stream.Send(&hostv1.WatchDirResponse{Message: &hostv1.WatchDirResponse_Lost_{Lost: &hostv1.WatchDirResponse_Lost{}}})
	}
	return hostapi.ToConnect(err)
}
