package page_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp/kb"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/test/rig"
)

// common is the server of the tests with real VMs.
var common = rig.NewShared(rig.Options{})

// TestEverythingWithAVM does all that the page can with sandboxes that are real.
func TestEverythingWithAVM(t *testing.T) {
	testkit.Long(t, "it boots VMs")
	testkit.Tool(t, "chromium")
	s := common.For(t)
	w := newWindow(t, s.URL, s.Key())
	w.limit = 2 * time.Minute
	dir := t.TempDir()
	w.downloadsTo(dir)
	w.as(looks[0])
	w.shoot("key", false)
	w.enter()
	w.fill("#memory", "256")
	w.fill("#timeout", "60")
	w.click("#create-button")
	w.wants("#boxes", "creating") // it is there while it is being made
	w.wants("#activity .under-way", "create from base")
	w.shoot("creating", false)
	w.wants(view+".head .badge", "running")
	first := js[string](w, `document.querySelector(".view:not([hidden]) h2 code").textContent`)

	w.exec("uname -s; id -un; echo complaint >&2")
	w.wants(view+".output", "Linux\n")
	w.wants(view+".output", "complaint\n")
	w.exec("i=0; while [ $i -lt 3 ]; do echo tick $i; i=$((i+1)); sleep 1; done")
	w.wants(view+".output", "tick 0\n")
	if text := w.text(view + ".output"); strings.Contains(text, "tick 2\n") {
		t.Logf("the output did not come live: %q", text)
	}
	w.wants(view+".output", "tick 2\n[exit status 0]")
	w.exec("echo asleep; sleep 1000")
	w.wants(view+".panel:not([hidden]) [role=status]", "Runs…")
	w.wants(view+".output", "asleep\n") // stopped before it has begun, it would have no signal
	w.click(view + "form.together button[type=button]:not([hidden])")
	w.wants(view+".output", "[signal: terminated]")

	w.tab("files")
	panel := view + ".panel:not([hidden]) "
	w.wantsJS(`document.querySelector(".view .panel:not([hidden]) form input").value.startsWith("/")`)
	source := filepath.Join(dir, "hello.py")
	if err := os.WriteFile(source, []byte("print('hello from', __file__)\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.upload(source)
	w.wants(panel+".files", "hello.py")
	w.exec1("mkdir -p data && seq 100000 > data/numbers.txt && ln -s data/numbers.txt link && python3 hello.py", "hello from")
	w.tab("files")
	w.click(panel + "form button")
	w.wants(panel+".files", "link → /home/user/data/numbers.txt")
	w.shoot("files", false)
	w.click(panel + ".files button.directory[class]:not(:has(.unseen))")
	w.wantsJS(`document.querySelector(".view .panel:not([hidden]) form input").value === "/home/user/data"`)
	w.click(panel + ".files li:last-child button:last-child")
	if data := w.wantsFile(filepath.Join(dir, "numbers.txt")); len(data) != 588895 {
		t.Errorf("downloaded are %d bytes", len(data))
	}

	frame := w.openTerminal("")
	w.wants(view+".panel:not([hidden]) [role=status]", "Ctrl+Enter")
	w.types("echo $((6*7)) $(tty) $(stty size)\r")
	frame.showsInTerminal("42 /dev/pts/0 ")
	w.types("python3 hello.py\r")
	frame.showsInTerminal("hello from")
	w.shoot("terminal", false)

	w.act("snapshot")
	w.press("with-data\r")
	w.wants("#snapshots tbody", "with-data")
	w.wants(view+".last", "The guest stood still for")
	w.tab("run")
	w.act("pause")
	w.wants(view+".head .badge", "paused")
	for _, phase := range []string{"freeze", "device state", "compare", "publish"} {
		w.wants(view+".last", phase)
	}
	w.shoot("paused", false)
	w.act("resume")
	w.wants(view+".head .badge", "running")
	w.exec1("cat data/numbers.txt | tail -n 1", "100000")

	w.act("fork")
	w.press("\r")
	w.wants(view+".head + p", "a fork of "+first)
	w.exec1("tail -n 1 data/numbers.txt; hostname", "100000")

	w.click(`[data-name="with-data"] [data-act=use]`)
	w.click("#create-button")
	w.wants(view+".head + p", "From with-data")
	w.wants(view+".head .badge", "running")
	w.exec1("echo $(wc -l < link)", "100000")
	w.wants("#tree .runs", js[string](w, `document.querySelector(".view:not([hidden]) h2 code").textContent`))
	for _, l := range looks {
		w.as(l)
		w.do(`document.querySelector(".log").scrollTop = 0; scrollTo(0, 0)`)
		w.shoot(l.name, l.width < 500)
	}
	w.as(looks[0])

	w.click(`[data-name="with-data"] [data-act=delete]`)
	w.press(kb.Tab + "\r")
	w.wants("#snapshots > .message", "with-data")
	for n := js[int](w, `document.querySelectorAll(".pick").length`); n > 0; n-- {
		w.click(".boxes li:first-child .pick")
		w.act("destroy")
		w.press(kb.Tab + "\r")
		w.wants(view, "It has ended")
	}
	w.wants("#boxes", "None yet.")
	w.click(`[data-name="with-data"] [data-act=delete]`)
	w.press(kb.Tab + "\r")
	w.wants("#snapshots", "None yet.")
	if strings.Contains(s.Log(), s.Key()) {
		t.Error("the key is in the server's log")
	}
}

// exec1 runs a command at the tab for it, and waits for a part of its output.
func (w *window) exec1(line, want string) {
	w.t.Helper()
	w.tab("run")
	w.exec(line)
	w.wantsJS(fmt.Sprintf(`document.querySelector(".view:not([hidden]) .output").textContent.split(%q)[1]?.includes("\n[")`, "$ "+line+"\n"))
	if text := w.text(view + ".output"); !strings.Contains(text, want) || !strings.HasSuffix(strings.TrimSpace(text), "[exit status 0]") {
		w.t.Errorf("%s: %s", line, text)
	}
}
