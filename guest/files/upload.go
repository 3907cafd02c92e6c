package files

import (
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
	"slices"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/internal/tree"
)

// These mark what an upload has not published yet: a new file, and one that will
// replace another. Their maker removes them, and watchers read them (see watch).
const (
	tempNew     = tree.TempNew
	tempReplace = tree.TempReplace
)

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
	metadata, err := metadataOf(r.Header)
	if err != nil {
		return err
	}
	to := &target{server: s, user: user, metadata: metadata, written: []guestapi.WrittenFile{}}
	mediaType, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		return statusf(http.StatusBadRequest, "Content-Type: %w", err)
	}
	switch mediaType {
	case "application/octet-stream":
		err = to.raw(r.URL.Query().Get("path"), body)
	case "multipart/form-data":
		err = to.parts(r.URL.Query().Get("path"), multipart.NewReader(body, params["boundary"]))
	default:
		err = statusf(http.StatusUnsupportedMediaType, "Content-Type %s: use multipart/form-data or application/octet-stream", mediaType)
	}
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	return json.NewEncoder(w).Encode(to.written)
}

// target is where the files of one upload go.
type target struct {
	server   *Server
	user     account.User
	metadata map[string]string // of each file
	written  []guestapi.WrittenFile
}

func (t *target) raw(path string, body io.Reader) error {
	if path == "" {
		return statusf(http.StatusBadRequest, "path is missing")
	}
	return t.publish(path, body)
}

// parts writes every part called "file". With a path in the query there can be
// only one.
func (t *target) parts(fixed string, parts *multipart.Reader) error {
	for {
		part, err := parts.NextRawPart()
		if err == io.EOF { // a body that is cut between two parts wraps it
			break
		}
		if err != nil {
			return statusf(http.StatusBadRequest, "multipart body: %w", err)
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
			return statusf(http.StatusBadRequest, "a part has no file name and the query no path")
		case fixed != "" && len(t.written) > 0:
			return statusf(http.StatusBadRequest, "several files cannot all go to %s: leave out path", fixed)
		}
		if err := t.publish(path, part); err != nil {
			return err
		}
	}
	if len(t.written) == 0 {
		return statusf(http.StatusBadRequest, "the body has no part named \"file\"")
	}
	return nil
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

// publish writes one file and notes what the answer says about it.
func (t *target) publish(path string, body io.Reader) error {
	path, err := t.server.resolve(t.user, path)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(t.written, func(f guestapi.WrittenFile) bool { return f.Path == path }) {
		return statusf(http.StatusBadRequest, "two files of one upload cannot both go to %s", path)
	}
	if err := t.replace(path, body); err != nil {
		return err
	}
	t.written = append(t.written, guestapi.WrittenFile{Name: filepath.Base(path), Path: path, Type: "file", Metadata: t.metadata})
	return nil
}

// replace writes body to a temporary file beside path and renames it when it is
// complete. An existing file keeps its mode; its owner becomes the user, and its
// metadata is that of the upload. A link stays, and what it points to is replaced.
func (t *target) replace(path string, body io.Reader) (err error) {
	path, mode, exists, err := destination(path)
	if err != nil {
		return err
	}
	if err := mkdirAll(parent(path), t.user); err != nil {
		return fmt.Errorf("make the directory of %s: %w", path, err)
	}
	prefix := tempNew
	if exists {
		prefix = tempReplace
	}
	f, err := os.CreateTemp(parent(path), prefix+"*")
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
	if err := keepMetadata(f, t.metadata); err != nil {
		return err
	}
	if err := errors.Join(f.Chmod(mode), give(f.Name(), t.user), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}

// destination follows links to the file that will be replaced, and gives the
// mode it shall have, and whether it exists.
func destination(path string) (_ string, mode fs.FileMode, exists bool, err error) {
	for range 40 { // as many links as the kernel follows
		info, err := os.Lstat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return path, 0o644, false, nil
		case err != nil:
			return "", 0, false, err
		case info.Mode()&fs.ModeSymlink == 0:
			return path, info.Mode().Perm(), true, regular(path, info)
		}
		hop, err := os.Readlink(path)
		if err != nil {
			return "", 0, false, err
		}
		if !filepath.IsAbs(hop) {
			hop = filepath.Join(filepath.Dir(path), hop)
		}
		path = hop
	}
	return "", 0, false, statusf(http.StatusBadRequest, "%s: too many levels of links", path)
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
