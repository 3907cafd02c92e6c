package server_test

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/server"
)

func TestOpenAPIHasEveryRouteAndNoOther(t *testing.T) {
	r := newRig(t)
	resp, err := http.Get(r.http.URL + "/openapi.json") // without a key
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }() // nothing was written to it
	var doc struct {
		Paths map[string]map[string]json.RawMessage `json:"paths"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&doc); err != nil || resp.StatusCode != 200 {
		t.Fatal(resp.Status, err)
	}
	var documented []string
	for path, ops := range doc.Paths {
		for method := range ops {
			if method != "parameters" {
				documented = append(documented, strings.ToUpper(method)+" "+path)
			}
		}
	}
	served := r.srv.Routes()
	slices.Sort(documented)
	slices.Sort(served)
	if diff := cmp.Diff(served, documented); diff != "" {
		t.Errorf("routes (-served +documented):\n%s", diff)
	}
}

func FuzzDecodeCreate(f *testing.F) {
	for _, s := range []string{`{}`, `{"vcpus":1}`, `{"env":{"A":"b"},"network":{"internet":true}}`, `null`, `[]`, `{"vcpus":1e99}`, `{} {}`, "{\"a\":\"\xff\"}"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var v api.CreateSandbox
		if err := server.DecodeStrict(body, &v); err != nil {
			if len(err.Error()) > 600 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
			return
		}
		again, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		var w api.CreateSandbox
		if err := server.DecodeStrict(again, &w); err != nil {
			t.Errorf("%s was taken, and encoded again as %s refused: %v", body, again, err)
		}
	})
}
