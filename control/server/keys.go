package server

import (
	"net/http"

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
	if err := s.cfg.Keys.DeleteKey(r.Context(), askingKey(r), id); err != nil {
		return err
	}
	return ok(w, struct{}{})
}
