package server_test

import (
	"context"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/control/auth"
	"github.com/dormouse-sandbox/dormouse/control/hostfake"
	"github.com/dormouse-sandbox/dormouse/control/reconcile"
	"github.com/dormouse-sandbox/dormouse/control/server"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// limit is how long anything in these tests may take.
const limit = 2 * time.Minute

// rig is a whole control plane over a fake host.
type rig struct {
	t    *testing.T
	path string // of the database
	host *hostfake.Host
	cfg  server.Config
	srv  *server.Server
	http *httptest.Server
	key  string
	c    *client.Client
}

func newRig(t *testing.T, change ...func(*server.Config)) *rig {
	t.Helper()
	r := &rig{t: t, path: filepath.Join(t.TempDir(), "control.db"), host: hostfake.New()}
	r.cfg = server.Config{
		Host: r.host.Serve(t), Version: "test",
		Reconcile: reconcile.Config{Interval: 20 * time.Millisecond, AbsentFor: 50 * time.Millisecond, UnreachableFor: 50 * time.Millisecond},
	}
	for _, fn := range change {
		fn(&r.cfg)
	}
	r.start()
	t.Cleanup(func() { r.stop() })
	return r
}

// start opens the database and serves, as a process that begins.
func (r *rig) start() {
	r.t.Helper()
	ctx := r.t.Context()
	db, err := store.OpenSQLite(ctx, r.path)
	if err != nil {
		r.t.Fatal(err)
	}
	cfg := r.cfg
	cfg.Store, cfg.Keys = db, auth.New(db, cfg.Now)
	if r.key == "" {
		if r.key, err = cfg.Keys.EnsureKey(ctx, "test"); err != nil {
			r.t.Fatal(err)
		}
	}
	if r.srv, err = server.New(cfg); err != nil {
		r.t.Fatal(err)
	}
	if err := r.srv.Start(ctx); err != nil {
		r.t.Fatal(err)
	}
	r.cfg.Store = db
	r.http = httptest.NewUnstartedServer(nil)
	r.http.Config = r.srv.HTTPServer()
	r.http.Start()
	r.c = r.client(r.key)
}

// stop ends the process in good order.
func (r *rig) stop() {
	r.c.CloseIdle()
	if err := r.srv.Close(); err != nil {
		r.t.Error(err)
	}
	r.http.Close()
	if err := r.cfg.Store.Close(); err != nil {
		r.t.Error(err)
	}
}

func (r *rig) client(key string) *client.Client {
	r.t.Helper()
	c, err := client.New(client.Config{BaseURL: r.http.URL, Key: key})
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

func (r *rig) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.t.Context()), limit)
	r.t.Cleanup(cancel)
	return ctx
}

// create makes a sandbox that runs.
func (r *rig) create() string {
	r.t.Helper()
	s, err := r.c.CreateSandbox(r.ctx(), api.CreateSandbox{}, "")
	if err != nil {
		r.t.Fatal(err)
	}
	return s.ID
}

func (r *rig) get(id string) api.Sandbox {
	r.t.Helper()
	s, err := r.c.Get(r.ctx(), id)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func (r *rig) wantKind(err error, kind sandbox.Kind) {
	r.t.Helper()
	if !sandbox.Is(err, kind) {
		r.t.Fatalf("error %v has kind %s, want %s", err, sandbox.KindOf(err), kind)
	}
}

func containsText(s, part string) bool { return strings.Contains(s, part) }
