package host

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// maxPathBytes is the kernel's own bound on a path.
const maxPathBytes = 4096

// maxDepth bounds a recursive listing.
const maxDepth = 64

// FileRef names a file in a sandbox, as one of its users.
type FileRef struct {
	ID   string
	Path string
	User string // empty: the default
}

func (f FileRef) check() error {
	if f.User != "" {
		if err := sandbox.CheckUser(f.User); err != nil {
			return err
		}
	}
	return checkPath(f.Path)
}

func checkPath(path string) error {
	switch {
	case path == "":
		return sandbox.Errorf(sandbox.KindInvalid, "path is empty")
	case len(path) > maxPathBytes:
		return sandbox.Errorf(sandbox.KindInvalid, "path has %d bytes, at most %d are allowed", len(path), maxPathBytes)
	case strings.ContainsRune(path, 0):
		return sandbox.Errorf(sandbox.KindInvalid, "path has a NUL byte")
	}
	return nil
}

// call runs one request of the guest's filesystem service.
func call[Req, Res any](
	ctx context.Context, a *Agent, f FileRef, msg *Req,
	rpc func(*guest) func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error),
) (*Res, error) {
	g, ctx, cancel, err := a.fileAgent(ctx, f)
	if err != nil {
		return nil, err
	}
	defer cancel()
	req := connect.NewRequest(msg)
	g.sign(req.Header(), f.User)
	res, err := rpc(g)(ctx, req)
	if err != nil {
		return nil, rpcError(ctx, err)
	}
	return res.Msg, nil
}

type (
	fsEntry = filesystem.EntryInfo
	fsCtx   = context.Context
)

// Stat describes one file.
func (a *Agent) Stat(ctx context.Context, f FileRef) (*fsEntry, error) {
	res, err := call(ctx, a, f, &filesystem.StatRequest{Path: f.Path},
		func(g *guest) func(fsCtx, *connect.Request[filesystem.StatRequest]) (*connect.Response[filesystem.StatResponse], error) {
			return g.files.Stat
		})
	return res.GetEntry(), err
}

// ListDir lists a directory down to a depth; 0 means 1.
func (a *Agent) ListDir(ctx context.Context, f FileRef, depth uint32) ([]*fsEntry, error) {
	if depth > maxDepth {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "depth is %d, must be from 0 to %d", depth, maxDepth)
	}
	res, err := call(ctx, a, f, &filesystem.ListDirRequest{Path: f.Path, Depth: depth},
		func(g *guest) func(fsCtx, *connect.Request[filesystem.ListDirRequest]) (*connect.Response[filesystem.ListDirResponse], error) {
			return g.files.ListDir
		})
	return res.GetEntries(), err
}

// MakeDir makes a directory and its parents.
func (a *Agent) MakeDir(ctx context.Context, f FileRef) (*fsEntry, error) {
	res, err := call(ctx, a, f, &filesystem.MakeDirRequest{Path: f.Path},
		func(g *guest) func(fsCtx, *connect.Request[filesystem.MakeDirRequest]) (*connect.Response[filesystem.MakeDirResponse], error) {
			return g.files.MakeDir
		})
	return res.GetEntry(), err
}

// Move renames a file or directory.
func (a *Agent) Move(ctx context.Context, f FileRef, to string) (*fsEntry, error) {
	if err := checkPath(to); err != nil {
		return nil, err
	}
	res, err := call(ctx, a, f, &filesystem.MoveRequest{Source: f.Path, Destination: to},
		func(g *guest) func(fsCtx, *connect.Request[filesystem.MoveRequest]) (*connect.Response[filesystem.MoveResponse], error) {
			return g.files.Move
		})
	return res.GetEntry(), err
}

// Remove deletes a file or a whole directory; a missing one is success.
func (a *Agent) Remove(ctx context.Context, f FileRef) error {
	_, err := call(ctx, a, f, &filesystem.RemoveRequest{Path: f.Path},
		func(g *guest) func(fsCtx, *connect.Request[filesystem.RemoveRequest]) (*connect.Response[filesystem.RemoveResponse], error) {
			return g.files.Remove
		})
	return err
}

// ReadFile hands a file's size to begin, then its bytes to piece, in order. It
// waits for piece: nothing is buffered beyond one of them.
func (a *Agent) ReadFile(ctx context.Context, f FileRef, begin func(size int64) error, piece func([]byte) error) error {
	return a.download(ctx, f, pathFiles, begin, piece)
}

// ReadTree does the same with a directory, as the tar stream that package tree
// describes. The stream says itself whether it is whole.
func (a *Agent) ReadTree(ctx context.Context, f FileRef, begin func() error, piece func([]byte) error) error {
	return a.download(ctx, f, guestapi.PathTree, func(int64) error { return begin() }, piece)
}

func (a *Agent) download(ctx context.Context, f FileRef, endpoint string, begin func(size int64) error, piece func([]byte) error) error {
	g, ctx, cancel, err := a.fileAgent(ctx, f)
	if err != nil {
		return err
	}
	defer cancel()
	ctx, watch := watchSilence(ctx)
	defer watch.Stop()
	res, err := g.do(ctx, http.MethodGet, filesURL(endpoint, f.Path, f.User), nil, nil)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }() // read to its end, or given up
	if err := begin(res.ContentLength); err != nil {
		return err
	}
	buf := make([]byte, 256<<10)
	for {
		watch.Reset(silenceKept)
		n, err := res.Body.Read(buf)
		watch.Stop() // a slow reader is not a silent guest
		if n > 0 {
			if err := piece(buf[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return unanswered(ctx, err)
		}
	}
}

// WriteFile replaces a file with what it reads, whole: when the source fails,
// the old file stays. A Read of the source may still be under way when it
// returns: an agent may answer early.
func (a *Agent) WriteFile(ctx context.Context, f FileRef, source io.Reader) (path string, size int64, err error) {
	var written []guestapi.WrittenFile
	size, err = a.upload(ctx, f, pathFiles, "application/octet-stream", source, &written)
	if err != nil {
		return "", 0, err
	}
	if len(written) != 1 {
		return "", 0, sandbox.Errorf(sandbox.KindInternal, "the guest agent tells of %d files after a write of one", len(written))
	}
	return written[0].Path, size, nil
}

// WriteTree unpacks the tar stream that it reads into a directory, which is made if
// it is missing. After an error what was unpacked before stays. For the source the
// same holds as with WriteFile.
func (a *Agent) WriteTree(ctx context.Context, f FileRef, source io.Reader) (guestapi.Tree, error) {
	var made guestapi.Tree
	_, err := a.upload(ctx, f, guestapi.PathTree, guestapi.TreeType, source, &made)
	return made, err
}

// upload sends a source, and decodes the answer. It returns how much it has sent.
func (a *Agent) upload(ctx context.Context, f FileRef, endpoint, contentType string, source io.Reader, answer any) (int64, error) {
	g, ctx, cancel, err := a.fileAgent(ctx, f)
	if err != nil {
		return 0, err
	}
	defer cancel()
	ctx, watch := watchSilence(ctx)
	defer watch.Stop()
	up := &upload{source: source, watch: watch}
	defer up.stop()
	res, err := g.send(ctx, http.MethodPost, filesURL(endpoint, f.Path, f.User), up, http.Header{"Content-Type": {contentType}})
	if err != nil {
		if _, failed := up.soFar(); failed != nil {
			return 0, failed
		}
		return 0, err
	}
	if err := refusal(res); err != nil {
		return 0, err
	}
	defer func() { _ = res.Body.Close() }() // read below
	if err := json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(answer); err != nil {
		return 0, sandbox.Errorf(sandbox.KindInternal, "the guest agent's answer to a write is not understood: %v", err)
	}
	sent, _ := up.soFar()
	return sent, nil
}

func (a *Agent) fileAgent(ctx context.Context, f FileRef) (*guest, context.Context, context.CancelFunc, error) {
	if err := f.check(); err != nil {
		return nil, nil, nil, err
	}
	b, err := a.box(f.ID)
	if err != nil {
		return nil, nil, nil, err
	}
	return a.guestOf(ctx, b)
}

// upload is the body of a write: it counts what passes and remembers the source's
// own error. The guest's silence counts only while it is the guest's turn. net/http
// reads on, in a goroutine of its own, after an agent that answers early.
type upload struct {
	source io.Reader
	watch  *time.Timer

	mu      sync.Mutex // guards what follows
	n       int64
	err     error // the source's
	stopped bool
}

func (u *upload) Read(p []byte) (int, error) {
	u.mu.Lock()
	stopped := u.stopped
	u.mu.Unlock()
	if stopped {
		return 0, io.ErrClosedPipe
	}
	u.watch.Stop()
	n, err := u.source.Read(p)
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.stopped {
		return 0, io.ErrClosedPipe
	}
	u.watch.Reset(silenceKept)
	u.n += int64(n)
	if err != nil && err != io.EOF {
		u.err = err
	}
	return n, err
}

func (u *upload) soFar() (n int64, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.n, u.err
}

func (u *upload) stop() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.stopped = true
}
