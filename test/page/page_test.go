package page_test

import (
	"strings"
	"testing"

	"github.com/chromedp/chromedp/kb"

	"github.com/dormouse-sandbox/dormouse/api"
)

// TestKey: what the page does with a key.
func TestKey(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	w.wants("#door", "Your API key")
	w.press("\r")
	w.wants("#key-error", "Type or paste your key first.")
	w.fill("#key", "dm_wrong")
	w.press("\r")
	w.wants("#key-error", "key")
	w.fill("#key", "not a key")
	w.press("\r")
	w.wants("#key-error", "That is no key")
	w.enter()
	w.wants("#host", "software emulation: no security boundary")

	for _, where := range []string{"location.href", "document.documentElement.outerHTML", "JSON.stringify({...localStorage})", "document.cookie", "document.querySelector('#key').value"} {
		if strings.Contains(js[string](w, where), f.key) {
			t.Errorf("the key is in %s", where)
		}
	}
	w.open()
	w.wants("#room", "New sandbox") // it is kept while the tab is there
	w.click("#forget")
	w.wants("#door", "Your API key")
	if js[int](w, "sessionStorage.length") != 0 || js[int](w, `document.querySelectorAll(".log li").length`) != 0 {
		t.Error("something is left after the key was forgotten")
	}
	w.open()
	w.wants("#door", "Your API key")
}

// TestRevokedKey: a key that ends while the page is open.
func TestRevokedKey(t *testing.T) {
	f := newFake(t, nil)
	made, err := f.c.CreateKey(f.ctx(), "visitor")
	if err != nil {
		t.Fatal(err)
	}
	w := newWindow(t, f.url, made.Secret)
	w.enter()
	if err := f.c.DeleteKey(f.ctx(), made.ID); err != nil {
		t.Fatal(err)
	}
	w.wants("#door", "Your API key")
	w.wants("#key-error", "key")
}

// TestLife: create, exec, destroy, and what the log says of it.
func TestLife(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	w.enter()
	w.fill("#vcpus", "2")
	w.fill("#memory", "256")
	w.fill("#timeout", "30")
	id := w.create()
	s, err := f.c.Get(f.ctx(), id)
	if err != nil {
		t.Fatal(err)
	}
	if s.VCPUs != 2 || s.MemMiB != 256 || s.TimeoutSeconds != 1800 || s.Template != "base" {
		t.Errorf("it has %+v", s)
	}
	w.wants("#boxes", "ends in 30 min")

	w.tab("run")
	w.exec("echo forty two")
	w.wants(view+".output", "forty two\n[exit status 0]")
	w.exec("warn of something")
	w.wantsJS(`document.querySelector(".output .stderr")?.textContent === "of something\n"`)
	w.exec("exit 3")
	w.wants(view+".output", "[exit status 3]")
	w.exec("nosuch")
	w.wants(view+".output", "not found")
	w.exec("sleep")
	w.wants(view+".panel:not([hidden]) [role=status]", "Runs…")
	w.wantsJS(`[...document.querySelectorAll(".under-way .what")].some((e) => e.textContent.startsWith("exec in "))`)
	w.click(view + "form.together button[type=button]:not([hidden])")
	w.wants(view+".output", "[signal: killed]")
	w.press(kb.Shift) // nothing: the field keeps the focus
	w.exec("spew 3000000")
	w.wants(view+".output", "[exit status 0]")
	if n := js[int](w, `document.querySelector(".output").textContent.length`); n > 1_000_000 {
		t.Errorf("the page keeps %d characters of output", n)
	}

	w.act("destroy")
	w.press(kb.Escape)
	w.wantsJS(`document.querySelector("dialog") === null`)
	if s, err = f.c.Get(f.ctx(), id); err != nil || s.State != "running" {
		t.Errorf("after Esc it is %s, %v", s.State, err)
	}
	w.act("destroy")
	w.press(kb.Tab + "\r")
	w.wants(view, "It has ended")
	w.click("#ended")
	w.wants("#boxes", "gone (user)")
	for _, what := range []string{"create from base", "exec in " + id[:8], "destroy " + id[:8], "exit status 3"} {
		w.wants("#activity .log", what)
	}
	w.wantsJS(`[...document.querySelectorAll(".entry .took")].every((e) => /^[0-9.]+ (ms|s)$/.test(e.textContent))`)
}

func (w *window) exec(line string) {
	w.t.Helper()
	w.wantsJS(`document.querySelector(".view:not([hidden]) form.together button[type=submit]").hidden === false`)
	w.fill(view+"form.together input", line)
	w.press("\r")
}

// TestErrors: what the API refuses is said in its words, where it was asked.
func TestErrors(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	w.enter()
	for _, row := range []struct{ field, text, want string }{
		{"#vcpus", "33", "vCPUs is 33, must be from 1 to 32."},
		{"#vcpus", "many", "vCPUs is “many”, which is not a number"},
		{"#memory", "5", "Memory is 5, must be from 128 to 65536 MiB."},
		{"#timeout", "99999999", "The timeout in seconds is"},
	} {
		w.fill(row.field, row.text)
		w.click("#create-button")
		w.wants("#create .message", row.want)
		w.do(`for (const id of ["vcpus", "memory", "timeout"]) document.getElementById(id).value = ""`)
	}
	f.host.SetMemory(1024, 1024)
	w.click("#create-button")
	w.wants("#create .message", "Memory is 512, but 1024 of the host's 1024 MiB are promised")
	w.wants("#activity .log", "create from base")
	if n := js[int](w, `document.querySelectorAll(".entry.bad .detail").length`); n < 3 {
		t.Errorf("%d errors are in the log", n)
	}
}

// TestSeesWhatOthersDo: states come without anything being pressed.
func TestSeesWhatOthersDo(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	w.enter()
	w.wants("#boxes", "None yet.")
	id := f.create(api.CreateSandbox{})
	w.wants("#boxes", id[:8])
	if _, err := f.c.Pause(f.ctx(), id); err != nil {
		t.Fatal(err)
	}
	w.wants("#boxes", "paused")
	if _, err := f.c.Delete(f.ctx(), id); err != nil {
		t.Fatal(err)
	}
	w.wants("#boxes", "None yet.")
}
