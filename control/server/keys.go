package server

import (
	"net/http"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func (s *Server) createKey(w http.ResponseWriter, r *http.Request) error {
	var req api.CreateKey
	if err := readBody(w, r, &req); err != nil {
		return err
	}
	key, secret, err := s.cfg.Keys.CreateKey(r.Context(), req.Name)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusCreated, keyOut(key, secret))
	return nil
}

func (s *Server) listKeys(w http.ResponseWriter, r *http.Request) error {
	keys, err := s.cfg.Keys.Keys(r.Context())
	if err != nil {
		return err
	}
	out := api.KeyList{Keys: []api.Key{}}
	for _, k := range keys {
		out.Keys = append(out.Keys, keyOut(k, ""))
	}
	return ok(w, out)
}

func (s *Server) deleteKey(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	if err := sandbox.SafeName("key", id); err != nil {
		return err
	}
	if err := s.cfg.Keys.DeleteKey(r.Context(), askingKey(r.Context()), id); err != nil {
		return err
	}
	s.calls.end(errRevoked, func(c *call) bool { return c.key == id })
	return ok(w, struct{}{})
}

var errRevoked = sandbox.Errorf(sandbox.KindUnauthorized, "the API key was revoked")

// watchKeys ends the calls of keys that are no longer in the database. Another
// process may have revoked them: making the owner's key replaces the one before.
func (s *Server) watchKeys() {
	tick := time.NewTicker(s.cfg.KeyCheck)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
		if !s.calls.any() {
			continue
		}
		keys, err := s.cfg.Keys.Keys(s.ctx)
		if err != nil {
			if s.ctx.Err() == nil {
				s.cfg.Log.Error("look for revoked keys", "err", err)
			}
			continue // a database that does not answer has revoked nothing
		}
		valid := map[string]bool{}
		for _, k := range keys {
			valid[k.ID] = true
		}
		s.calls.end(errRevoked, func(c *call) bool { return c.key != "" && !valid[c.key] })
	}
}
