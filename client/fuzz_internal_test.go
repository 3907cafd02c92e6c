package client

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// FuzzReadError: whatever answers in the server's place, its error has a kind
// and says something.
func FuzzReadError(f *testing.F) {
	f.Add(404, `{"error":{"code":"not_found","message":"no such sandbox"}}`)
	f.Add(502, "<html>")
	f.Add(200, `{"error":{"code":"nonsense","message":""}}`)
	f.Add(-7, `{"error":7}`)
	f.Fuzz(func(t *testing.T, status int, body string) {
		err := readError(&http.Response{StatusCode: status, Status: "S", Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body))})
		if err == nil || err.Error() == "" || !slices.Contains(sandbox.Kinds(), sandbox.KindOf(err)) {
			t.Errorf("%v, kind %q", err, sandbox.KindOf(err))
		}
	})
}

// FuzzMessage: whatever a server sends on a stream is understood or an error, and
// an error that it tells has a kind.
func FuzzMessage(f *testing.F) {
	f.Add([]byte(`{"type":"error","error":{"code":"conflict","message":"it has ended"}}`))
	f.Add([]byte(`{"type":"exit","exit_code":7}`))
	f.Add([]byte(`{"type":"error","error":{}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		msg, err := decodeMessage(data)
		if err != nil || msg.Type != api.StreamError {
			return
		}
		if err := streamError(msg); err.Error() == "" || !slices.Contains(sandbox.Kinds(), sandbox.KindOf(err)) {
			t.Errorf("%v, kind %q", err, sandbox.KindOf(err))
		}
	})
}

// FuzzEvents: whatever a server sends as events is understood or an error, within
// bounds, and comes to an end.
func FuzzEvents(f *testing.F) {
	f.Add([]byte("event: file\ndata: {\"type\":\"create\",\"name\":\"a\"}\n\n: keep-alive\n\nevent: overflow\ndata: {}\n\n"))
	f.Add([]byte("event:error\r\ndata:{\"code\":\"conflict\",\r\ndata:\"message\":\"it has ended\"}\r\n\r\n"))
	f.Add([]byte("data\nevent\n\nevent: file\n\n"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		body := io.NopCloser(strings.NewReader(string(stream)))
		w := &Watch{ctx: context.Background(), cancel: func() {}, body: body, lines: bufio.NewScanner(body)}
		w.lines.Buffer(nil, maxEventBytes)
		for range len(stream) + 1 {
			e, err := w.Next()
			if err == nil {
				continue
			}
			if e != (api.FileEvent{}) || !slices.Contains(sandbox.Kinds(), sandbox.KindOf(err)) {
				t.Errorf("%+v, %v, kind %q", e, err, sandbox.KindOf(err))
			}
			return
		}
		t.Error("it has more events than bytes")
	})
}
