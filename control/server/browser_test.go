package server_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/control/server"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// browse lets a real browser load a page and returns what has become of it.
func browse(t *testing.T, url string) string {
	t.Helper()
	testkit.Tool(t, "chromium")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
		"--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
		"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE *.localhost", "--user-data-dir="+t.TempDir(),
		"--timeout=20000", "--virtual-time-budget=15000", "--dump-dom", url)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("chromium: %v\n%.2000s", err, errs.String())
	}
	return string(out)
}

// attack is what a guest's page tries with the user's cookie for another guest. It
// ends with what came of it in the page.
const attack = `<!doctype html><title>attack</title><body><script>
const victim = %q, own = %q, api = %q;
const said = {};
const tries = {
  own: () => fetch(own + "?attack=own").then(r => r.text()),
  cookies: async () => document.cookie,
  cors: () => fetch(victim + "?attack=cors", {credentials: "include"}).then(r => r.text()),
  blind: () => fetch(victim + "?attack=blind", {credentials: "include", mode: "no-cors", method: "POST"}).then(r => r.type),
  image: () => new Promise((ok, no) => { const i = new Image(); i.onload = () => ok("loaded"); i.onerror = () => no("not loaded"); i.src = victim + "?attack=image"; }),
  frame: () => new Promise((ok) => { const f = document.createElement("iframe"); f.onload = () => ok(f.contentDocument ? "readable" : "not readable"); f.src = victim + "?attack=frame"; document.body.append(f); }),
  socket: () => new Promise((ok, no) => { const s = new WebSocket(victim.replace("http", "ws") + "?attack=socket"); s.onopen = () => ok("open"); s.onerror = () => no("refused"); }),
  script: () => new Promise((ok, no) => { const s = document.createElement("script"); s.onload = () => ok("ran"); s.onerror = () => no("not loaded"); s.src = victim + "?attack=script"; document.body.append(s); }),
  api: () => fetch(api + "/v1/sandboxes", {credentials: "include"}).then(r => r.text()),
  wider: async () => { document.cookie = "wider=1; domain=localhost; path=/"; return document.cookie; },
};
(async () => {
  for (const [name, attempt] of Object.entries(tries)) {
    const late = new Promise((_, no) => setTimeout(() => no("nothing came"), 1000));
    try { said[name] = "yes: " + await Promise.race([attempt(), late]); } catch (e) { said[name] = "no: " + e; }
  }
  const pre = document.createElement("pre");
  pre.textContent = Object.entries(said).map(([k, v]) => "[" + k + "] " + v).join("\n") + "\n[end]";
  document.body.replaceChildren(pre);
})();
</script>`

// TestBrowserKeepsGuestsApart: a user has visited two sandboxes, and has a cookie
// for each. The page of one gets nothing of the other with them.
func TestBrowserKeepsGuestsApart(t *testing.T) {
	testkit.Tool(t, "chromium")
	const domain = "boxes.localhost" // to the browser everything below it is one site
	p := newPorts(t, func(c *server.Config) { c.Domain = domain })
	evil, victim := p.create(), p.create()
	links := map[string]string{}
	for _, id := range []string{evil, victim} {
		at, err := p.c.OpenPort(p.ctx(), id, api.OpenPort{Port: 8000})
		if err != nil {
			t.Fatal(err)
		}
		links[id] = at.Link
	}
	base := func(id string) string { return fmt.Sprintf("http://8000-%s.%s:%s/", id, domain, p.port()) }
	var mu sync.Mutex
	var asked []string
	p.serve(8000, func(w http.ResponseWriter, r *http.Request) {
		who, _, _ := strings.Cut(strings.TrimPrefix(r.Host, "8000-"), ".")
		mu.Lock()
		asked = append(asked, fmt.Sprint(who == victim, " ", r.URL.RawQuery, " ", r.Header.Get("Cookie")))
		mu.Unlock()
		w.Header().Set("Content-Type", "text/html")
		http.SetCookie(w, &http.Cookie{Name: "of-" + who, Value: "1", Domain: domain}) // as wide as it can be
		switch {
		case r.URL.Query().Has("attack"):
			_, _ = io.WriteString(w, "the secret of "+who)
		case who == victim: // the user goes on to the next sandbox
			_, _ = fmt.Fprintf(w, "<script>location = %q</script>", links[evil])
		default:
			_, _ = fmt.Fprintf(w, attack, base(victim), base(evil), p.http.URL)
		}
	})
	page := browse(t, links[victim])
	said := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^(?:.*<pre>)?\[(\w+)\] (.*)$`).FindAllStringSubmatch(page, -1) {
		said[m[1]] = m[2]
	}
	t.Logf("the page says:\n%v", said)
	if !strings.HasPrefix(said["own"], "yes: the secret of "+evil) {
		t.Fatalf("the page did not even get its own: the test shows nothing\n%s\n%q", page, asked)
	}
	if said["cookies"] != "yes: of-"+evil+"=1" || said["wider"] != said["cookies"] {
		t.Errorf("the page's cookies: %q, and after a wider one: %q", said["cookies"], said["wider"])
	}
	for _, name := range []string{"cors", "image", "socket", "script", "api"} {
		if !strings.HasPrefix(said[name], "no: ") {
			t.Errorf("%s: %q", name, said[name])
		}
	}
	if strings.HasPrefix(said["frame"], "yes: readable") {
		t.Errorf("frame: %q", said["frame"])
	}
	if strings.Contains(page, "the secret of "+victim) {
		t.Errorf("the page has the other's secret:\n%s", page)
	}
	mu.Lock()
	defer mu.Unlock()
	for _, a := range asked {
		if strings.HasPrefix(a, "true attack") || strings.Contains(a, "dormouse") || strings.HasPrefix(a, "true") && strings.Contains(a, "of-"+evil) {
			t.Errorf("a guest was asked: %s", a)
		}
	}
}

// TestBrowserDrawsTheDocs: the page is drawn under its own policy.
func TestBrowserDrawsTheDocs(t *testing.T) {
	testkit.Tool(t, "chromium")
	p := newPorts(t)
	page := browse(t, p.http.URL+"/docs#createSandbox")
	for _, part := range []string{`id="createSandbox"`, `id="schema-Sandbox"`, "Make a sandbox, and wait until it runs", `<details id="createSandbox"`, `open=""`} {
		if !strings.Contains(page, part) {
			t.Errorf("the page lacks %s", part)
		}
	}
	if t.Failed() {
		t.Logf("%.3000s", page)
	}
}
