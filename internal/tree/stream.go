package tree

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// notePrefix begins the comment with which a packer ends.
const notePrefix = "dormouse-tree "

// maxSkippedName is how much of a name the other side can have shown, in bytes: the
// kernel's bound on a path.
const maxSkippedName = 4096

func orNobody(w io.Writer) io.Writer {
	if w == nil {
		return io.Discard
	}
	return w
}

// maxPadding is how much may follow the end of a tar stream: programs fill up
// their last record, of 10 KiB unless they are told otherwise.
const maxPadding = 4 << 20

// note is a packer's last word.
type note struct {
	Report
	Error *failure `json:"error,omitempty"`
}

type failure struct {
	Kind    sandbox.Kind `json:"kind"`
	Message string       `json:"message"`
}

func writeNote(w *tar.Writer, n note) error {
	text, err := json.Marshal(n)
	if err != nil {
		return err
	}
	return w.WriteHeader(&tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": notePrefix + string(text)}})
}

// finish ends a stream: whole after success, with the reason and no end after a
// failure.
func finish(w *tar.Writer, r Report, err error) error {
	if err == nil {
		if err = writeNote(w, note{Report: r}); err == nil {
			err = w.Close()
		}
		return err
	}
	text := err.Error()
	if most := 1000; len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	if writeNote(w, note{Report: r, Error: &failure{sandbox.KindOf(err), text}}) == nil {
		_ = w.Flush() // the first error says more
	}
	return err
}

// reader reads the entries of a stream up to its end.
type reader struct {
	*tar.Reader
	from   *source
	report Report // by the packer
}

func newReader(r io.Reader) *reader {
	from := &source{r: r}
	return &reader{Reader: tar.NewReader(from), from: from}
}

// next is io.EOF at the end of a stream that is whole.
func (r *reader) next() (*tar.Header, error) {
	for {
		h, err := r.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil, r.end()
		case err != nil:
			return nil, r.broken(err)
		case h.Typeflag != tar.TypeXGlobalHeader:
			return h, nil
		}
		if err := r.heed(h.PAXRecords["comment"]); err != nil {
			return nil, err
		}
	}
}

// heed takes over a packer's note. It comes from the other side: what it says is
// shown, and nothing more.
func (r *reader) heed(comment string) error {
	text, ok := strings.CutPrefix(comment, notePrefix)
	if !ok {
		return nil // of somebody else
	}
	var n note
	if err := json.Unmarshal([]byte(text), &n); err != nil {
		return invalid("the note at the end of the stream is not understood: %w", err)
	}
	if n.Error != nil {
		kind := n.Error.Kind
		if !slices.Contains(sandbox.Kinds(), kind) {
			kind = sandbox.KindInternal
		}
		return sandbox.Errorf(kind, "%.1000s", printable(n.Error.Message))
	}
	r.report = n.Report
	if len(n.FirstSkipped) > maxSkippedName {
		r.report.FirstSkipped = strings.ToValidUTF8(n.FirstSkipped[:maxSkippedName], "")
	}
	return nil
}

func printable(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c >= 0x7f && c < 0xa0 {
			return ' '
		}
		return c
	}, s)
}

// end asks whether the stream has its mark of the end, and reads what is behind it.
func (r *reader) end() error {
	if r.from.ended {
		return r.broken(io.ErrUnexpectedEOF) // archive/tar takes any end between two entries
	}
	n, err := io.CopyN(io.Discard, r.from, maxPadding+1)
	switch {
	case n > maxPadding:
		return invalid("more than %d bytes follow the end of the tar stream", maxPadding)
	case !errors.Is(err, io.EOF):
		return err
	}
	return io.EOF
}

// broken tells errors of the source from those of the format.
func (r *reader) broken(err error) error {
	switch {
	case r.from.err != nil:
		return r.from.err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return invalid("the tar stream is cut off: it has no end")
	}
	return invalid("it is not a tar stream: %w", err)
}

// source remembers how a reader ended. It tells data and an end one after the other.
type source struct {
	r     io.Reader
	ended bool  // somebody read beyond the end
	err   error // that is not the end
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err == nil || n > 0 && err == io.EOF {
		return n, nil // the next read says it again
	}
	if err == io.EOF {
		s.ended = true
	} else {
		s.err = err
	}
	return n, err
}

// sparse says that a file's holes are described by its header, so that a few bytes
// could stand for any number of them.
func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// Relay copies a stream and asks on the way whether it is whole. What is in it
// that Pack does not write is left out. An error of the packer is returned.
func Relay(w io.Writer, r io.Reader, progress io.Writer) (Report, error) {
	in, out := newReader(r), tar.NewWriter(w)
	progress = orNobody(progress)
	var report Report
	for {
		h, err := in.next()
		if err == io.EOF {
			report.skip(in.report.FirstSkipped, in.report.Skipped)
			return report, finish(out, report, nil)
		}
		if err == nil {
			err = relay(out, in, h, progress, &report)
		}
		if err != nil {
			return report, finish(out, report, err)
		}
	}
}

func relay(out *tar.Writer, in *reader, h *tar.Header, progress io.Writer, report *Report) error {
	clean := &tar.Header{Typeflag: h.Typeflag, Name: h.Name, Linkname: h.Linkname, Mode: h.Mode & 0o777, ModTime: h.ModTime, Format: tar.FormatPAX}
	switch {
	case sparse(h):
		return at(h.Name, errSparse)
	case h.Typeflag == tar.TypeReg:
		clean.Size = h.Size
		report.Files++
	case h.Typeflag == tar.TypeDir:
		report.Directories++
	case h.Typeflag == tar.TypeSymlink, h.Typeflag == tar.TypeLink:
		report.Files++
	default:
		report.skip(h.Name, 1)
		return nil
	}
	if err := out.WriteHeader(clean); err != nil {
		return at(h.Name, err)
	}
	if clean.Size == 0 {
		return nil
	}
	n, err := io.Copy(out, io.TeeReader(in, progress))
	report.Bytes += n
	if err == nil && n != clean.Size {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		return nil
	}
	if in.from.err != nil || errors.Is(err, io.ErrUnexpectedEOF) {
		return in.broken(err)
	}
	return fmt.Errorf("write: %w", err)
}

var errSparse = invalid("a sparse file is not taken: make the tar without --sparse")
