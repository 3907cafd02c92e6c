package hostapi_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
)

// local serves a handler for the time of a test.
func local(t *testing.T, handler http.HandlerFunc) *hostapi.Local {
	t.Helper()
	l := hostapi.NewLocal(handler)
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// open sends a request and returns its answer, which the end of the test closes.
func open(ctx context.Context, t *testing.T, l *hostapi.Local, method, path string, body io.Reader) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, l.BaseURL()+path, body)
	if err != nil {
		t.Fatal(err)
	}
	res, err := l.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = res.Body.Close() })
	return res
}

// endless is input that never ends by itself.
type endless struct{ ctx context.Context }

func (e endless) Read(p []byte) (int, error) { return len(p), context.Cause(e.ctx) }

// stuck answers calls of which the other side reads nothing, and /echo.
func stuck(w http.ResponseWriter, r *http.Request) {
	w.WriteHeader(http.StatusOK)
	switch r.URL.Path {
	case "/in": // a command that does not read its input
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	case "/out": // output whose caller does not read it
		piece := make([]byte, 64<<10)
		for _, err := w.Write(piece); err == nil; {
			_, err = w.Write(piece)
		}
	case "/echo":
		_, _ = io.Copy(w, r.Body) // the caller sees what is missing
	}
}

// TestSlowStreamsHoldUpNothing: however many streams nobody reads, other calls
// pass; before, sixteen of them stopped everything.
func TestSlowStreamsHoldUpNothing(t *testing.T) {
	const streams = 48
	for _, path := range []string{"/in", "/out"} {
		t.Run(path, func(t *testing.T) {
			l := local(t, stuck)
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			sent := make(chan struct{}, streams)
			for range streams {
				open(ctx, t, l, http.MethodPost, path, &counted{endless{ctx}, sent, 0})
			}
			for range streams { // until each has had its window full on its way
				if path == "/in" {
					<-sent
				}
			}
			res := open(ctx, t, l, http.MethodPost, "/echo", strings.NewReader("hello"))
			if data, err := io.ReadAll(res.Body); err != nil || string(data) != "hello" {
				t.Errorf("a call beside %d streams that nobody reads: %q, %v", streams, data, err)
			}
		})
	}
}

// counted says when half a megabyte was taken from it.
type counted struct {
	io.Reader
	sent chan struct{}
	n    int
}

func (c *counted) Read(p []byte) (int, error) {
	const most = 512 << 10
	n, err := c.Reader.Read(p)
	if c.n < most && c.n+n >= most {
		c.sent <- struct{}{}
	}
	c.n += n
	return n, err
}

// TestStreamsBothWays: each side hears the other while both still speak.
func TestStreamsBothWays(t *testing.T) {
	l := local(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		buf := make([]byte, 16)
		for {
			n, err := r.Body.Read(buf)
			_, _ = w.Write(buf[:n]) // the caller misses what fails
			w.(http.Flusher).Flush()
			if err != nil {
				return
			}
		}
	})
	in, out := io.Pipe()
	res := open(t.Context(), t, l, http.MethodPost, "/", in)
	buf := make([]byte, 5)
	for _, word := range []string{"one..", "two..", "three"} {
		if _, err := io.WriteString(out, word); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(res.Body, buf); err != nil || string(buf) != word {
			t.Fatalf("said %q, heard %q, %v", word, buf, err)
		}
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(res.Body); err != nil || len(rest) > 0 {
		t.Errorf("after the end: %q, %v", rest, err)
	}
}

// TestCancelReachesTheHandler: whoever gives a call up ends it on the other side.
func TestCancelReachesTheHandler(t *testing.T) {
	ended := make(chan error, 1)
	l := local(t, func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		ended <- r.Context().Err()
	})
	ctx, cancel := context.WithCancel(t.Context())
	res := open(ctx, t, l, http.MethodGet, "/", nil)
	cancel()
	if _, err := io.ReadAll(res.Body); !errors.Is(err, context.Canceled) {
		t.Errorf("the caller reads %v", err)
	}
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("the handler's context ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the handler goes on")
	}
}

// TestCloseEndsWhatIsUnderWay: no call outlives the server, no new one begins.
func TestCloseEndsWhatIsUnderWay(t *testing.T) {
	l := hostapi.NewLocal(http.HandlerFunc(stuck))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	res := open(ctx, t, l, http.MethodPost, "/in", http.NoBody)
	for range 2 { // it may be called twice
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.ReadAll(res.Body); err == nil || ctx.Err() != nil {
		t.Errorf("a call under way: %v", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, l.BaseURL(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if res, err := l.Client().Do(req); err == nil {
		_ = res.Body.Close()
		t.Error("a closed server answers")
	}
}
