package server

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

func pathID(r *http.Request) (sandbox.ID, error) { return sandbox.ParseID(r.PathValue("id")) }

func (s *Server) getSandbox(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	row, err := s.cfg.Store.Sandbox(r.Context(), id)
	if err != nil {
		return err
	}
	return ok(w, sandboxOut(row))
}

func (s *Server) listSandboxes(w http.ResponseWriter, r *http.Request) error {
	f, err := filter(r.URL.RawQuery)
	if err != nil {
		return err
	}
	size := f.Limit
	f.Limit = size + 1 // one more tells whether there is another page
	rows, err := s.cfg.Store.Sandboxes(r.Context(), f)
	if err != nil {
		return err
	}
	out := api.SandboxList{Sandboxes: []api.Sandbox{}}
	if len(rows) > size {
		rows = rows[:size]
		out.NextCursor = store.CursorOf(rows[size-1]).String()
	}
	for _, row := range rows {
		out.Sandboxes = append(out.Sandboxes, sandboxOut(row))
	}
	return ok(w, out)
}

// filter reads the query of a list, strictly: a filter that is misspelt must
// not list everything.
func filter(query string) (store.Filter, error) {
	f := store.Filter{Limit: api.DefaultPageSize, Metadata: map[string]string{}}
	q, err := url.ParseQuery(query)
	if err != nil {
		return f, sandbox.Errorf(sandbox.KindInvalid, "the query is not understood: %w", err)
	}
	all := false
	for name, values := range q {
		value := values[0]
		if name != "state" && len(values) > 1 {
			return f, sandbox.Errorf(sandbox.KindInvalid, "%s is given %d times, at most once is allowed", cut(name, 100), len(values))
		}
		switch {
		case name == "state":
			f.States, err = states(values)
		case name == "all":
			all, err = boolean(name, value)
		case name == "template":
			f.Template, err = value, sandbox.SafeName("template", value)
		case name == "limit":
			f.Limit, err = within(name, value, 1, api.MaxPageSize)
		case name == "cursor":
			f.After, err = store.ParseCursor(value)
		case strings.HasPrefix(name, "metadata[") && strings.HasSuffix(name, "]"):
			f.Metadata[name[len("metadata["):len(name)-1]] = value
		default:
			err = unknownParameter(name)
		}
		if err != nil {
			return f, err
		}
	}
	if len(f.States) == 0 && !all {
		f.States = slices.DeleteFunc(sandbox.States(), sandbox.State.Ended)
	}
	return f, sandbox.CheckMetadata(f.Metadata)
}

func unknownParameter(name string) error {
	return sandbox.Errorf(sandbox.KindInvalid, "unknown query parameter %q", cut(name, 100))
}

func states(values []string) ([]sandbox.State, error) {
	var out []sandbox.State
	for _, v := range values {
		state := sandbox.State(v)
		if !state.Valid() {
			return nil, sandbox.Errorf(sandbox.KindInvalid, "state %q is none of %v", cut(v, 40), sandbox.States())
		}
		if !slices.Contains(out, state) {
			out = append(out, state)
		}
	}
	return out, nil
}

func boolean(what, value string) (bool, error) {
	switch value {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, sandbox.Errorf(sandbox.KindInvalid, "%s is %q, must be true or false", what, cut(value, 40))
}

func within(what, value string, least, most int) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil || n < least || n > most {
		return 0, sandbox.Errorf(sandbox.KindInvalid, "%s is %q, must be a number from %d to %d", what, cut(value, 40), least, most)
	}
	return n, nil
}

// deleteSandbox destroys a sandbox and waits for it. When the host does not do
// it now the answer is 202, and the reconciler goes on.
func (s *Server) deleteSandbox(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	ctx := r.Context()
	row, err := s.markDestroying(ctx, id)
	if err != nil {
		return err
	}
	if c := s.creates.find(id); c != nil {
		c.cancel(errDestroyed)
		select {
		case <-c.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if !row.State.Ended() {
		err := s.reconciler.Destroy(ctx, row, row.Cause)
		if err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("destroy goes on later", "sandbox", id, "op", "destroy", "err", err)
		}
	}
	if row, err = s.cfg.Store.Sandbox(ctx, id); err != nil {
		return err
	}
	status := http.StatusOK
	if !row.State.Ended() {
		status = http.StatusAccepted
	}
	writeJSON(w, status, sandboxOut(row))
	return nil
}

// markDestroying writes the intent down, whoever else changes the row just now.
func (s *Server) markDestroying(ctx context.Context, id sandbox.ID) (store.Sandbox, error) {
	for {
		row, err := s.cfg.Store.Sandbox(ctx, id)
		if err != nil || row.State.Ended() || row.State == sandbox.Destroying {
			return row, err
		}
		if err := fault.Point(ctx, "control/destroy/begin"); err != nil {
			return row, err
		}
		after, err := s.cfg.Store.Destroying(ctx, row, sandbox.CauseUser)
		if !errors.Is(err, store.ErrStale) {
			return after, err
		}
	}
}
