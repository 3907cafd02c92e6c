package files

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"mime"
	"net/http"
	"os"
	"syscall"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
	"github.com/dormouse-sandbox/dormouse/internal/tree"
)

// ServeTree answers GET and POST /files/tree: a directory as a tar stream, and one
// unpacked. See package tree for what is in it.
func (s *Server) ServeTree(w http.ResponseWriter, r *http.Request) {
	var err error
	switch r.Method {
	case http.MethodGet:
		err = s.downloadTree(w, r)
	case http.MethodPost:
		err = s.uploadTree(w, r)
	default:
		w.Header().Set("Allow", "GET, POST")
		err = statusf(http.StatusMethodNotAllowed, "%s knows GET and POST, not %s", guestapi.PathTree, r.Method)
	}
	if err != nil {
		guestapi.WriteError(w, statusOf(err), err.Error())
	}
}

// as runs fn with the rights of a user.
func as(user account.User, fn func() error) error {
	return kernel.AsUser(int(user.UID), int(user.GID), user.Groups, fn)
}

// treeOf finds out which directory a request means, and whose rights apply.
func (s *Server) treeOf(r *http.Request, operation string) (account.User, string, error) {
	if err := s.authorize(r, operation); err != nil {
		return account.User{}, "", err
	}
	user, err := s.requester(r)
	if err != nil {
		return user, "", err
	}
	path := r.URL.Query().Get("path")
	if path == "" {
		return user, "", statusf(http.StatusBadRequest, "path is missing")
	}
	path, err = s.resolve(user, path)
	return user, path, err
}

// downloadTree breaks the connection off when the tree cannot be packed to its end:
// the reason is in the stream then, and its end is not.
func (s *Server) downloadTree(w http.ResponseWriter, r *http.Request) error {
	user, path, err := s.treeOf(r, guestapi.TreeRead)
	if err != nil {
		return err
	}
	begun := false
	err = as(user, func() error {
		root, err := openDirectory(path)
		if err != nil {
			return err
		}
		defer func() { _ = root.Close() }() // read only
		begun = true
		w.Header().Set("Content-Type", guestapi.TreeType)
		out := bufio.NewWriterSize(w, copyBuffer)
		_, err = tree.Pack(r.Context(), out, root, nil)
		return errors.Join(err, out.Flush(), http.NewResponseController(w).Flush())
	})
	if err != nil && begun {
		s.log.Info("a tree was not read to its end", "err", err)
		panic(http.ErrAbortHandler)
	}
	return err
}

func openDirectory(path string) (*os.Root, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, statusf(http.StatusNotFound, "directory %s does not exist", path)
	case err != nil:
		return nil, err
	case !info.IsDir():
		return nil, statusf(http.StatusBadRequest, "%s is %s, not a directory", path, describeAny(info.Mode()))
	}
	return os.OpenRoot(path)
}

func (s *Server) uploadTree(w http.ResponseWriter, r *http.Request) error {
	user, path, err := s.treeOf(r, guestapi.TreeWrite)
	if err != nil {
		return err
	}
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != guestapi.TreeType {
		return statusf(http.StatusUnsupportedMediaType, "Content-Type %.100q: use %s", r.Header.Get("Content-Type"), guestapi.TreeType)
	}
	body, err := decoded(r)
	if err != nil {
		return err
	}
	in := &source{Reader: body}
	answer := guestapi.Tree{Path: path}
	err = as(user, func() error {
		root, made, err := makeDirectory(path, user)
		if err != nil {
			return err
		}
		if answer.Report, err = tree.Unpack(in, root, tree.Options{New: made}); err != nil {
			err = fmt.Errorf("unpack into %s: %w", path, err)
		}
		return errors.Join(err, root.Close())
	})
	if in.err != nil {
		return statusf(http.StatusBadRequest, "read the body: %w", in.err)
	}
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	return json.NewEncoder(w).Encode(answer)
}

// makeDirectory opens a directory, and makes it and its parents if it is missing.
func makeDirectory(path string, user account.User) (_ *os.Root, made bool, err error) {
	info, err := os.Stat(path)
	if err == nil && !info.IsDir() {
		return nil, false, statusf(http.StatusConflict, "%s is %s, not a directory", path, describeAny(info.Mode()))
	}
	if made = errors.Is(err, fs.ErrNotExist); made {
		err = mkdirAll(path, user)
	}
	if errors.Is(err, syscall.ENOTDIR) {
		return nil, false, statusf(http.StatusConflict, "%s: a parent of it is not a directory", path)
	}
	if err != nil {
		return nil, false, err
	}
	root, err := os.OpenRoot(path)
	return root, made, err
}
