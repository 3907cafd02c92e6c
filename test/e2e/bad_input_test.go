package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// bad is one request that must be refused: with which status, and with what in
// the message, which names the bound or the thing.
type bad struct {
	name   string
	method string
	path   string
	body   string
	key    string // "": the right one; "none": no key
	status int
	says   []string
}

// TestBadInput: every kind of wrong request gets the right status and a message
// that helps, soon, and makes no sandbox.
func TestBadInput(t *testing.T) {
	w := shared(t)
	id := w.box()
	dead := w.create(small()).ID
	w.destroy(dead)
	w.root(id, "mkfifo /tmp/fifo; mkdir -p /tmp/folder; ln -sfn /dev/zero /tmp/zero-link; rm -f /root/locked; : > /root/locked")
	t.Cleanup(func() { w.root(id, "rm -rf /tmp/fifo /tmp/folder /tmp/zero-link") })
	host, err := w.Client.Host(within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	before := w.count()

	var table []bad
	table = append(table, badCreates(host)...)
	table = append(table, badPaths(id)...)
	table = append(table, badBodies(id)...)
	table = append(table, badFiles(id)...)
	table = append(table, badCalls(id, dead)...)
	for _, b := range table {
		t.Run(b.name, func(t *testing.T) {
			start := time.Now()
			status, message := w.in(t).refuse(b)
			if status != b.status {
				t.Errorf("status %d, want %d: %s", status, b.status, message)
			}
			for _, part := range b.says {
				if !strings.Contains(message, part) {
					t.Errorf("the message does not have %q: %s", part, message)
				}
			}
			if took := time.Since(start); took > 20*time.Second {
				t.Errorf("it took %v", took)
			}
			t.Logf("%d %s", status, message)
		})
	}
	if after := w.count(); after != before {
		t.Errorf("%d sandboxes and VMs before, %d after", before, after)
	}
	if got := w.sh(id, "echo fine"); got != "fine" {
		t.Errorf("the sandbox that all this was tried on answers %q", got)
	}
}

// count is how many sandboxes are on record and how many VMs run.
func (w world) count() (n int) {
	w.t.Helper()
	for _, err := range w.Client.Sandboxes(within(w.t, time.Minute), client.ListOptions{All: true}) {
		if err != nil {
			w.t.Fatal(err)
		}
		n++
	}
	return n + len(w.VMs())
}

// refuse sends a request as it is and returns the answer's status and message.
func (w world) refuse(b bad) (int, string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, b.method, w.URL+b.path, strings.NewReader(b.body))
	if err != nil {
		w.t.Fatal(err)
	}
	switch b.key {
	case "":
		req.Header.Set("Authorization", "Bearer "+w.Key())
	case "none":
	default:
		req.Header.Set("Authorization", "Bearer "+b.key)
	}
	// A redirect would be an answer of its own kind.
	direct := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := direct.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		w.t.Fatal(err)
	}
	var answer api.Error
	if err := json.Unmarshal(text, &answer); err != nil || answer.Error.Code == "" || answer.Error.Message == "" {
		w.t.Fatalf("%s, not an error of ours: %.300q", resp.Status, text)
	}
	if api.Status(sandbox.Kind(answer.Error.Code)) != resp.StatusCode && resp.StatusCode != http.StatusMethodNotAllowed {
		w.t.Errorf("code %s with status %d", answer.Error.Code, resp.StatusCode)
	}
	return resp.StatusCode, answer.Error.Message
}

func badCreates(host api.Host) []bad {
	create := func(name, body string, status int, says ...string) bad {
		return bad{name, http.MethodPost, "/v1/sandboxes", body, "", status, says}
	}
	beyond := host.MemTotalMiB + 1024 // within what a sandbox may have, beyond what this host has
	table := []bad{
		create("an unknown template", `{"template":"nothing-like-it"}`, 404, "nothing-like-it", "base"),
		create("explicitly 0 vCPUs", `{"vcpus":0}`, 400, "vcpus is 0", "1", "32"),
		create("-1 vCPUs", `{"vcpus":-1}`, 400, "vcpus is -1", "from 1 to 32"),
		create("1000 vCPUs", `{"vcpus":1000}`, 400, "vcpus is 1000", "from 1 to 32"),
		create("half a vCPU", `{"vcpus":0.5}`, 400, "vcpus", "whole number"),
		create("vCPUs as text", `{"vcpus":"2"}`, 400, "vcpus", "string"),
		create("explicitly no memory", `{"mem_mib":0}`, 400, "mem_mib is 0", "128"),
		create("1 MiB of memory", `{"mem_mib":1}`, 400, "mem_mib is 1", "from 128 to 65536 MiB"),
		create("1 TiB of memory", `{"mem_mib":1048576}`, 400, "mem_mib is 1048576", "65536"),
		create("explicitly no disk", `{"disk_mib":0}`, 400, "disk_mib is 0", "64"),
		create("a disk smaller than the template", `{"disk_mib":64}`, 400, "disk_mib is 64", "at least"),
		create("a negative timeout", `{"timeout_seconds":-1}`, 400, "timeout_seconds is -1", "from 1 to"),
		create("no timeout", `{"timeout_seconds":0}`, 400, "timeout_seconds is 0", "from 1 to"),
		create("a timeout of a year", `{"timeout_seconds":31536000}`, 400, "timeout_seconds", "2.592e+06"),
		create("an env name with a dash", `{"env":{"a-b":"c"}}`, 400, "a-b"),
		create("an env of 65 KiB", fmt.Sprintf(`{"env":{"A":%q}}`, strings.Repeat("x", 65<<10)), 400, "65536"),
		create("an unknown field", `{"template":"base","cpus":4}`, 400, "cpus"),
		create("an unknown field deep down", `{"network":{"intranet":true}}`, 400, "intranet"),
	}
	if beyond <= sandbox.MaxMemMiB {
		table = append(table, create("memory beyond the host's", fmt.Sprintf(`{"mem_mib":%d}`, beyond), 400, fmt.Sprint(beyond), "MiB"))
	}
	for _, name := range []string{"../base", "..", "/etc/passwd", "base/../../etc", `..\base`, "base\\u0000", "%2e%2e", "", " "} {
		if name == "" {
			continue // means the default
		}
		b := create("template "+url.PathEscape(name), `{"template":"`+strings.ReplaceAll(name, `\b`, `\\b`)+`"}`, 400, "template name", "must match")
		table = append(table, b)
	}
	return table
}

// badPaths climbs in every ID that is part of a URL.
func badPaths(id string) []bad {
	var table []bad
	for _, climb := range []string{
		"%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%2f" + id, id + "%2f..", "%2e%2e%2f" + id[3:], id + "%00", strings.ToUpper(id), id + "x", "a",
	} {
		for _, end := range []struct{ method, path, body string }{
			{"GET", "", ""},
			{"DELETE", "", ""},
			{"POST", "/exec", `{"shell":"true"}`},
			{"GET", "/files/read?path=/etc/passwd", ""},
			{"PUT", "/files/write?path=/tmp/x", "x"},
			{"GET", "/logs", ""},
			{"POST", "/timeout", `{"timeout_seconds":9}`},
			{"GET", "/metrics", ""},
			{"POST", "/ping", ""},
		} {
			table = append(table, bad{
				end.method + " " + climb + end.path, end.method, "/v1/sandboxes/" + climb + end.path, end.body, "", 400,
				[]string{"sandbox ID", "24 characters"},
			})
		}
	}
	for _, climb := range []string{"%2e%2e", "%2e%2e%2fcontrol.db", "a%2fb"} {
		table = append(table, bad{"key " + climb, "DELETE", "/v1/api-keys/" + climb, "", "", 400, []string{"key name", "must match"}})
	}
	return append(table,
		bad{"plain dots in a path", "GET", "/v1/sandboxes/../../etc/passwd", "", "", 404, []string{"there is nothing at"}},
		bad{"a sandbox that never was", "GET", "/v1/sandboxes/aaaaaaaaaaaaaaaaaaaaaaaa", "", "", 404, []string{"aaaaaaaaaaaaaaaaaaaaaaaa"}},
		bad{"a key that never was", "DELETE", "/v1/api-keys/aaaa", "", "", 404, []string{"aaaa"}},
		bad{"a key's name that climbs", "POST", "/v1/api-keys", `{"name":"../x"}`, "", 400, []string{"key name", "must match"}},
		bad{"a list's template that climbs", "GET", "/v1/sandboxes?template=..%2fbase", "", "", 400, []string{"template name"}},
	)
}

func badBodies(id string) []bad {
	huge := `{"template":"base","metadata":{"x":"` + strings.Repeat("y", api.MaxBodyBytes) + `"}}`
	return []bad{
		{"a body over the limit", "POST", "/v1/sandboxes", huge, "", 413, []string{"1048576 bytes"}},
		{"an exec body over the limit", "POST", "/v1/sandboxes/" + id + "/exec", `{"shell":"true","stdin":"` + strings.Repeat("y", api.MaxBodyBytes) + `"}`, "", 413, []string{"1048576 bytes"}},
		{"not JSON", "POST", "/v1/sandboxes", `{"template":base}`, "", 400, []string{"not JSON", "at byte"}},
		{"JSON that ends early", "POST", "/v1/sandboxes", `{"template":"base"`, "", 400, []string{"ends early"}},
		{"JSON and more", "POST", "/v1/sandboxes", `{"template":"base"}{}`, "", 400, []string{"behind its JSON"}},
		{"an array", "POST", "/v1/sandboxes", `[]`, "", 400, []string{"array"}},
		{"null", "POST", "/v1/sandboxes", `null`, "", 400, []string{"null"}},
		{"no body", "POST", "/v1/sandboxes", ``, "", 400, []string{"empty"}},
		{"not UTF-8", "POST", "/v1/sandboxes", "{\"template\":\"\xff\"}", "", 400, []string{"UTF-8"}},
		{"a wrong key", "GET", "/v1/sandboxes", "", "dm_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", 401, []string{"key"}},
		{"a key of another kind", "GET", "/v1/sandboxes", "", "hello", 401, []string{"key"}},
		{"no key", "POST", "/v1/sandboxes", `{"vcpus":1000}`, "none", 401, []string{"key"}},
		{"no key for the metrics", "GET", "/metrics", ``, "none", 401, []string{"key"}},
		{"a wrong method", "PATCH", "/v1/sandboxes", ``, "", 405, []string{"PATCH", "GET", "POST"}},
		{"a wrong method for a call", "GET", "/v1/sandboxes/" + id + "/exec", ``, "", 405, []string{"GET", "POST"}},
		{"an unknown route", "GET", "/v2/sandboxes", ``, "", 404, []string{"/v2/sandboxes"}},
		{"an unknown call", "POST", "/v1/sandboxes/" + id + "/dance", ``, "", 404, []string{"dance"}},
		{"an unknown query parameter", "GET", "/v1/sandboxes?sate=running", ``, "", 400, []string{"sate"}},
	}
}

func badFiles(id string) []bad {
	read := func(path string, status int, says ...string) bad {
		return bad{"read " + path, http.MethodGet, "/v1/sandboxes/" + id + "/files/read?path=" + url.QueryEscape(path), "", "", status, says}
	}
	files := "/v1/sandboxes/" + id + "/files/"
	return []bad{
		read("/etc", 400, "/etc", "directory"),
		read("/no/such/file", 404, "/no/such/file"),
		read("/dev/zero", 400, "/dev/zero", "device"),
		read("/tmp/zero-link", 400, "device"),
		read("/dev/vda", 400, "/dev/vda", "device"),
		read("/tmp/fifo", 400, "/tmp/fifo", "pipe"),
		read("/etc/passwd/x", 400, "/etc/passwd/x"),
		{"read a path of 6000 bytes", http.MethodGet, "/v1/sandboxes/" + id + "/files/read?path=" + strings.Repeat("a/", 3000), "", "", 400, []string{"6000 bytes", "4096"}},
		read("x\x00y", 400, "NUL"),
		read("", 400, "path is missing"),
		read("/proc/kmsg", 400, "/proc/kmsg", "not a regular file"),
		read("/proc/1/mem", 400, "/proc/1/mem", "not a regular file"),
		read("/sys/kernel/uevent_seqnum", 400, "/sys/kernel", "not a regular file"),
		{"read as nobody there is", "GET", files + "read?path=/etc/passwd&user=ghost", "", "", 400, []string{"ghost"}},
		{"read as a user that climbs", "GET", files + "read?path=/etc/passwd&user=..%2froot", "", "", 400, []string{"user name", "must match"}},
		{"write to a directory", "PUT", files + "write?path=/tmp/folder", "x", "", 400, []string{"/tmp/folder", "directory"}},
		{"write to a device", "PUT", files + "write?path=/dev/null", "x", "", 400, []string{"/dev/null", "device"}},
		{"write below a file", "PUT", files + "write?path=/etc/passwd/x", "x", "", 400, []string{"/etc/passwd"}},
		{"write as a user that climbs", "PUT", files + "write?path=x&user=..%2froot", "x", "", 400, []string{"user name"}},
		{"list a file", "GET", files + "list?path=/etc/passwd", "", "", 400, []string{"/etc/passwd", "directory"}},
		{"list too deep", "GET", files + "list?path=/&depth=65", "", "", 400, []string{"depth", "1 to 64"}},
		{"list a missing directory", "GET", files + "list?path=/no/such", "", "", 404, []string{"/no/such"}},
		{"stat a missing file", "GET", files + "stat?path=/no/such", "", "", 404, []string{"/no/such"}},
		{"mkdir below a file", "POST", files + "mkdir", `{"path":"/etc/passwd/x"}`, "", 400, []string{"/etc/passwd"}},
		{"mkdir without a path", "POST", files + "mkdir", `{}`, "", 400, []string{"path is missing"}},
		{"move what is not there", "POST", files + "move", `{"source":"/no/such","destination":"/tmp/y"}`, "", 404, []string{"/no/such"}},
		{"move as a user that climbs", "POST", files + "move", `{"source":"/tmp/x","destination":"/tmp/y","user":"../root"}`, "", 400, []string{"user name"}},
		{"remove everything", "POST", files + "remove", `{"path":"/"}`, "", 400, []string{"root directory"}},
	}
}

func badCalls(id, dead string) []bad {
	exec := func(name, body string, status int, says ...string) bad {
		return bad{name, http.MethodPost, "/v1/sandboxes/" + id + "/exec", body, "", status, says}
	}
	gone := []string{dead, "user"}
	return []bad{
		exec("an empty command", `{"command":[]}`, 400, "exactly one of command and shell"),
		exec("no command", `{}`, 400, "exactly one of command and shell"),
		exec("two commands", `{"command":["true"],"shell":"true"}`, 400, "exactly one of command and shell"),
		exec("a command without a name", `{"command":[""]}`, 400, "program name"),
		exec("a negative exec timeout", `{"shell":"true","timeout_seconds":-1}`, 400, "timeout_seconds is -1", "from 0"),
		exec("a NUL byte in an argument", `{"command":["echo","a\u0000b"]}`, 400, "NUL"),
		exec("an argument of 129 KiB", `{"command":["echo","`+strings.Repeat("x", 129<<10)+`"]}`, 400, "132096", "131072"),
		exec("a user that climbs", `{"shell":"true","user":"../root"}`, 400, "user name", "must match"),
		exec("a user that is not there", `{"shell":"true","user":"ghost"}`, 400, "ghost"),
		exec("a program that is not there", `{"command":["no-such-program"]}`, 400, "no-such-program"),
		exec("a program that is a directory", `{"command":["/etc"]}`, 400, "/etc"),
		exec("a directory that is not there", `{"shell":"true","cwd":"/no/such"}`, 400, "/no/such"),
		{"a negative sandbox timeout", "POST", "/v1/sandboxes/" + id + "/timeout", `{"timeout_seconds":-5}`, "", 400, []string{"timeout_seconds is -5", "from 1 to"}},
		{"logs from nowhere", "GET", "/v1/sandboxes/" + id + "/logs?offset=-1", "", "", 400, []string{"offset"}},
		{"a stream without WebSocket", "GET", "/v1/sandboxes/" + id + "/exec/stream", "", "", 400, []string{"WebSocket"}},
		{"exec in a destroyed sandbox", "POST", "/v1/sandboxes/" + dead + "/exec", `{"shell":"true"}`, "", 409, gone},
		{"read in a destroyed sandbox", "GET", "/v1/sandboxes/" + dead + "/files/read?path=/etc/passwd", "", "", 409, gone},
		{"write in a destroyed sandbox", "PUT", "/v1/sandboxes/" + dead + "/files/write?path=/tmp/x", "x", "", 409, gone},
		{"ping a destroyed sandbox", "POST", "/v1/sandboxes/" + dead + "/ping", "", "", 409, gone},
		{"metrics of a destroyed sandbox", "GET", "/v1/sandboxes/" + dead + "/metrics", "", "", 409, gone},
		{"more time for a destroyed sandbox", "POST", "/v1/sandboxes/" + dead + "/timeout", `{"timeout_seconds":60}`, "", 409, gone},
	}
}
