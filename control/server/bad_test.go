package server_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// send makes a raw request and returns its status and error.
func (r *rig) send(method, path, body string, header ...string) (*http.Response, api.ErrorDetail) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.ctx(), method, r.http.URL+path, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+r.key)
	for i := 0; i < len(header); i += 2 {
		if header[i+1] == "" {
			req.Header.Del(header[i])
		} else {
			req.Header.Set(header[i], header[i+1])
		}
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }() // nothing was written to it
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	var out api.Error
	if resp.StatusCode >= 400 {
		if err := json.Unmarshal(b, &out); err != nil {
			r.t.Fatalf("%s %s: the error is not ours: %q", method, path, b)
		}
	}
	return resp, out.Error
}

func TestBadInput(t *testing.T) {
	r := newRig(t)
	id := r.create()
	sb := "/v1/sandboxes/" + id
	long := strings.Repeat("x", 5000)
	for _, tt := range []struct {
		name   string
		method string
		path   string
		body   string
		status int
		says   string
		header []string
	}{
		{"unknown template", "POST", "/v1/sandboxes", `{"template":"nope"}`, 404, "no template nope; there are: base", nil},
		{"path in template", "POST", "/v1/sandboxes", `{"template":"../images"}`, 400, `"../images" must match`, nil},
		{"CPUs below none", "POST", "/v1/sandboxes", `{"vcpus":-1}`, 400, "vcpus is -1, must be from 1 to 32", nil},
		{"no CPUs", "POST", "/v1/sandboxes", `{"vcpus":0}`, 400, "vcpus is 0, must be from 1 to 32", nil},
		{"no memory", "POST", "/v1/sandboxes", `{"mem_mib":0}`, 400, "mem_mib is 0, must be from 128 to 65536", nil},
		{"no disk", "POST", "/v1/sandboxes", `{"disk_mib":0}`, 400, "disk_mib is 0, must be from 64 to", nil},
		{"too many CPUs", "POST", "/v1/sandboxes", `{"vcpus":1000}`, 400, "vcpus is 1000, must be from 1 to 32", nil},
		{"too little memory", "POST", "/v1/sandboxes", `{"mem_mib":1}`, 400, "from 128 to 65536 MiB", nil},
		{"memory beyond the host's", "POST", "/v1/sandboxes", `{"mem_mib":16384}`, 400, "mem_mib is 16384, the host has 8192 MiB", nil},
		{"disk below the template's", "POST", "/v1/sandboxes", `{"disk_mib":100}`, 400, "disk_mib is 100, template base needs at least 512", nil},
		{"negative timeout", "POST", "/v1/sandboxes", `{"timeout_seconds":-5}`, 400, "timeout_seconds is -5, must be from 1 to", nil},
		{"timeout of an age", "POST", "/v1/sandboxes", `{"timeout_seconds":1e300}`, 400, "must be from 1 to 2.592e+06", nil},
		{"unknown field", "POST", "/v1/sandboxes", `{"memory":1}`, 400, `unknown field "memory"`, nil},
		{"wrong type", "POST", "/v1/sandboxes", `{"vcpus":"two"}`, 400, "vcpus is a JSON string, must be a whole number", nil},
		{"fraction", "POST", "/v1/sandboxes", `{"vcpus":1.5}`, 400, "vcpus is a JSON number 1.5, must be a whole number", nil},
		{"not JSON", "POST", "/v1/sandboxes", `{"vcpus":}`, 400, "not JSON: invalid character '}'", nil},
		{"JSON that ends early", "POST", "/v1/sandboxes", `{"vcpus":1`, 400, "ends early, at byte 10", nil},
		{"data behind", "POST", "/v1/sandboxes", `{} {}`, 400, "data behind its JSON object", nil},
		{"null", "POST", "/v1/sandboxes", `null`, 400, "null", nil},
		{"nothing", "POST", "/v1/sandboxes", ``, 400, "empty", nil},
		{"not UTF-8", "POST", "/v1/sandboxes", "{\"template\":\"\xff\"}", 400, "UTF-8", nil},
		{"a form", "POST", "/v1/sandboxes", `a=b`, 415, "must be application/json", []string{"Content-Type", "application/x-www-form-urlencoded"}},
		{"body over the limit", "POST", "/v1/sandboxes", `{"template":"` + strings.Repeat("x", 1<<20) + `"}`, 413, "larger than 1048576 bytes", nil},
		{"bad env name", "POST", "/v1/sandboxes", `{"env":{"A-B":"x"}}`, 400, `env name "A-B" must match`, nil},
		{"long metadata", "POST", "/v1/sandboxes", `{"metadata":{"a":"` + long + `"}}`, 400, "longer than 1024 bytes", nil},
		{"long idempotency key", "POST", "/v1/sandboxes", `{}`, 400, "at most 128", []string{"Idempotency-Key", strings.Repeat("k", 200)}},

		{"ID with a path", "GET", "/v1/sandboxes/..%2f..%2fetc", "", 400, "is not 24 characters", nil},
		{"ID of dots", "GET", "/v1/sandboxes/%2e%2e", "", 400, "is not 24 characters", nil},
		{"path to be cleaned", "GET", "/v1/sandboxes/../../etc/passwd", "", 404, "there is nothing at", nil},
		{"delete of a path", "DELETE", "/v1/sandboxes/..%2fimages", "", 400, "is not 24 characters", nil},
		{"upper case ID", "GET", "/v1/sandboxes/" + strings.ToUpper(id), "", 400, "is not 24 characters", nil},
		{"unknown sandbox", "GET", "/v1/sandboxes/" + string(sandbox.NewID()), "", 404, "there is no sandbox", nil},
		{"unknown path", "GET", "/v2/sandboxes", "", 404, "there is nothing at /v2/sandboxes", nil},
		{"wrong method", "PATCH", sb, "", 405, "only DELETE, GET, HEAD", nil},

		{"no key", "GET", "/v1/sandboxes", "", 401, "valid API key", []string{"Authorization", ""}},
		{"wrong key", "GET", "/v1/sandboxes", "", 401, "valid API key", []string{"Authorization", "Bearer dm_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}},
		{"another scheme", "GET", "/v1/sandboxes", "", 401, "valid API key", []string{"Authorization", "Basic Zm9v"}},
		{"no key for metrics", "GET", "/metrics", "", 401, "valid API key", []string{"Authorization", ""}},

		{"state unheard of", "GET", "/v1/sandboxes?state=happy", "", 400, `state "happy" is none of`, nil},
		{"page too large", "GET", "/v1/sandboxes?limit=5000", "", 400, "from 1 to 1000", nil},
		{"page of nothing", "GET", "/v1/sandboxes?limit=0", "", 400, "from 1 to 1000", nil},
		{"cursor made up", "GET", "/v1/sandboxes?cursor=abc", "", 400, "cursor is not one that a list has returned", nil},
		{"misspelt filter", "GET", "/v1/sandboxes?stat=running", "", 400, `unknown query parameter "stat"`, nil},

		{"neither command nor shell", "POST", sb + "/exec", `{}`, 400, "exactly one of command and shell", nil},
		{"both", "POST", sb + "/exec", `{"command":["a"],"shell":"b"}`, 400, "exactly one of command and shell", nil},
		{"long argument", "POST", sb + "/exec", `{"command":["a","` + strings.Repeat("x", 200<<10) + `"]}`, 400, "at most 131072", nil},
		{"NUL in argument", "POST", sb + "/exec", `{"command":["a\u0000b"]}`, 400, "NUL", nil},
		{"user with a path", "POST", sb + "/exec", `{"command":["a"],"user":"../root"}`, 400, "user name", nil},
		{"negative exec timeout", "POST", sb + "/exec", `{"command":["a"],"timeout_seconds":-1}`, 400, "from 0 to", nil},
		{"command that is not there", "POST", sb + "/exec", `{"command":["nope"]}`, 400, "nope: not found", nil},

		{"file without path", "GET", sb + "/files/read", "", 400, "path is missing", nil},
		{"long path", "GET", sb + "/files/read?path=" + long, "", 400, "path has 5000 bytes, at most 4096", nil},
		{"NUL in path", "GET", sb + "/files/stat?path=a%00b", "", 400, "NUL", nil},
		{"missing file", "GET", sb + "/files/read?path=/none", "", 404, "/none: no such file", nil},
		{"depth too large", "GET", sb + "/files/list?path=/&depth=1000", "", 400, "depth is \"1000\", must be a number from 1 to 64", nil},
		{"mkdir without path", "POST", sb + "/files/mkdir", `{}`, 400, "path is missing", nil},
		{"move without destination", "POST", sb + "/files/move", `{"source":"/a"}`, 400, "destination is missing", nil},
		{"upload as JSON", "PUT", sb + "/files/write?path=/a", `{}`, 415, "must be application/octet-stream", []string{"Content-Type", "application/json"}},
		{"timeout of nothing", "POST", sb + "/timeout", `{"timeout_seconds":0}`, 400, "from 1 to", nil},
		{"tail too large", "GET", sb + "/logs?tail_bytes=99999999999", "", 400, "from 1 to 1048576", nil},
		{"tail and offset", "GET", sb + "/logs?tail_bytes=1&offset=1", "", 400, "only one of", nil},
		{"key without name", "POST", "/v1/api-keys", `{"name":""}`, 400, "key name", nil},
		{"unknown key", "DELETE", "/v1/api-keys/kxxxx", "", 404, "no API key", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, d := r.send(tt.method, tt.path, tt.body, tt.header...)
			if resp.StatusCode != tt.status || !strings.Contains(d.Message, tt.says) {
				t.Errorf("got %d %s %q, want %d with %q in it", resp.StatusCode, d.Code, d.Message, tt.status, tt.says)
			}
			if len(d.Message) > 1000 {
				t.Errorf("the message has %d bytes", len(d.Message))
			}
			if tt.status != 405 && api.Status(sandbox.Kind(d.Code)) != tt.status && tt.status != 415 {
				t.Errorf("code %s does not belong to status %d", d.Code, tt.status)
			}
			if resp.Header.Get(api.HeaderRequestID) == "" {
				t.Error("no request ID")
			}
			if tt.status == 405 && resp.Header.Get("Allow") == "" {
				t.Error("no Allow header")
			}
		})
	}
	if got := r.host.Count("CreateSandbox"); got != 1 {
		t.Errorf("bad input reached the host's CreateSandbox: %d calls", got)
	}
}

func TestAFullHostIsBusy(t *testing.T) {
	r := newRig(t)
	r.host.SetMemory(8192, 8000)
	resp, d := r.send("POST", "/v1/sandboxes", `{"mem_mib":512}`)
	if resp.StatusCode != 429 || !strings.Contains(d.Message, "mem_mib is 512, but 8000 of the host's 8192 MiB") {
		t.Errorf("got %d %q", resp.StatusCode, d.Message)
	}
	if resp.Header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
}

func TestKeysOverHTTP(t *testing.T) {
	r := newRig(t)
	made, err := r.c.CreateKey(r.ctx(), "second")
	if err != nil || !strings.HasPrefix(made.Secret, api.KeyPrefix) {
		t.Fatalf("create: %+v, %v", made, err)
	}
	second := r.client(made.Secret)
	keys, err := second.Keys(r.ctx())
	if err != nil || len(keys) != 2 {
		t.Fatalf("list: %+v, %v", keys, err)
	}
	for _, k := range keys {
		if k.Secret != "" || strings.Contains(made.Secret[len(k.Prefix):], k.Prefix) {
			t.Errorf("the list shows %+v", k)
		}
	}
	r.wantKind(second.DeleteKey(r.ctx(), made.ID), sandbox.KindConflict)
	if err := r.c.DeleteKey(r.ctx(), made.ID); err != nil {
		t.Fatal(err)
	}
	_, err = second.Keys(r.ctx())
	r.wantKind(err, sandbox.KindUnauthorized)
	if h, err := second.Health(r.ctx()); err != nil || h.Status != "ok" || h.Version != "test" {
		t.Errorf("health without a key: %+v, %v", h, err)
	}
}

func TestInternalErrorsStayInside(t *testing.T) {
	r := newRig(t)
	id := r.create()
	if err := r.cfg.Store.Close(); err != nil {
		t.Fatal(err)
	}
	resp, d := r.send("GET", "/v1/sandboxes/"+id, "")
	if resp.StatusCode != 500 || strings.Contains(d.Message, "sql") || !strings.Contains(d.Message, resp.Header.Get(api.HeaderRequestID)) {
		t.Errorf("got %d %q", resp.StatusCode, d.Message)
	}
}

func TestPrometheusNeedsAKeyAndCounts(t *testing.T) {
	r := newRig(t)
	r.create()
	req, err := http.NewRequestWithContext(r.ctx(), "GET", r.http.URL+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-Key", r.key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }() // nothing was written to it
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`dormouse_sandboxes{state="running"} 1`, `dormouse_creates_total{outcome="running"} 1`,
		`dormouse_http_requests_total{route="POST /v1/sandboxes",status="201"} 1`,
	} {
		if !bytes.Contains(b, []byte(want)) {
			t.Errorf("no %s in the metrics", want)
		}
	}
}
