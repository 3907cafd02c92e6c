package rig

import (
	"context"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netns"

	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/control/auth"
	"github.com/dormouse-sandbox/dormouse/control/store"
)

// Key is an API key of this server. It is made the first time it is needed, in
// the database, as `up --detach` makes the user's.
func (s *Server) Key() string {
	s.t.Helper()
	path := filepath.Join(s.Data, "test-key")
	if key, err := os.ReadFile(path); err == nil {
		return string(key)
	}
	db, err := store.OpenSQLite(context.Background(), filepath.Join(s.Data, "control.db"))
	if err != nil {
		s.t.Fatal(err)
	}
	key, err := auth.New(db, nil).EnsureKey(context.Background(), "test")
	if err != nil {
		s.t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(key), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return key
}

// connect makes the client.
func (s *Server) connect() {
	s.t.Helper()
	cfg := client.Config{BaseURL: s.URL, Key: s.Key()}
	if s.opts.NetNS != "" {
		cfg.HTTPClient = &http.Client{Transport: &http.Transport{
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				return DialIn(ctx, s.opts.NetNS, network, address)
			},
		}}
	}
	c, err := client.New(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	s.Client = c
}

// DialIn connects from inside a named network namespace.
func DialIn(ctx context.Context, name, network, address string) (net.Conn, error) {
	type answer struct {
		conn net.Conn
		err  error
	}
	done := make(chan answer, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		handle, err := netns.GetFromName(name)
		if err == nil {
			err = netns.Set(handle)
			_ = handle.Close() // only a handle
		}
		if err != nil {
			done <- answer{nil, err}
			return
		}
		d := net.Dialer{FallbackDelay: -1} // with a fallback it would dial on other threads, which are elsewhere
		conn, err := d.DialContext(ctx, network, address)
		done <- answer{conn, err}
	}()
	a := <-done
	return a.conn, a.err
}
