package host_test

import (
	"fmt"
	"io"
	"net/http"
	"testing"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// endless is a source that never ends.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestAgentThatAnswersBeforeTheUpload: its answer is what the caller is told, and
// not that the connection broke under the rest of the body.
func TestAgentThatAnswersBeforeTheUpload(t *testing.T) {
	const tries = 50 // the answer and the broken connection race
	const full = "the sandbox's disk is full"
	mux := http.NewServeMux()
	mux.HandleFunc("POST /files", func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		body := fmt.Sprintf(`{"code":507,"message":%q}`, full)
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 507 Insufficient Storage\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		_ = conn.(interface{ CloseRead() error }).CloseRead() // what was not read makes the kernel reset the connection
		_ = conn.Close()                                      // the caller is to hear the answer all the same
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	r := newRig(t)
	hostile(r, mux)
	agent := r.open()
	ref := host.FileRef{ID: string(r.mustCreate()), Path: "/x"}
	for range tries {
		for _, size := range []int64{1 << 10, 1 << 20, 1 << 40} {
			_, _, err := agent.WriteFile(t.Context(), ref, io.LimitReader(endless{}, size))
			if !sandbox.Is(err, sandbox.KindNoSpace) || err.Error() != full {
				t.Fatalf("write of %d bytes: %v, want %s", size, err, full)
			}
		}
	}
}
