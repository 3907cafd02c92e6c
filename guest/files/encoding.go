package files

import (
	"compress/gzip"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
)

// gzipsAtOnce bounds the downloads that are compressed at the same time: each
// costs about a megabyte. Further ones are sent as they are.
const gzipsAtOnce = 4

// accepted is what an Accept-Encoding header lets us send.
type accepted struct{ gzip, identity bool }

// parseAccept reads an Accept-Encoding header (RFC 9110, 12.5.3). gzip is true
// when it is accepted and not less liked than no encoding at all.
func parseAccept(header string) accepted {
	const unset = -1.0
	gzipQ, identityQ, anyQ := unset, unset, unset
	for element := range strings.SplitSeq(header, ",") {
		coding, q, ok := parseCoding(element)
		switch {
		case !ok:
		case coding == "gzip" || coding == "x-gzip":
			gzipQ = q
		case coding == "identity":
			identityQ = q
		case coding == "*":
			anyQ = q
		}
	}
	a := accepted{identity: identityQ > 0 || identityQ == unset && anyQ != 0}
	if gzipQ == unset && !a.identity {
		gzipQ = anyQ // "anything else" is only taken up when there is nothing better
	}
	a.gzip = gzipQ > 0 && gzipQ >= identityQ
	return a
}

// parseCoding reads one element: a coding and, perhaps, how much it is liked.
func parseCoding(element string) (coding string, q float64, ok bool) {
	coding, params, _ := strings.Cut(element, ";")
	q = 1
	for param := range strings.SplitSeq(params, ";") {
		name, value, found := strings.Cut(strings.TrimSpace(param), "=")
		if !found || !strings.EqualFold(name, "q") {
			continue
		}
		var err error
		if q, err = strconv.ParseFloat(value, 64); err != nil || !(q >= 0 && q <= 1) {
			return "", 0, false
		}
	}
	return strings.ToLower(strings.TrimSpace(coding)), q, true
}

// partial reports whether a request is about a part or a version of a file:
// those are answered from its plain bytes.
func partial(r *http.Request) bool {
	for _, name := range []string{"Range", "If-Range", "If-Modified-Since", "If-Unmodified-Since", "If-Match", "If-None-Match"} {
		if r.Header.Get(name) != "" {
			return true
		}
	}
	return false
}

// takeGzip decides whether a download is compressed. The function it then
// returns must be called when the download is over.
func (s *Server) takeGzip(r *http.Request, size int64) (release func(), err error) {
	a := parseAccept(r.Header.Get("Accept-Encoding"))
	wanted := a.gzip && size > 0 && !partial(r)
	switch {
	case !wanted && a.identity:
		return nil, nil
	case !wanted:
		return nil, statusf(http.StatusNotAcceptable, "this can be sent only without an encoding, which Accept-Encoding excludes")
	}
	release = func() { <-s.gzips }
	select {
	case s.gzips <- struct{}{}:
		return release, nil
	default:
	}
	if a.identity {
		return nil, nil
	}
	select {
	case s.gzips <- struct{}{}:
		return release, nil
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
}

// sendGzip sends size bytes of a file compressed. What cannot be read any more
// breaks the connection off: an end would look like the end of the file.
func sendGzip(w http.ResponseWriter, r *http.Request, f *os.File, size int64) {
	w.Header().Set("Content-Encoding", "gzip")
	if r.Method == http.MethodHead {
		return
	}
	zw, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err == nil {
		_, err = io.CopyN(zw, f, size)
	}
	if err == nil {
		err = zw.Close()
	}
	if err != nil {
		panic(http.ErrAbortHandler)
	}
}

// decoded is the body of an upload without its encoding.
func decoded(r *http.Request) (io.Reader, error) {
	switch encoding := strings.ToLower(r.Header.Get("Content-Encoding")); encoding {
	case "", "identity":
		return r.Body, nil
	case "gzip", "x-gzip":
		zr, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, statusf(http.StatusBadRequest, "body: %w", err)
		}
		return zr, nil
	default:
		return nil, statusf(http.StatusUnsupportedMediaType, "Content-Encoding %s: use gzip or none", encoding)
	}
}
