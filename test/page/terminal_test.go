package page_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"unicode"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/target"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// inFrame is the document that draws a terminal. It has a process of its own, so
// that it is a target of its own to the browser.
func (w *window) inFrame() *window {
	w.t.Helper()
	var found target.ID
	if !testkit.Poll(w.limit, func() bool {
		infos, err := chromedp.Targets(w.ctx)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, info := range infos {
			if info.Type == "iframe" && strings.HasPrefix(info.URL, w.url+"/test/terminal.html") {
				found = info.TargetID
			}
		}
		return found != ""
	}) {
		w.t.Fatal("the browser has no frame of a terminal")
	}
	ctx, cancel := chromedp.NewContext(w.ctx, chromedp.WithTargetID(found))
	w.t.Cleanup(cancel)
	f := &window{t: w.t, ctx: ctx, url: w.url, key: w.key, limit: w.limit}
	if err := chromedp.Listen(ctx, f.listen); err != nil {
		w.t.Fatal(err)
	}
	f.run(enable)
	w.t.Cleanup(f.check)
	return f
}

// shown is what stands in the terminal, without its blanks: lines may be wrapped.
const shown = `(document.querySelector(".xterm-rows")?.textContent ?? "").replaceAll("\u00a0", " ")`

func (w *window) showsInTerminal(part string) {
	w.t.Helper()
	w.wantsJS(fmt.Sprintf(`%s.includes(%q)`, shown, part))
}

// openTerminal runs a command in a terminal; empty is the login shell.
func (w *window) openTerminal(command string) *window {
	w.t.Helper()
	w.tab("terminal")
	if command != "" {
		w.fill(view+".panel:not([hidden]) form input", command)
	}
	w.click(view + ".panel:not([hidden]) button[type=submit]")
	return w.inFrame()
}

// TestTerminal: what is typed goes in, what is shown comes out, the size follows,
// and the keyboard finds the way back to the page.
func TestTerminal(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	w.enter()
	w.create()
	frame := w.openTerminal("cat")
	w.wants(view+".panel:not([hidden]) [role=status]", "Ctrl+Enter leaves the terminal")
	w.types("good morning\r")
	frame.showsInTerminal("good morning")
	w.run(chromedp.KeyEvent("\r", chromedp.KeyModifiers(2))) // Ctrl
	w.wantsJS(`document.activeElement?.textContent === "Close"`)
	w.press("\r")
	w.wants(view+".panel:not([hidden]) [role=status]", "Closed.")
	frame.showsInTerminal("Closed.")
	testkit.Eventually(t, limit, "killed", func() bool { return f.host.Processes() == 0 })

	w.fill(view+".panel:not([hidden]) form input", "size")
	w.press("\r")
	w.wants(view+".panel:not([hidden]) [role=status]", "Ctrl+Enter")
	frame = w.inFrame()
	size := `(` + shown + `.match(/(\d+)x(\d+)/g) ?? []).map((s) => Number(s.split("x")[0]))`
	frame.wantsJS(size + `.length === 1`)
	before := js[[]int](frame, size)[0]
	w.run(chromedp.EmulateViewport(390, 844))
	w.run(chromedp.ScrollIntoView(view + ".panel:not([hidden]) iframe")) // what is out of sight a browser may leave as it is
	frame.wantsJS(fmt.Sprintf(`%s.at(-1) < %d`, size, before))
	w.run(chromedp.EmulateViewport(1440, 900))
	frame.wantsJS(fmt.Sprintf(`%s.at(-1) === %d`, size, before))

	other := w.create() // it goes on while another sandbox is looked at
	w.wants(view, other[:8])
	if f.host.Processes() != 1 {
		t.Error("the terminal of the other sandbox has ended")
	}
	w.click("#forget")
	testkit.Eventually(t, limit, "ended with the key", func() bool { return f.host.Processes() == 0 })
}

// TestTerminalErrors: a command that cannot be started, one that ends, output that
// is faster than the screen.
func TestTerminalErrors(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	w.enter()
	w.create()
	w.tab("terminal")
	status := view + ".panel:not([hidden]) [role=status]"
	for _, row := range []struct{ command, want string }{
		{"nosuch", "Start command: /bin/sh: not found."}, {"exit 4", "The command has ended: exit status 4."}, {"spew 60000000", "The command has ended: exit status 0."},
	} {
		w.fill(view+".panel:not([hidden]) form input", row.command)
		w.press("\r")
		w.wants(status, row.want)
	}
}

// TestTerminalIsApart: what draws a terminal has another origin, no key, no network,
// and no way into the page, even with a script of its own.
func TestTerminalIsApart(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	w.enter()
	w.create()
	frame := w.openTerminal("cat")
	for _, row := range []struct{ attempt, want string }{
		{`self.origin`, "null"},
		{`parent.document.title`, "SecurityError"},
		{`sessionStorage.length`, "SecurityError"},
		{`document.cookie`, "SecurityError"},
		{`fetch("/v1/sandboxes").then((r) => "answered " + r.status)`, "Failed to fetch"},
		{`fetch("/healthz").then((r) => "answered " + r.status)`, "Failed to fetch"},
		{`new Promise((ok) => { const s = new WebSocket("ws://" + location.host + "/v1/sandboxes/x/pty"); s.onerror = () => ok("refused"); s.onopen = () => ok("open"); })`, "refused"},
		{`new Promise((ok) => { const i = new Image(); i.onerror = () => ok("refused"); i.onload = () => ok("loaded"); i.src = "/test/icon.svg"; })`, "refused"},
		{`new Promise((ok) => { self.ran = "no"; const s = document.createElement("script"); s.textContent = "self.ran = 'yes'"; document.body.append(s); ok("ran " + self.ran); })`, "ran no"},
		{`new Promise((ok) => ok(String(window.open("/test"))))`, "null"},
	} {
		got := js[string](frame, `(async () => { try { return String(await (`+row.attempt+`)) } catch (e) { return e.name + ": " + e.message } })()`)
		if !strings.Contains(got, row.want) {
			t.Errorf("%s: %s, want %s", row.attempt, got, row.want)
		}
	}
	frame.wrong = nil // the policy has said what it refused
	if got := js[string](w, `(() => { try { return document.querySelector("iframe").contentDocument ? "readable" : "apart" } catch { return "apart" } })()`); got != "apart" {
		t.Errorf("the frame is %s", got)
	}
}

// types sends keys as a keyboard does: a character comes only of a key whose press
// nobody has taken. chromedp's KeyEvent sends it in any case.
func (w *window) types(text string) {
	w.t.Helper()
	w.run(chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		for _, r := range text {
			down := *kb.Encode(r)[0]
			if unicode.IsPrint(r) || r == '\r' {
				down.Text = string(r)
			}
			up := down
			up.Type, up.Text = input.DispatchKeyEventTypeKeyUp, ""
			for _, event := range []input.DispatchKeyEventParams{down, up} {
				if _, err := cdp.Call(ctx, t, input.DispatchKeyEvent, event); err != nil {
					return err
				}
			}
		}
		return nil
	}))
}
