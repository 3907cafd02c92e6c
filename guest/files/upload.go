package files

import (
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
)

// tempPrefix marks what an upload has not published yet. Its maker removes it.
const tempPrefix = ".dormouse-upload-"

// copyBuffer is the size of the one buffer an upload uses, in bytes.
const copyBuffer = 128 << 10

func (s *Server) upload(w http.ResponseWriter, r *http.Request) error {
	if err := s.authorize(r, guestapi.FileWrite); err != nil {
		return err
	}
	user, err := s.requester(r)
	if err != nil {
		return err
	}
	body, err := decoded(r)
	if err != nil {
		return err
	}
	mediaType, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		return statusf(http.StatusBadRequest, "Content-Type: %w", err)
	}
	var written []guestapi.WrittenFile
	switch mediaType {
	case "application/octet-stream":
		written, err = s.uploadRaw(r, user, body)
	case "multipart/form-data":
		written, err = s.uploadParts(r, user, multipart.NewReader(body, params["boundary"]))
	default:
		err = statusf(http.StatusUnsupportedMediaType, "Content-Type %s: use multipart/form-data or application/octet-stream", mediaType)
	}
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	return json.NewEncoder(w).Encode(written)
}

func decoded(r *http.Request) (io.Reader, error) {
	switch encoding := r.Header.Get("Content-Encoding"); encoding {
	case "", "identity":
		return r.Body, nil
	case "gzip":
		zr, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, statusf(http.StatusBadRequest, "body: %w", err)
		}
		return zr, nil
	default:
		return nil, statusf(http.StatusUnsupportedMediaType, "Content-Encoding %s: use gzip or none", encoding)
	}
}

func (s *Server) uploadRaw(r *http.Request, user account.User, body io.Reader) ([]guestapi.WrittenFile, error) {
	path := r.URL.Query().Get("path")
	if path == "" {
		return nil, statusf(http.StatusBadRequest, "path is missing")
	}
	return s.publish(nil, user, path, body)
}

// uploadParts writes every part called "file". With a path in the query there
// can be only one.
func (s *Server) uploadParts(r *http.Request, user account.User, parts *multipart.Reader) ([]guestapi.WrittenFile, error) {
	fixed := r.URL.Query().Get("path")
	written := []guestapi.WrittenFile{}
	for {
		part, err := parts.NextRawPart()
		if err == io.EOF { // a body that is cut between two parts wraps it
			break
		}
		if err != nil {
			return nil, statusf(http.StatusBadRequest, "multipart body: %w", err)
		}
		if part.FormName() != "file" {
			continue
		}
		path := fixed
		if path == "" {
			path = fileName(part)
		}
		switch {
		case path == "":
			return nil, statusf(http.StatusBadRequest, "a part has no file name and the query no path")
		case fixed != "" && len(written) > 0:
			return nil, statusf(http.StatusBadRequest, "several files cannot all go to %s: leave out path", fixed)
		}
		if written, err = s.publish(written, user, path, part); err != nil {
			return nil, err
		}
	}
	if len(written) == 0 {
		return nil, statusf(http.StatusBadRequest, "the body has no part named \"file\"")
	}
	return written, nil
}

// fileName is the part's file name with its directories, which Part.FileName
// would cut off.
func fileName(part *multipart.Part) string {
	_, params, err := mime.ParseMediaType(part.Header.Get("Content-Disposition"))
	if err != nil {
		return ""
	}
	return params["filename"]
}

// publish writes one file and appends what the answer says about it.
func (s *Server) publish(written []guestapi.WrittenFile, user account.User, path string, body io.Reader) ([]guestapi.WrittenFile, error) {
	path, err := s.resolve(user, path)
	if err != nil {
		return nil, err
	}
	if err := replace(path, user, body); err != nil {
		return nil, err
	}
	return append(written, guestapi.WrittenFile{Name: filepath.Base(path), Path: path, Type: "file"}), nil
}

// replace writes body to a temporary file beside path and renames it when it is
// complete. An existing file keeps its mode; its owner becomes user. A link
// stays, and what it points to is replaced.
func replace(path string, user account.User, body io.Reader) (err error) {
	path, mode, err := destination(path)
	if err != nil {
		return err
	}
	if err := mkdirAll(parent(path), user); err != nil {
		return fmt.Errorf("make the directory of %s: %w", path, err)
	}
	f, err := os.CreateTemp(parent(path), tempPrefix+"*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			_ = f.Close()           // the first error says more
			_ = os.Remove(f.Name()) // likewise
		}
	}()
	if err := fill(f, path, body); err != nil {
		return err
	}
	if err := errors.Join(f.Chmod(mode), give(f.Name(), user), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}

// destination follows links to the file that will be replaced, and gives the
// mode it shall have.
func destination(path string) (string, fs.FileMode, error) {
	for range 40 { // as many links as the kernel follows
		info, err := os.Lstat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return path, 0o644, nil
		case err != nil:
			return "", 0, err
		case info.Mode()&fs.ModeSymlink == 0:
			return path, info.Mode().Perm(), regular(path, info)
		}
		target, err := os.Readlink(path)
		if err != nil {
			return "", 0, err
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		path = target
	}
	return "", 0, statusf(http.StatusBadRequest, "%s: too many levels of links", path)
}

// fill copies with one buffer and tells the two sides of an error apart.
func fill(f *os.File, path string, body io.Reader) error {
	in := &source{Reader: body}
	_, err := io.CopyBuffer(struct{ io.Writer }{f}, in, make([]byte, copyBuffer))
	if in.err != nil {
		return statusf(http.StatusBadRequest, "read the body: %w", in.err)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// source remembers that reading failed.
type source struct {
	io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}
