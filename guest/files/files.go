// Package files is the filesystem service of the guest's contract, and its HTTP
// half: GET and POST /files, and /files/tree.
//
// It acts as the agent's own user, which is root in a VM; what it makes belongs
// to the user of the request. /files/tree acts with that user's rights alone: how
// far a tree reaches nobody sees beforehand. Only regular files are read and written: a device
// or a pipe never ends. An upload appears under its name whole or not at all.
// Both ways stream with a fixed buffer, so size has no cap but the disk.
package files

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"syscall"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem/filesystemconnect"
	"github.com/dormouse-sandbox/dormouse/guest/identity"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// These bound one listing, whose answer is built in memory.
const (
	MaxEntries = 50_000
	MaxListing = 12 << 20 // bytes
)

// Server is the filesystem service.
type Server struct {
	identity *identity.Current
	log      *slog.Logger
	gzips    chan struct{} // holds one token for each download that is compressed
	watchers watchers
}

var _ filesystemconnect.FilesystemHandler = (*Server)(nil)

// New builds a server.
func New(current *identity.Current, log *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Server{identity: current, log: log, gzips: make(chan struct{}, gzipsAtOnce)}
}

// user is whom a call is for: named by its Authorization header, or the default.
func (s *Server) user(header http.Header) (account.User, error) {
	name, _, _ := (&http.Request{Header: header}).BasicAuth()
	user, err := s.identity.Account(name)
	if err != nil {
		return user, errorf(connect.CodeUnauthenticated, "invalid username: '%s'", name)
	}
	return user, nil
}

// target resolves the path of a call.
func (s *Server) target(header http.Header, path string) (string, account.User, error) {
	user, err := s.user(header)
	if err != nil {
		return "", user, err
	}
	resolved, err := user.Resolve(path, s.identity.Get().Workdir)
	if err != nil {
		return "", user, errorf(connect.CodeInvalidArgument, "%w", err)
	}
	return resolved, user, nil
}

// mkdirAll makes a directory and its parents, 0755, those it makes owned by user.
func mkdirAll(path string, user account.User) error {
	info, err := os.Stat(path)
	if err == nil {
		if info.IsDir() {
			return nil
		}
		return &fs.PathError{Op: "mkdir", Path: path, Err: syscall.ENOTDIR}
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := mkdirAll(parent(path), user); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o755); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil // somebody else was faster, or it is a link to nowhere: the next step says so
		}
		return err
	}
	return give(path, user)
}

// give makes user the owner. A plain process that is not root owns it already.
func give(path string, user account.User) error {
	if os.Geteuid() != 0 {
		return nil
	}
	return os.Lchown(path, int(user.UID), int(user.GID))
}

// describe names what is not a regular file.
func describe(mode fs.FileMode) string {
	switch {
	case mode.IsDir():
		return "a directory"
	case mode&fs.ModeCharDevice != 0:
		return "a character device"
	case mode&fs.ModeDevice != 0:
		return "a block device"
	case mode&fs.ModeNamedPipe != 0:
		return "a named pipe"
	case mode&fs.ModeSocket != 0:
		return "a socket"
	}
	return "not a regular file"
}

// rpcError maps an error of the file system to the code of a call.
func rpcError(err error) error {
	code := connect.CodeInternal
	switch {
	case errors.Is(err, fs.ErrNotExist):
		code = connect.CodeNotFound
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		code = connect.CodePermissionDenied
	case sandbox.DiskFull(err):
		code = connect.CodeResourceExhausted
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENAMETOOLONG),
		errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.EISDIR):
		code = connect.CodeInvalidArgument
	case errors.Is(err, fs.ErrExist):
		code = connect.CodeAlreadyExists
	case errors.Is(err, syscall.EBUSY):
		code = connect.CodeFailedPrecondition
	}
	return connect.NewError(code, err)
}

func errorf(code connect.Code, format string, args ...any) error {
	return connect.NewError(code, fmt.Errorf(format, args...))
}
