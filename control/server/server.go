// Package server is the HTTP side of the control plane: each handler decodes,
// calls and encodes. What sandboxes are is in the store, what they do is on the
// host; the server joins the two.
//
// It promises that a create, pause, resume, fork or snapshot that has begun is
// finished whether or not its caller waits; that a call into a paused sandbox
// resumes it, if its policy says so; that every body, count, size and time is bounded, with the bound
// in the message; that streams hold back whoever is too fast and store nothing;
// that a call into a sandbox ends when the sandbox does, or its API key; and that
// neither a key nor a payload nor the inside of an error reaches a log or a client
// by mistake.
package server

import (
	"context"
	"errors"
	"io"
	"log"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dormouse-sandbox/dormouse/control/auth"
	"github.com/dormouse-sandbox/dormouse/control/reconcile"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1/hostv1connect"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Config is what a server works with. Zero durations mean the defaults.
type Config struct {
	Host     hostv1connect.HostServiceClient
	HostName string // under which its sandboxes are recorded; empty: "local"
	Store    *store.DB
	Keys     *auth.Keys
	Log      *slog.Logger     // nil: nothing is logged
	Now      func() time.Time // nil: time.Now
	Version  string

	// Domain is under which ports of sandboxes have host names, PORT-ID.Domain.
	// Empty: they have none, and browsers cannot visit them.
	Domain string

	// Registry gets the metrics and is shown at /metrics. Nil: one of our own.
	Registry *prometheus.Registry
	// Origins are the patterns of Origin headers, besides the server's own
	// address, from which browsers may open streams.
	Origins []string

	CreateLimit time.Duration // of a create, boot included; 10 min
	ChangeLimit time.Duration // of a pause, a resume or a snapshot; 10 min
	CallLimit   time.Duration // of a call to the host that moves no data; 1 min
	KeepAlive   time.Duration // between signs of life on an idle stream; 15 s
	Retention   time.Duration // of ended sandboxes; 7 days
	SweepEvery  time.Duration // how often what is too old is deleted; 10 min
	KeyCheck    time.Duration // how often open calls are checked for revoked keys; 2 s
	PortAnswer  time.Duration // how long a server in a sandbox may take to begin its answer; 10 min
	PortIdle    time.Duration // how long a connection to one is kept for the next request; 15 s

	// Reconcile tunes the reconciler; its Host, Store, Log, Now and callbacks
	// are set here.
	Reconcile reconcile.Config
}

// idempotencyTTL is how long a create can be repeated under its key.
const idempotencyTTL = 24 * time.Hour

func (c Config) withDefaults() Config {
	if c.HostName == "" {
		c.HostName = "local"
	}
	if c.Log == nil {
		c.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Registry == nil {
		c.Registry = prometheus.NewRegistry()
	}
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.CreateLimit, 10 * time.Minute},
		{&c.ChangeLimit, 10 * time.Minute},
		{&c.CallLimit, time.Minute},
		{&c.KeepAlive, 15 * time.Second},
		{&c.Retention, 7 * 24 * time.Hour},
		{&c.SweepEvery, 10 * time.Minute},
		{&c.KeyCheck, 2 * time.Second},
		{&c.PortAnswer, 10 * time.Minute},
		{&c.PortIdle, 15 * time.Second},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	return c
}

// Server is an http.Handler. Start begins its background work, Close ends it.
type Server struct {
	cfg        Config
	handler    http.Handler
	reconciler *reconcile.Reconciler
	meters     *meters
	owner      string // this process, on what it works on
	creates    creates
	changes    changes
	shots      shots
	calls      calls
	ports      *http.Transport
	debugLog   *log.Logger

	ctx    context.Context // the life of creates and sweeps, not of a request
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup
}

// New builds a server; it touches nothing outside.
func New(cfg Config) (*Server, error) {
	if cfg.Host == nil || cfg.Store == nil || cfg.Keys == nil {
		return nil, errors.New("server needs a host, a store and keys")
	}
	s := &Server{cfg: cfg.withDefaults(), owner: string(sandbox.NewID())}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.ports = s.portTransport()
	s.debugLog = slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug)
	s.creates.init()
	s.changes.init()
	s.shots.init()
	s.calls.init()
	var err error
	if s.meters, err = newMeters(s.cfg.Registry, s.cfg.Store); err != nil {
		return nil, err
	}
	rc := s.cfg.Reconcile
	rc.Host, rc.HostName, rc.Store, rc.Log, rc.Now = s.cfg.Host, s.cfg.HostName, s.cfg.Store, s.cfg.Log, s.cfg.Now
	rc.Owned = func(id sandbox.ID) bool { return s.creates.find(id) != nil || s.changes.find(id) != nil }
	rc.OwnedSnapshot = s.shots.has
	rc.Ended = s.sandboxEnded
	if rc.CreateLimit == 0 {
		rc.CreateLimit = s.cfg.CreateLimit
	}
	s.reconciler = reconcile.New(rc)
	s.handler = s.routes()
	return s, nil
}

// Start brings the database and the host together once, and then keeps doing
// so. Call it before serving.
func (s *Server) Start(ctx context.Context) error {
	if err := s.reconciler.Start(ctx); err != nil {
		return err
	}
	s.wg.Go(s.sweep)
	s.wg.Go(s.watchKeys)
	return nil
}

var errStopping = sandbox.Errorf(sandbox.KindTransient, "the server is stopping")

// Close ends every stream and everything else under way, and waits for it. It
// destroys nothing, and what a host is at goes on there. It may be called twice.
func (s *Server) Close() error {
	s.creates.close()
	s.changes.close()
	s.shots.close()
	s.cancel(errStopping)
	s.calls.close(errStopping)
	s.wg.Wait()
	s.shots.wg.Wait()
	s.ports.CloseIdleConnections()
	s.calls.wait()
	return s.reconciler.Close()
}

// Reconcile runs one pass and waits for what it started.
func (s *Server) Reconcile(ctx context.Context) error { return s.reconciler.Once(ctx) }

// HTTPServer returns an http.Server around s with the bounds that a public
// server needs. It has no bound on a whole request or answer: commands and
// files take as long as they take.
func (s *Server) HTTPServer() *http.Server {
	return &http.Server{
		Handler:           s,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          s.debugLog, // broken connections of clients
	}
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.handler.ServeHTTP(w, r) }

// sandboxEnded ends the calls into a sandbox that is no more. The host has
// usually done so; this holds when it has not.
func (s *Server) sandboxEnded(row store.Sandbox) {
	s.meters.ended.WithLabelValues(string(row.Cause)).Inc()
	s.calls.end(endedError(row), func(c *call) bool { return c.id == row.ID })
}

// sweep deletes what was kept long enough, and what is left of it in the log.
func (s *Server) sweep() {
	const most = 1000 // rows in one transaction
	tick := time.NewTicker(s.cfg.SweepEvery)
	defer tick.Stop()
	for {
		now := s.cfg.Now()
		if _, err := s.cfg.Store.Forget(s.ctx, now.Add(-s.cfg.Retention), most); err != nil && s.ctx.Err() == nil {
			s.cfg.Log.Error("forget ended sandboxes", "err", err)
		}
		if _, err := s.cfg.Store.ForgetIdempotency(s.ctx, now.Add(-idempotencyTTL), most); err != nil && s.ctx.Err() == nil {
			s.cfg.Log.Error("forget idempotency keys", "err", err)
		}
		if err := s.cfg.Store.Checkpoint(s.ctx); err != nil && s.ctx.Err() == nil {
			s.cfg.Log.Error("checkpoint", "err", err)
		}
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
	}
}
