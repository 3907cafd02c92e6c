package page_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/control/auth"
	"github.com/dormouse-sandbox/dormouse/control/hostfake"
	"github.com/dormouse-sandbox/dormouse/control/reconcile"
	"github.com/dormouse-sandbox/dormouse/control/server"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

func TestMain(m *testing.M) {
	code := m.Run()
	closeBrowser()
	if !common.Close() {
		code = 1
	}
	rig.RemoveBinaries()
	os.Exit(code)
}

// limit is how long anything in these tests may take.
const limit = 30 * time.Second

// fake is a whole server over a made-up host.
type fake struct {
	t    *testing.T
	host *hostfake.Host
	url  string
	key  string
	c    *client.Client
}

// newFake serves until the test ends. Over may stand between the browser and the
// server; nil does not.
func newFake(t *testing.T, over func(next http.Handler) http.Handler) *fake {
	t.Helper()
	ctx := t.Context()
	f := &fake{t: t, host: hostfake.New()}
	db, err := store.OpenSQLite(ctx, filepath.Join(t.TempDir(), "control.db"))
	if err != nil {
		t.Fatal(err)
	}
	cfg := server.Config{
		Host: f.host.Serve(t), Version: "test", Store: db, Keys: auth.New(db, nil), Domain: "localhost",
		Reconcile: reconcile.Config{Interval: 50 * time.Millisecond},
	}
	if f.key, err = cfg.Keys.EnsureKey(ctx, "test"); err != nil {
		t.Fatal(err)
	}
	srv, err := server.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.Start(ctx); err != nil {
		t.Fatal(err)
	}
	h := httptest.NewUnstartedServer(nil)
	h.Config = srv.HTTPServer()
	if over != nil {
		h.Config.Handler = over(h.Config.Handler)
	}
	h.Start()
	f.url = h.URL
	if f.c, err = client.New(client.Config{BaseURL: h.URL, Key: f.key}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.c.CloseIdle()
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		h.Close()
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func (f *fake) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(f.t.Context()), limit)
	f.t.Cleanup(cancel)
	return ctx
}

// create makes a sandbox beside the page.
func (f *fake) create(req api.CreateSandbox) string {
	f.t.Helper()
	s, err := f.c.CreateSandbox(f.ctx(), req, "")
	if err != nil {
		f.t.Fatal(err)
	}
	return s.ID
}

// slowly makes some calls of the host take a while.
func (f *fake) slowly(by time.Duration, methods ...string) {
	f.host.SetHook(func(ctx context.Context, method, _ string) error {
		for _, m := range methods {
			if m == method {
				select {
				case <-time.After(by):
				case <-ctx.Done():
				}
			}
		}
		return nil
	})
}

// gate breaks every connection that asks for something of the API while it is set.
type gate struct{ closed atomic.Bool }

func (g *gate) set(closed bool) { g.closed.Store(closed) }

func (g *gate) over(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if g.closed.Load() && strings.HasPrefix(r.URL.Path, "/v1/") {
			panic(http.ErrAbortHandler)
		}
		next.ServeHTTP(w, r)
	})
}
