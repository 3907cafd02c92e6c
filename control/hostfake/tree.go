package hostfake

import (
	"bytes"
	"context"
	"io"
	"strconv"
	"strings"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	hostv1 "github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1"
	"github.com/dormouse-sandbox/dormouse/internal/tree"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// ReadTree implements the contract: the stream that was written there, or, for
// "/pattern/N", N bytes that are none. The hook is asked again, as "ReadTree.data",
// before every piece.
func (h *Host) ReadTree(ctx context.Context, req *connect.Request[hostv1.ReadTreeRequest], stream *connect.ServerStream[hostv1.ReadTreeResponse]) error {
	id, name := req.Msg.GetId(), req.Msg.GetPath()
	var f file
	err := h.on(ctx, "ReadTree", id, func(files map[string]file) error {
		var ok bool
		if f, ok = files[name]; !ok && !strings.HasPrefix(name, "/pattern/") {
			return missing(name)
		}
		if ok && !f.dir {
			return hostapi.ToConnect(sandbox.Errorf(sandbox.KindInvalid, "%s is a file, not a directory", name))
		}
		return nil
	})
	if err != nil {
		return err
	}
	_, ctx, done, err := h.visit(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	var r io.Reader = bytes.NewReader(f.data)
	if n, ok := strings.CutPrefix(name, "/pattern/"); ok {
		size, err := strconv.ParseInt(n, 10, 64)
		if err != nil {
			return missing(name)
		}
		r = Pattern(size)
	}
	if err := stream.Send(&hostv1.ReadTreeResponse{Message: &hostv1.ReadTreeResponse_Started_{Started: &hostv1.ReadTreeResponse_Started{}}}); err != nil {
		return err
	}
	buf := make([]byte, chunk)
	for {
		n, err := r.Read(buf)
		if err != nil {
			return nil // both readers end only at their end
		}
		if err := h.enter(ctx, "ReadTree.data", id); err != nil {
			return err
		}
		if ctx.Err() != nil { // it has ended or is paused, or the caller is gone
			return hostapi.ToConnect(context.Cause(ctx))
		}
		if err := stream.Send(&hostv1.ReadTreeResponse{Message: &hostv1.ReadTreeResponse_Data{Data: buf[:n]}}); err != nil {
			return err
		}
	}
}

// WriteTree implements the contract. It asks of a stream what a guest would, and
// keeps it while it is small.
func (h *Host) WriteTree(ctx context.Context, stream *connect.ClientStream[hostv1.WriteTreeRequest]) (*connect.Response[hostv1.WriteTreeResponse], error) {
	if !stream.Receive() {
		return nil, stream.Err()
	}
	start := stream.Msg().GetStart()
	if err := h.enter(ctx, "WriteTree", start.GetId()); err != nil {
		return nil, err
	}
	b, _, done, err := h.visit(ctx, start.GetId())
	if err != nil {
		return nil, err
	}
	defer done()
	kept := &bounded{most: keepBytes}
	report, err := tree.Relay(kept, &treePieces{stream: stream}, nil)
	if err != nil {
		return nil, hostapi.ToConnect(err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := b.callable(); err != nil { // paused or ended meanwhile
		return nil, hostapi.ToConnect(sandbox.WithKind(sandbox.KindConflict, err))
	}
	b.files[start.GetPath()] = file{dir: true, data: kept.Bytes()}
	return connect.NewResponse(&hostv1.WriteTreeResponse{
		Path: start.GetPath(), Files: report.Files, Directories: report.Directories, Bytes: report.Bytes,
		Skipped: report.Skipped, FirstSkipped: report.FirstSkipped,
	}), nil
}

type treePieces struct {
	stream *connect.ClientStream[hostv1.WriteTreeRequest]
	rest   []byte
}

func (p *treePieces) Read(b []byte) (int, error) {
	for len(p.rest) == 0 {
		if !p.stream.Receive() {
			if err := p.stream.Err(); err != nil {
				return 0, err
			}
			return 0, io.EOF
		}
		p.rest = p.stream.Msg().GetData()
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}
