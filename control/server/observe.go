package server

import (
	"bufio"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// observe gives every request an ID, one log line (for debugging only, if it has
// no key), its metrics, and an answer even when its handler panics.
func (s *Server) observe(mux *http.ServeMux, unmatched http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := s.cfg.Now()
		next := http.Handler(mux)
		_, pattern := mux.Handler(r)
		if p := r.URL.EscapedPath(); pattern == "" || path.Clean(p) != p { // the mux would redirect, by itself
			next, pattern = unmatched, "unmatched"
		}
		if to, given, err := s.portOf(r); given {
			next, pattern = s.wrap(route{open: true, handle: func(w http.ResponseWriter, r *http.Request) error {
				if err != nil {
					return err
				}
				return s.servePort(w, r, to)
			}}), to.pattern()
			r.Pattern = pattern
			r.SetPathValue("id", string(to.id))
		}
		rec := &recorder{ResponseWriter: w}
		if r.Body != http.NoBody {
			rec.body = &body{ReadCloser: r.Body}
			r = r.WithContext(r.Context()) // net/http looks at the body of its own request
			r.Body = rec.body
		}
		id := rand.Text()
		h := rec.Header()
		h.Set(api.HeaderRequestID, id)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-store")
		r.Header.Set(api.HeaderRequestID, id) // for fail; a client's own is not trusted
		s.meters.underWay.Inc()
		defer func() {
			s.meters.underWay.Dec()
			aborted := s.recovered(rec, r, recover())
			took := s.cfg.Now().Sub(start)
			s.meters.request(pattern, rec.status, took)
			level := slog.LevelDebug // what strangers do must not fill the disk
			if rec.known {
				level = slog.LevelInfo
			}
			s.cfg.Log.Log(r.Context(), level, "request", "request", id, "op", pattern, "sandbox", sandboxOf(r), "status", rec.status,
				"bytes", rec.bytes, "took", took, "remote", r.RemoteAddr, "aborted", aborted)
			if aborted {
				panic(http.ErrAbortHandler) // the server drops the connection: the client sees that the answer is cut
			}
		}()
		next.ServeHTTP(rec, r)
	})
}

// recovered turns a panic into an answer, if none has begun.
func (s *Server) recovered(rec *recorder, r *http.Request, cause any) (aborted bool) {
	if cause == nil {
		return false
	}
	if err, ok := cause.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		return true
	}
	s.cfg.Log.Error("panic", "request", requestID(r), "op", r.Pattern, "panic", fmt.Sprint(cause), "stack", string(debug.Stack()))
	if rec.status != 0 {
		return true
	}
	s.fail(rec, r, errors.New("panic"))
	return false
}

// sandboxOf is the path's ID if it is one: nothing else of a path is logged.
func sandboxOf(r *http.Request) string {
	id, err := sandbox.ParseID(r.PathValue("id"))
	if err != nil {
		return ""
	}
	return string(id)
}

func requestID(r *http.Request) string { return r.Header.Get(api.HeaderRequestID) }

// recorder remembers what was answered.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64
	known  bool // the request came with a valid key
	body   *body
}

// body remembers whether the client's body was read to its end; nil is none.
type body struct {
	io.ReadCloser
	ended atomic.Bool
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF {
		b.ended.Store(true)
	}
	return n, err
}

func (b *body) remains() bool { return b != nil && !b.ended.Load() }

// unread says that the request's body is not at its end. Only then may the
// connection get a deadline for reading: see writeText.
func unread(w http.ResponseWriter) bool {
	rec, ok := w.(*recorder)
	return ok && rec.body.remains()
}

// setKnown notes that whoever asks has a key.
func setKnown(w http.ResponseWriter) {
	if rec, ok := w.(*recorder); ok {
		rec.known = true
	}
}

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 || r.status < 200 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	n, err := r.ResponseWriter.Write(p)
	r.bytes += int64(n)
	return n, err
}

// Unwrap lets http.ResponseController find the connection.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// Hijack hands the connection to a WebSocket.
func (r *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	r.status = http.StatusSwitchingProtocols
	return http.NewResponseController(r.ResponseWriter).Hijack()
}

func (m *meters) request(pattern string, status int, took time.Duration) {
	if isStream(pattern) {
		took = 0 // how long a command or a guest takes says nothing about the server
	}
	m.requests.WithLabelValues(pattern, strconv.Itoa(status)).Inc()
	m.seconds.WithLabelValues(pattern).Observe(took.Seconds())
}

// isStream says which routes last as long as their client wants.
func isStream(pattern string) bool {
	for _, end := range []string{"/stream", "/pty", "/files/watch", "/tcp/{port}"} {
		if strings.HasSuffix(pattern, end) {
			return true
		}
	}
	return pattern == portByPath || pattern == portByName
}
