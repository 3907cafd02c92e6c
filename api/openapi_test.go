package api_test

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

type schema struct {
	Type       any               `json:"type"`
	Ref        string            `json:"$ref"`
	Required   []string          `json:"required"`
	Enum       []string          `json:"enum"`
	Items      *schema           `json:"items"`
	Properties map[string]schema `json:"properties"`
}

func schemas(t *testing.T) map[string]schema {
	t.Helper()
	var doc struct {
		OpenAPI    string `json:"openapi"`
		Components struct {
			Schemas map[string]schema `json:"schemas"`
		} `json:"components"`
	}
	if err := json.Unmarshal(api.OpenAPI(), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.OpenAPI != "3.1.0" {
		t.Errorf("version is %q", doc.OpenAPI)
	}
	return doc.Components.Schemas
}

// bodies are all types that travel.
var bodies = []any{
	api.Error{},
	api.ErrorDetail{},
	api.CreateSandbox{},
	api.Network{},
	api.Sandbox{},
	api.Phase{},
	api.SandboxList{},
	api.Exec{},
	api.ExecResult{},
	api.StreamMessage{},
	api.TerminalSize{},
	api.File{},
	api.FileList{},
	api.FileEvent{},
	api.PathRequest{},
	api.MoveRequest{},
	api.Written{},
	api.Tree{},
	api.OpenPort{},
	api.Port{},
	api.Timeout{},
	api.Saved{},
	api.SaveReport{},
	api.Resume{},
	api.Fork{},
	api.Forked{},
	api.Copy{},
	api.CreateSnapshot{},
	api.Snapshot{},
	api.SnapshotList{},
	api.Verified{},
	api.Damage{},
	api.SnapshotTree{},
	api.SnapshotNode{},
	api.Ping{},
	api.Metrics{},
	api.Template{},
	api.Healthcheck{},
	api.TemplateList{},
	api.BuildTemplate{},
	api.RegistryLogin{},
	api.BuildEvent{},
	api.Host{},
	api.CreateKey{},
	api.Key{},
	api.KeyList{},
	api.Health{},
}

func TestSchemasAreTheGoTypes(t *testing.T) {
	have := schemas(t)
	var names []string
	for _, body := range bodies {
		typ := reflect.TypeOf(body)
		names = append(names, typ.Name())
		s, ok := have[typ.Name()]
		if !ok {
			t.Errorf("there is no schema %s", typ.Name())
			continue
		}
		var inGo, inDoc []string
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			inGo = append(inGo, name)
			if p, ok := s.Properties[name]; ok {
				checkType(t, typ.Name()+"."+name, f.Type, p)
			}
		}
		for name := range s.Properties {
			inDoc = append(inDoc, name)
		}
		slices.Sort(inGo)
		slices.Sort(inDoc)
		if diff := cmp.Diff(inGo, inDoc); diff != "" {
			t.Errorf("%s (-Go +OpenAPI):\n%s", typ.Name(), diff)
		}
		for _, name := range s.Required {
			if !slices.Contains(inDoc, name) {
				t.Errorf("%s requires %s, which it does not have", typ.Name(), name)
			}
		}
	}
	for name := range have {
		if !slices.Contains(names, name) {
			t.Errorf("schema %s is no Go type of this test's list", name)
		}
	}
}

// checkType compares a field's kind with its schema's type.
func checkType(t *testing.T, where string, typ reflect.Type, s schema) {
	t.Helper()
	if typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	var want string
	switch kind := typ.Kind(); {
	case typ.String() == "time.Time", kind == reflect.String:
		want = "string"
	case kind == reflect.Bool:
		want = "boolean"
	case kind == reflect.Float64:
		want = "number"
	case kind == reflect.Slice:
		want = "array"
		if s.Items == nil {
			t.Errorf("%s does not say what its items are", where)
		}
	case kind == reflect.Map:
		want = "object"
	case kind == reflect.Struct:
		if s.Ref != "#/components/schemas/"+typ.Name() {
			t.Errorf("%s refers to %q, its Go type is %s", where, s.Ref, typ.Name())
		}
		return
	default:
		want = "integer"
	}
	got := s.Type
	if list, ok := got.([]any); ok && len(list) > 0 {
		got = list[0]
	}
	if got != want {
		t.Errorf("%s has type %v, its Go type needs %s", where, got, want)
	}
}

func TestEnumsAreComplete(t *testing.T) {
	have := schemas(t)
	var kinds, states []string
	for _, k := range sandbox.Kinds() {
		kinds = append(kinds, string(k))
	}
	for _, s := range sandbox.States() {
		states = append(states, string(s))
	}
	if diff := cmp.Diff(kinds, have["ErrorDetail"].Properties["code"].Enum); diff != "" {
		t.Errorf("error codes (-Go +OpenAPI):\n%s", diff)
	}
	if diff := cmp.Diff(states, have["Sandbox"].Properties["state"].Enum); diff != "" {
		t.Errorf("states (-Go +OpenAPI):\n%s", diff)
	}
	var snapshotStates []string
	for _, s := range sandbox.SnapshotStates() {
		snapshotStates = append(snapshotStates, string(s))
	}
	if diff := cmp.Diff(snapshotStates, have["Snapshot"].Properties["state"].Enum); diff != "" {
		t.Errorf("states of snapshots (-Go +OpenAPI):\n%s", diff)
	}
	for _, start := range have["Sandbox"].Properties["started_by"].Enum {
		if !sandbox.Start(start).Valid() {
			t.Errorf("start %q is unknown", start)
		}
	}
	for _, c := range have["Sandbox"].Properties["cause"].Enum {
		if !sandbox.Cause(c).Valid() {
			t.Errorf("cause %q is unknown", c)
		}
	}
}

func TestEveryReferenceLeadsSomewhere(t *testing.T) {
	var doc any
	if err := json.Unmarshal(api.OpenAPI(), &doc); err != nil {
		t.Fatal(err)
	}
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case []any:
			for _, item := range v {
				walk(item)
			}
		case map[string]any:
			if to, ok := v["$ref"].(string); ok {
				at := doc
				for part := range strings.SplitSeq(strings.TrimPrefix(to, "#/"), "/") {
					m, _ := at.(map[string]any)
					at = m[part]
				}
				if at == nil {
					t.Errorf("%s leads nowhere", to)
				}
			}
			for _, item := range v {
				walk(item)
			}
		}
	}
	walk(doc)
}

func TestEveryKindHasAStatus(t *testing.T) {
	for _, k := range sandbox.Kinds() {
		if s := api.Status(k); s < 400 || s > 599 || (s == 500) != (k == sandbox.KindInternal) {
			t.Errorf("kind %s has status %d", k, s)
		}
	}
}
