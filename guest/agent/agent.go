// Package agent is the guest agent's HTTP server: the process and filesystem
// services, and /health, /init, /files, /metrics and /envs of the guest's
// contract, on one port for HTTP/1.1 and cleartext HTTP/2.
//
// Everything but /health and control calls needs the sandbox's token. An agent
// that knows the host's key takes an /init only with the host's signature, and
// answers no user before the first one.
//
// Control calls are those that only the host may make: /init says who this machine
// is; /poweroff ends it; /freeze makes its user processes stand still before it is saved, and /thaw
// lets them go on in the same machine. In a copy that was restored they go on when
// its /init has been done to the end, in this order: clock, random numbers, names,
// connections and calls of the past, token and environment, the image's hooks.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/guest/exec"
	"github.com/dormouse-sandbox/dormouse/guest/files"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem/filesystemconnect"
	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process/processconnect"
	"github.com/dormouse-sandbox/dormouse/guest/identity"
)

// Config is what an agent is made of.
type Config struct {
	Identity *identity.Current
	Exec     *exec.Server
	Files    *files.Server
	// Verifier checks that /init comes from the host. Without one, as a plain
	// process, /init needs no signature.
	Verifier *guestapi.Verifier
	// Machine is changed by a signed /init. Nil changes nothing.
	Machine Machine
	// Freezer makes user processes stand still. Without one /freeze is unsupported.
	Freezer Freezer
	// Hooks runs those of the image, for a sandbox that goes on after a restore. Nil
	// runs none. It returns when they have ended, whatever they do.
	Hooks func(context.Context, identity.Identity) []guestapi.Hook
	// PowerOff begins the machine's end and returns. Nil: a plain process has none.
	PowerOff func()
	Log      *slog.Logger
}

// Machine is the part of a signed /init that concerns the whole guest.
type Machine interface {
	SetClock(time.Time) error
	SetHostname(string) error
	// AddEntropy makes random numbers differ from those of every other copy.
	AddEntropy([]byte) error
	// NewMachineID makes a new one where the image has one.
	NewMachineID() error
	// EndPast ends the TCP connections of user processes to the outside, and says
	// how many. It tries all that it can.
	EndPast() (dropped int, err error)
	// Life names the life of this machine: another one after each start and each
	// restore. It is empty where nobody can tell.
	Life() (string, error)
}

// Agent answers requests.
type Agent struct {
	cfg     Config
	mux     *http.ServeMux
	errors  *connect.ErrorWriter
	metrics meter
	era     *era
	still   *stillness
}

// New builds an agent.
func New(cfg Config) *Agent {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	a := &Agent{cfg: cfg, mux: http.NewServeMux(), errors: connect.NewErrorWriter(), era: newEra(), still: newStillness()}
	options := []connect.HandlerOption{
		connect.WithReadMaxBytes(exec.MaxMessage),
		connect.WithCompression("gzip", nil, nil), // the wire is a TAP on one machine: bytes are cheaper than cycles
	}
	processPath, process := processconnect.NewProcessHandler(cfg.Exec, options...)
	filesystemPath, filesystem := filesystemconnect.NewFilesystemHandler(cfg.Files, options...)
	a.mux.Handle(processPath, a.guarded(process))
	a.mux.Handle(filesystemPath, a.guarded(filesystem))
	a.mux.Handle("/files", a.introduced(cfg.Files))                                      // a signature may stand for the token: files decides
	a.mux.Handle(guestapi.PathTree, a.introduced(http.HandlerFunc(cfg.Files.ServeTree))) // likewise
	a.mux.Handle("GET /metrics", a.guarded(http.HandlerFunc(a.serveMetrics)))
	a.mux.Handle("GET /envs", a.guarded(http.HandlerFunc(a.serveEnvs)))
	a.mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	a.mux.HandleFunc("POST "+guestapi.PathInit, a.serveInit)
	a.mux.HandleFunc("POST "+guestapi.PathFreeze, a.serveFreeze)
	a.mux.HandleFunc("POST "+guestapi.PathThaw, a.serveThaw)
	a.mux.HandleFunc("POST "+guestapi.PathPowerOff, a.servePowerOff)
	return a
}

// ServeHTTP answers one request.
func (a *Agent) ServeHTTP(w http.ResponseWriter, r *http.Request) { a.mux.ServeHTTP(w, r) }

// Serve answers on a listener until ctx ends, and closes it.
func (a *Agent) Serve(ctx context.Context, l net.Listener) error {
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Handler:           a,
		Protocols:         protocols,
		ReadHeaderTimeout: 30 * time.Second,
		MaxHeaderBytes:    64 << 10,
		ConnState:         a.era.track,
		ConnContext:       withConn,
		ErrorLog:          slog.NewLogLogger(a.cfg.Log.Handler(), slog.LevelDebug), // a client's mistakes are not the operator's
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() }) // Serve says what came of it
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

// introduced turns away what comes before the host has said who this is. What it
// lets through ends when he says that it is somebody else.
func (a *Agent) introduced(next http.Handler) http.Handler {
	next = a.era.belonging(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a.cfg.Verifier != nil && a.cfg.Identity.Get().Token == "" {
			a.unauthorized(w, r, "the sandbox has no identity yet")
			return
		}
		next.ServeHTTP(w, r)
	})
}

// guarded lets through what carries the token.
func (a *Agent) guarded(next http.Handler) http.Handler {
	return a.introduced(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !a.cfg.Identity.Allows(r.Header.Get(guestapi.HeaderToken)) {
			a.unauthorized(w, r, "the access token is missing or wrong")
			return
		}
		next.ServeHTTP(w, r)
	}))
}

// unauthorized answers in the form that the caller's protocol understands.
func (a *Agent) unauthorized(w http.ResponseWriter, r *http.Request, message string) {
	if r.Method == http.MethodPost && r.URL.Path != "/files" && r.URL.Path != guestapi.PathTree && a.errors.IsSupported(r) { // a call
		_ = a.errors.Write(w, r, connect.NewError(connect.CodeUnauthenticated, errors.New(message))) // the caller is gone
		return
	}
	guestapi.WriteError(w, http.StatusUnauthorized, message)
}
