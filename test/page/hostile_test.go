package page_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
)

// attacks are what a sandbox prints and names. Each would set owned if it ran.
var attacks = []string{
	`<img src=x onerror="window.owned=1">`,
	`<script>window.owned=1</script>`,
	`"><svg onload=window.owned=1>`,
	`javascript:window.owned=1`,
	"\u202ereversed\u2066",
	`</pre></section><iframe srcdoc="<script>parent.owned=1</script>"></iframe>`,
}

// hostileServer answers with names that the real one refuses, or that a host in
// the hands of somebody else might send.
func hostileServer(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := strings.Repeat("a", 24)
		now := time.Now()
		saved := &api.Saved{At: now, Generation: 1, MemoryBytes: 1 << 20, DiskBytes: 1 << 20, OwnBytes: 1 << 20}
		var answer any
		switch path := r.URL.Path; {
		case path == "/v1/sandboxes" && r.Method == http.MethodGet:
			answer = api.SandboxList{Sandboxes: []api.Sandbox{{
				ID: id, State: "failed", Template: attacks[0], VCPUs: 1, MemMiB: 1, DiskMiB: 1, CreatedAt: now, EndedAt: &now,
				Cause: attacks[1], CauseDetail: attacks[2], AutoPauseError: attacks[5], Saved: saved,
			}}}
		case path == "/v1/sandboxes" && r.Method == http.MethodPost:
			w.WriteHeader(http.StatusBadRequest)
			answer = api.Error{Error: api.ErrorDetail{Code: attacks[1], Message: strings.Join(attacks, " ")}}
		case path == "/v1/snapshots":
			var list api.SnapshotList
			for _, name := range attacks {
				list.Snapshots = append(list.Snapshots, api.Snapshot{Name: name, State: "ready", Template: name, Parent: name, SandboxID: attacks[0], CreatedAt: now, Saved: saved})
			}
			answer = list
		case strings.HasSuffix(path, "/tree") && strings.HasPrefix(path, "/v1/snapshots/"):
			var tree api.SnapshotTree
			for i, name := range attacks {
				tree.Nodes = append(tree.Nodes, api.SnapshotNode{Digest: fmt.Sprint(name, i), Kind: []string{"snapshot", "template", name}[i%3], Name: name, SandboxID: name, Running: []string{name}})
			}
			answer = tree
		case path == "/v1/templates":
			answer = api.TemplateList{Templates: []api.Template{{Name: attacks[0]}, {Name: attacks[1]}}}
		default:
			next.ServeHTTP(w, r)
			return
		}
		_ = json.NewEncoder(w).Encode(answer) // a recorder of a test
	})
}

// wantsUnharmed checks that nothing ran, and that the attacks are there as text.
func (w *window) wantsUnharmed(selector string, want ...string) {
	w.t.Helper()
	for _, part := range want {
		w.wants(selector, part)
	}
	time.Sleep(200 * time.Millisecond) // for what would run a little later
	if got := js[string](w, `String(window.owned) + document.querySelectorAll("main img, main script, main svg, iframe[srcdoc]").length`); got != "undefined0" {
		w.t.Errorf("something of it has become markup, or ran: %s", got)
	}
}

// TestHostileNames: what the API says of a sandbox is text, whatever it is.
func TestHostileNames(t *testing.T) {
	f := newFake(t, hostileServer)
	w := newWindow(t, f.url, f.key)
	w.enter()
	w.wantsUnharmed("#boxes", attacks[0], "failed ("+attacks[1]+")")
	w.wantsUnharmed("#snapshots tbody", attacks[0], attacks[1], attacks[2], attacks[3], `\u{202e}reversed\u{2066}`, attacks[5])
	w.wantsUnharmed("#tree", attacks[0], attacks[1], attacks[3], `runs: \u{202e}revers`)
	w.click(".pick")
	w.tab("details")
	w.wantsUnharmed(view, attacks[0], attacks[1]+": "+attacks[2], attacks[5])
	w.click("#create-button")
	w.wantsUnharmed("#create .message", attacks[0], attacks[5])
	w.wantsUnharmed("#activity .log", attacks[0], attacks[5])
	w.click("tbody tr:first-child [data-act=delete]")
	w.wantsUnharmed("dialog", attacks[0])
}

// TestHostileGuest: neither can what a sandbox prints, nor what its files are called.
func TestHostileGuest(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	w.enter()
	id := w.create()
	for _, name := range attacks {
		if _, err := f.c.WriteFile(f.ctx(), id, "/evil/"+strings.ReplaceAll(name, "/", "∕"), "", strings.NewReader(attacks[0])); err != nil {
			t.Fatal(err)
		}
	}
	w.tab("run")
	for _, text := range attacks {
		w.exec("echo " + text)
		w.exec("warn " + text)
	}
	w.wantsUnharmed(view+".output", attacks[0], attacks[1], attacks[2], attacks[3], attacks[5])

	w.tab("files")
	w.fill(view+".panel:not([hidden]) form input", "/evil")
	w.press("\r")
	w.wantsUnharmed(view+".files", attacks[0], attacks[3], `\u{202e}reversed\u{2066}`)
	w.do(`[...document.querySelectorAll(".view .files li")].find((e) => e.textContent.includes("onerror")).querySelector("button").click()`)
	w.wantsUnharmed(view+".panel:not([hidden]) [role=status]", attacks[0]+" is downloaded")

	frame := w.openTerminal("echo " + attacks[0] + " \x1b]8;;javascript:parent.owned=1\x07link\x1b]8;;\x07 \x1b]0;" + attacks[1] + "\x07")
	frame.showsInTerminal(attacks[0])
	if got := js[string](frame, `String(window.owned) + document.querySelectorAll("img, .xterm-rows script").length`); got != "undefined0" {
		t.Errorf("in the terminal: %s", got)
	}
	w.wantsUnharmed(view)
}
