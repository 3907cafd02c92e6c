package page_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp/kb"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// TestPauseAndResume: with the phases of both, what is under way, and an error.
func TestPauseAndResume(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	w.enter()
	id := w.create()
	f.slowly(3*time.Second, "PauseSandbox.save", "ResumeSandbox.restore")
	w.act("pause")
	w.wants(view+".busy", "Pausing…")
	w.wants("#boxes", "pausing")
	w.wants("#activity .under-way", "pause "+id[:8])
	w.wantsJS(`[...document.querySelectorAll(".view [data-act]")].every((b) => b.disabled)`)
	w.wants(view+".head .badge", "paused")
	w.wants(view+".last", "Where the time of the pause went")
	for _, phase := range sandbox.SavePhases() {
		if phase != sandbox.PhaseCopy && phase != sandbox.PhaseThaw {
			w.wants(view+".last", strings.ReplaceAll(string(phase), "_", " "))
		}
	}
	w.wants(view+".last", "300 of 500 touched pages of memory")
	w.wants("#activity .log", "publish 5.0 ms")
	w.wants(view+".panel:not([hidden])", "generation 1")
	w.act("resume")
	w.wants(view+".busy", "Resuming…")
	w.wants(view+".head .badge", "running")

	f.slowly(0)
	f.host.Refuse(errors.New("the disk is slow today"))
	w.act("pause")
	w.wants(view+".message", "its log has it under request") // the inside of an error stays on the server
	w.wants(view+".head .badge", "running")
	f.host.Refuse(sandbox.Errorf(sandbox.KindNoSpace, "the disk of the host is full"))
	w.act("pause")
	w.wants(view+".message", "he disk of the host is full")
	f.host.Refuse(nil)

	w.act("pause")
	w.wants(view+".head .badge", "paused")
	w.tab("run")
	w.wants(view, "It is paused: a command resumes it.")
	w.tab("files")
	w.wants(view+".panel:not([hidden]) [role=status]", "It is paused: “Go” resumes it")
	w.wants(view+".head .badge", "paused") // looking has not resumed it
	w.tab("run")
	w.exec("echo awake")
	w.wants(view+".output", "awake")
	w.wants(view+".head .badge", "running")
}

// TestFork: one copy is chosen; of several that fail it is said how many, and why.
func TestFork(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	w.enter()
	id := w.create()
	w.act("fork")
	w.fill("dialog input", "many")
	w.press("\r")
	w.wants("dialog .message", "the number of copies is “many”, which is not a number")
	w.fill("dialog input", "1")
	w.press("\r")
	w.wants(view+".head + p", "a fork of "+id[:8])
	w.wantsJS(`document.querySelectorAll(".pick").length === 2`)

	w.act("fork")
	w.fill("dialog input", "3")
	w.press("\r")
	w.wantsJS(`document.querySelectorAll(".pick").length === 5`)
	w.wants(view+".last", "Where the time of the fork went")
	w.wants(view+".last", "The guest stood still for 20 ms")

	w.act("fork")
	w.fill("dialog input", "101")
	w.press("\r")
	w.wants(view+".message", "The number of copies is 101, must be from 1 to 100")
	w.act("fork")
	w.press(kb.Escape)
	w.wantsJS(`document.querySelector("dialog") === null`)
}

// TestSnapshots: create, list, use, the tree, delete, and why not.
func TestSnapshots(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	w.enter()
	w.fill("#vcpus", "2")
	w.fill("#memory", "1024")
	first := w.create()
	w.act("snapshot")
	w.press("<b>x</b>\r")
	w.wants(view+".message", "<b>x</b>")
	w.act("snapshot")
	w.press("one\r")
	w.wants("#snapshots", "one")
	w.wants(view+".last", "Where the time of the snapshot went")
	w.wants("#snapshots tbody", "2 vCPUs · 1 GiB · 4 GiB")
	w.wants("#snapshots tbody", "2 MiB of 48 MiB")
	w.wants("#snapshots tbody", "of "+first[:8])
	w.act("snapshot")
	w.press("two\r")
	w.wants("#snapshots tbody", "two")
	w.wants("#snapshots tbody", "after one")
	w.wants("#tree", "template base")
	w.wantsJS(`[...document.querySelectorAll(".tree li.snapshot li.snapshot")].some((e) => e.textContent.includes("two"))`)
	w.act("snapshot")
	w.press("one\r")
	w.wants(view+".message", "one")

	w.click(`[data-name="one"] [data-act=use]`)
	w.wants("#create [role=status]", "It goes on where the snapshot was taken, with 2 vCPUs · 1 GiB.")
	if !js[bool](w, `document.querySelector("#memory").disabled && document.activeElement.id === "create-button"`) {
		t.Error("the shape is not locked, or the button has no focus")
	}
	second := w.create()
	s, err := f.c.Get(f.ctx(), second)
	if err != nil || s.Template != "one" || s.VCPUs != 2 || s.MemMiB != 1024 {
		t.Errorf("it is %+v, %v", s, err)
	}
	w.wants("#tree .runs", second[:8])

	for _, key := range []string{kb.Escape, "\r"} { // Cancel has the focus
		w.click(`[data-name="one"] [data-act=delete]`)
		w.wants("dialog", "Delete this snapshot?")
		w.press(key)
		w.wantsJS(`document.querySelector("dialog") === null`)
	}
	w.click(`[data-name="one"] [data-act=delete]`)
	w.press(kb.Tab + "\r")
	w.wants("#snapshots > .message", "one")
	if _, err := f.c.Snapshot(f.ctx(), "one"); err != nil {
		t.Error("what something depends on is gone:", err)
	}
	w.click(`[data-name="two"] [data-act=delete]`)
	w.press(kb.Tab + "\r")
	w.wantsJS(`document.querySelector('[data-name="two"]') === null`)
	w.wantsJS(`!document.querySelector(".tree").textContent.includes("two")`)
}

// TestPorts: the link is one to another origin.
func TestPorts(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	w.enter()
	id := w.create()
	w.tab("ports")
	w.click(view + ".panel:not([hidden]) button[type=submit]")
	w.wants(view+".panel:not([hidden])", "Open port 8000 in a new tab, an origin of its own: http://8000-"+id+".localhost")
	if !js[bool](w, `(() => { const a = document.querySelector(".view .panel:not([hidden]) a"); return new URL(a.href).origin !== location.origin && a.rel === "noopener noreferrer" && a.target === "_blank" })()`) {
		t.Error("the link is not to another origin")
	}
	w.fill(view+".panel:not([hidden]) input", "0")
	w.press("\r")
	w.wants(view+".panel:not([hidden]) .message", "Port is 0, must be from 1 to 65535.")
}

// TestByKeyboard: a whole visit without a mouse.
func TestByKeyboard(t *testing.T) {
	f := newFake(t, nil)
	w := newWindow(t, f.url, f.key)
	w.wantsJS(`document.activeElement?.id === "key"`)
	w.press(f.key + "\r")
	w.wantsJS(`document.activeElement?.id === "template" && document.activeElement.options.length > 0`)
	w.press(kb.Tab + "3" + kb.Tab + kb.Tab + kb.Tab)
	w.wantsJS(`document.activeElement?.id === "create-button"`)
	w.press("\r")
	w.wants(view+".head .badge", "running")
	w.wants(view, "3 vCPUs")
	w.press(kb.Tab) // to the list
	w.wantsJS(`document.activeElement?.className === "pick"`)
	w.press("\r" + kb.Tab + kb.Tab) // past the box, to its verbs
	w.wantsJS(`document.activeElement?.dataset.act === "pause"`)
	w.press("\r")
	w.wants(view+".head .badge", "paused")
	w.wantsJS(`document.querySelector(".view [data-act=resume]").disabled === false`)
	w.do(`document.querySelector(".view [data-act=resume]").focus()`)
	w.press(kb.Tab + kb.Tab + kb.Tab + kb.Tab)
	w.wantsJS(`document.activeElement?.dataset.tab === "run"`)
	w.press(kb.ArrowRight + kb.ArrowRight)
	w.wantsJS(`document.activeElement?.dataset.tab === "files" && document.activeElement.getAttribute("aria-selected") === "true"`)
	w.press(kb.End + kb.ArrowRight + kb.Tab)
	w.wantsJS(`document.activeElement?.matches(".view .panel form input")`)
	w.press("echo typed\r")
	w.wants(view+".output", "typed")
	w.press(kb.ArrowUp)
	w.wantsJS(`document.activeElement.value === "echo typed"`)
	w.wantsJS(`[...document.querySelectorAll("button, input, select, iframe, [tabindex='0']")].every((e) => e.checkVisibility() === false || e.matches(":disabled") || (e.labels?.length || e.getAttribute("aria-label") || e.title || e.textContent.trim()))`)
}

// TestServerGone: what is said while the server does not answer, and after.
func TestServerGone(t *testing.T) {
	var down gate
	f := newFake(t, down.over)
	w := newWindow(t, f.url, f.key)
	w.enter()
	f.create(api.CreateSandbox{})
	down.set(true)
	w.wants("#trouble", "The list is not up to date")
	w.click("#create-button")
	w.wants("#create .message", "he server")
	down.set(false)
	w.wantsJS(`document.querySelector("#trouble").hidden`)
}
