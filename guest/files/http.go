package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// statusError is an error with the HTTP status it is answered with.
type statusError struct {
	status int
	err    error
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

func statusf(status int, format string, args ...any) error {
	return &statusError{status, fmt.Errorf(format, args...)}
}

// statusOf finds the status for an error.
func statusOf(err error) int {
	var known *statusError
	switch {
	case errors.As(err, &known):
		return known.status
	case sandbox.DiskFull(err):
		return http.StatusInsufficientStorage
	case errors.Is(err, fs.ErrNotExist):
		return http.StatusNotFound
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return http.StatusForbidden
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ELOOP),
		errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, syscall.EINVAL),
		errors.Is(err, io.ErrUnexpectedEOF):
		return http.StatusBadRequest
	}
	switch sandbox.KindOf(err) {
	case sandbox.KindInvalid:
		return http.StatusBadRequest
	case sandbox.KindConflict:
		return http.StatusConflict
	}
	return http.StatusInternalServerError
}

// ServeHTTP answers GET, HEAD and POST /files.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var err error
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		err = s.download(w, r)
	case http.MethodPost:
		err = s.upload(w, r)
	default:
		w.Header().Set("Allow", "GET, HEAD, POST")
		err = statusf(http.StatusMethodNotAllowed, "/files knows GET, HEAD and POST, not %s", r.Method)
	}
	if err != nil {
		guestapi.WriteError(w, statusOf(err), err.Error())
	}
}

// Authorize accepts a request with the sandbox's token, or with a signature
// that was made with it.
func (s *Server) authorize(r *http.Request, operation string) error {
	if s.identity.Allows(r.Header.Get(guestapi.HeaderToken)) {
		return nil
	}
	q := r.URL.Query()
	signature := q.Get("signature")
	if signature == "" {
		return statusf(http.StatusUnauthorized, "an access token or a signature is needed")
	}
	sig := guestapi.FileSignature{Path: q.Get("path"), Operation: operation, User: q.Get("username")}
	if text := q.Get("signature_expiration"); text != "" {
		seconds, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return statusf(http.StatusUnauthorized, "signature_expiration is not a number of seconds")
		}
		sig.Expires = &seconds
	}
	if !sig.Valid(s.identity.Get().Token, signature) {
		return statusf(http.StatusUnauthorized, "invalid signature")
	}
	if sig.Expires != nil && *sig.Expires < time.Now().Unix() {
		return statusf(http.StatusUnauthorized, "signature is already expired")
	}
	return nil
}

// requester is the user of an HTTP request: the query names it, else the
// Authorization header, else it is the default one.
func (s *Server) requester(r *http.Request) (account.User, error) {
	name := r.URL.Query().Get("username")
	if name == "" {
		name, _, _ = r.BasicAuth()
	}
	user, err := s.identity.Account(name)
	if err != nil {
		return user, statusf(http.StatusUnauthorized, "invalid username: '%s'", name)
	}
	return user, nil
}

func (s *Server) resolve(user account.User, path string) (string, error) {
	resolved, err := user.Resolve(path, s.identity.Get().Workdir)
	if err != nil {
		return "", statusf(http.StatusBadRequest, "%w", err)
	}
	return resolved, nil
}

func (s *Server) download(w http.ResponseWriter, r *http.Request) error {
	if err := s.authorize(r, guestapi.FileRead); err != nil {
		return err
	}
	user, err := s.requester(r)
	if err != nil {
		return err
	}
	path, err := s.resolve(user, r.URL.Query().Get("path"))
	if err != nil {
		return err
	}
	f, info, err := openRegular(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // read only
	w.Header().Set("Vary", "Accept-Encoding")
	release, err := s.takeGzip(r, info.Size())
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if release == nil {
		http.ServeContent(w, r, "", info.ModTime(), f)
		return nil
	}
	defer release()
	w.Header().Set("Last-Modified", info.ModTime().UTC().Format(http.TimeFormat))
	sendGzip(w, r, f, info.Size())
	return nil
}

// openRegular opens a file whose bytes end. O_NONBLOCK keeps a pipe that took
// the file's place from stopping us.
func openRegular(path string) (*os.File, fs.FileInfo, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, nil, plain(path, err)
	}
	if err := regular(path, info); err != nil {
		return nil, nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, plain(path, err)
	}
	info, err = f.Stat()
	if err == nil {
		err = regular(path, info)
	}
	if err == nil {
		err = stored(path, f)
	}
	if err != nil {
		_ = f.Close() // read only
		return nil, nil, err
	}
	return f, info, nil
}

func regular(path string, info fs.FileInfo) error {
	if info.Mode().IsRegular() {
		return nil
	}
	return statusf(http.StatusBadRequest, "%s is %s, not a regular file", path, describe(info.Mode()))
}

// stored refuses the files that the kernel makes up: they claim to be regular
// and have no true size.
func stored(path string, f *os.File) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("statfs %s: %w", path, err)
	}
	switch st.Type {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC:
		return statusf(http.StatusBadRequest, "%s is made up by the kernel, not a regular file: read it with a command", path)
	}
	return nil
}

// plain makes a sentence of an error of the file system.
func plain(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return statusf(http.StatusNotFound, "file %s does not exist", path)
	}
	return err
}
