package files

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	filesystemv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
)

// Stat describes one path.
func (s *Server) Stat(_ context.Context, req *connect.Request[filesystemv1.StatRequest]) (*connect.Response[filesystemv1.StatResponse], error) {
	path, _, err := s.target(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	e, err := entry(path, s.identity.Accounts.Names())
	if err != nil {
		return nil, rpcError(err)
	}
	return connect.NewResponse(&filesystemv1.StatResponse{Entry: e}), nil
}

// MakeDir makes a directory and its parents.
func (s *Server) MakeDir(_ context.Context, req *connect.Request[filesystemv1.MakeDirRequest]) (*connect.Response[filesystemv1.MakeDirResponse], error) {
	path, user, err := s.target(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if info, err := os.Stat(path); err == nil {
		if info.IsDir() {
			return nil, errorf(connect.CodeAlreadyExists, "directory %s exists already", path)
		}
		return nil, errorf(connect.CodeInvalidArgument, "%s exists already and is not a directory", path)
	}
	if err := mkdirAll(path, user); err != nil {
		return nil, rpcError(err)
	}
	e, err := entry(path, s.identity.Accounts.Names())
	if err != nil {
		return nil, rpcError(err)
	}
	return connect.NewResponse(&filesystemv1.MakeDirResponse{Entry: e}), nil
}

// Move renames, and makes the parents of the destination.
func (s *Server) Move(_ context.Context, req *connect.Request[filesystemv1.MoveRequest]) (*connect.Response[filesystemv1.MoveResponse], error) {
	source, user, err := s.target(req.Header(), req.Msg.GetSource())
	if err != nil {
		return nil, err
	}
	destination, _, err := s.target(req.Header(), req.Msg.GetDestination())
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(source); err != nil {
		return nil, rpcError(err)
	}
	if err := mkdirAll(parent(destination), user); err != nil {
		return nil, rpcError(err)
	}
	if err := os.Rename(source, destination); err != nil {
		return nil, rpcError(err)
	}
	e, err := entry(destination, s.identity.Accounts.Names())
	if err != nil {
		return nil, rpcError(err)
	}
	return connect.NewResponse(&filesystemv1.MoveResponse{Entry: e}), nil
}

// Remove deletes a path and all below it. A missing one is success.
func (s *Server) Remove(_ context.Context, req *connect.Request[filesystemv1.RemoveRequest]) (*connect.Response[filesystemv1.RemoveResponse], error) {
	path, _, err := s.target(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if path == "/" {
		return nil, errorf(connect.CodeInvalidArgument, "the root directory cannot be removed")
	}
	if err := os.RemoveAll(path); err != nil {
		return nil, rpcError(err)
	}
	return connect.NewResponse(&filesystemv1.RemoveResponse{}), nil
}

// ListDir lists a directory in lexical pre-order. It follows the path itself if
// that is a link, and none below it.
func (s *Server) ListDir(ctx context.Context, req *connect.Request[filesystemv1.ListDirRequest]) (*connect.Response[filesystemv1.ListDirResponse], error) {
	path, _, err := s.target(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, rpcError(err)
	}
	if !info.IsDir() {
		return nil, errorf(connect.CodeInvalidArgument, "%s is %s, not a directory", path, describeAny(info.Mode()))
	}
	depth := max(1, int(min(req.Msg.GetDepth(), 1<<20)))
	entries, err := list(ctx, path, depth, s.identity.Accounts.Names())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystemv1.ListDirResponse{Entries: entries}), nil
}

func list(ctx context.Context, root string, depth int, names account.Names) ([]*filesystemv1.EntryInfo, error) {
	resolved, err := filepath.EvalSymlinks(root) // WalkDir does not follow its root
	if err != nil {
		return nil, rpcError(err)
	}
	var entries []*filesystemv1.EntryInfo
	size := 0
	err = filepath.WalkDir(resolved, func(path string, d fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, fs.ErrNotExist) && path != resolved:
			return nil // removed while we walked
		case err != nil:
			return err
		case path == resolved:
			return nil
		}
		if len(entries) == MaxEntries || size > MaxListing {
			return errorf(connect.CodeResourceExhausted, "%s has more to list than %d entries and %d MiB: ask for less depth", root, MaxEntries, MaxListing>>20)
		}
		relative, err := filepath.Rel(resolved, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil {
			e := entryOf(filepath.Join(root, relative), info, names)
			entries = append(entries, e)
			size += proto.Size(e)
		}
		if d.IsDir() && strings.Count(relative, "/")+1 >= depth {
			return fs.SkipDir
		}
		return nil
	})
	var known *connect.Error
	if err != nil && !errors.As(err, &known) {
		return nil, rpcError(fmt.Errorf("list %s: %w", root, err))
	}
	return entries, err
}

func describeAny(mode fs.FileMode) string {
	if mode.IsRegular() {
		return "a file"
	}
	return describe(mode)
}
