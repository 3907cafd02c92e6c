package server_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/control/auth"
	"github.com/dormouse-sandbox/dormouse/control/server"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// lines is a writer that can be read meanwhile.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (r *rig) metrics() string {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.ctx(), "GET", r.http.URL+"/metrics", nil)
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("X-API-Key", r.key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }() // nothing was written to it
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(b)
}

// A key that is revoked ends what it has open, and nothing else.
func TestARevokedKeyEndsItsCalls(t *testing.T) {
	for name, tt := range map[string]struct {
		check  time.Duration
		revoke func(r *rig, id string) error
	}{
		"through the API": {time.Hour, func(r *rig, id string) error { return r.c.DeleteKey(r.ctx(), id) }},
		"by another process": {20 * time.Millisecond, func(r *rig, _ string) error {
			db, err := store.OpenSQLite(r.ctx(), r.path)
			if err != nil {
				return err
			}
			if _, err := auth.New(db, nil).EnsureKey(r.ctx(), "second"); err != nil {
				return err
			}
			return db.Close()
		}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(c *server.Config) { c.KeyCheck = tt.check })
			id := r.create()
			key, err := r.c.CreateKey(r.ctx(), "second")
			if err != nil {
				t.Fatal(err)
			}
			second := r.client(key.Secret)
			defer second.CloseIdle()

			var echoed lines
			mine, err := r.c.ExecStream(r.ctx(), id, api.Exec{Command: []string{"cat"}}, client.StreamOptions{Stdin: true, Stdout: &echoed})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = mine.Close() }() // its output is what counts
			theirs, err := second.ExecStream(r.ctx(), id, api.Exec{Command: []string{"sleep"}}, client.StreamOptions{})
			if err != nil {
				t.Fatal(err)
			}
			ctx := r.ctx()
			execErr, uploadErr := make(chan error, 1), make(chan error, 1)
			go func() {
				_, err := second.Exec(ctx, id, api.Exec{Shell: "sleep"})
				execErr <- err
			}()
			body, stuck := io.Pipe()
			go func() {
				_, err := second.WriteFile(ctx, id, "/part", "", body)
				uploadErr <- err
			}()
			if _, err := stuck.Write([]byte("the beginning")); err != nil {
				t.Fatal(err)
			}
			file := r.stuckDownload(ctx, key.Secret, id)
			defer func() { _ = file.Close() }() // it is broken
			testkit.Eventually(t, limit, "running", func() bool {
				return r.host.Processes() == 3 && r.host.Count("WriteFile") == 1 && strings.Contains(r.metrics(), "\ndormouse_http_requests_under_way 6\n")
			})

			if err := tt.revoke(r, key.ID); err != nil {
				t.Fatal(err)
			}
			_, err = theirs.Wait()
			for call, err := range map[string]error{"stream": err, "exec": <-execErr, "upload": <-uploadErr} {
				if !sandbox.Is(err, sandbox.KindUnauthorized) || !strings.Contains(err.Error(), "revoked") {
					t.Errorf("%s ended with %v", call, err)
				}
			}
			_ = stuck.Close() // its reader has gone
			testkit.Eventually(t, limit, "the download and all else has ended in the server", func() bool {
				return r.host.Processes() == 1 && strings.Contains(r.metrics(), "\ndormouse_http_requests_under_way 2\n")
			})
			if _, err := io.Copy(io.Discard, file); err == nil {
				t.Error("a part of a file came as the whole")
			}
			if r.host.Hash(id, "/part") != "" {
				t.Error("a part of an upload became a file")
			}
			if _, err := mine.Write([]byte("still here\n")); err != nil {
				t.Fatal(err)
			}
			testkit.Eventually(t, limit, "the other key's stream goes on", func() bool { return echoed.String() == "still here\n" })
		})
	}
}

// stuckDownload begins to read a large file and stops.
func (r *rig) stuckDownload(ctx context.Context, key, id string) io.ReadCloser {
	r.t.Helper()
	req, err := http.NewRequestWithContext(ctx, "GET", r.http.URL+"/v1/sandboxes/"+id+"/files/read?path=/pattern/1073741824", nil)
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("X-API-Key", key)
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil || resp.StatusCode != http.StatusOK {
		r.t.Fatalf("download: %v, %v", resp, err)
	}
	return resp.Body
}
