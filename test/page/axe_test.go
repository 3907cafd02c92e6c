package page_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chromedp/chromedp/kb"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

// axeVersion is of axe-core at npm.
const axeVersion = "4.14.1"

// axe fetches axe-core. What npm says is the reason for a skip: a registry that
// cannot be reached is not our failure.
func axe(t *testing.T) string {
	t.Helper()
	testkit.Long(t, "it installs axe-core with npm")
	testkit.Tool(t, "npm")
	dir := t.TempDir()
	out, err := exec.CommandContext(t.Context(), "npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", dir, "axe-core@"+axeVersion).CombinedOutput()
	testkit.Require(t, "npm-registry", err == nil, string(out))
	source, err := os.ReadFile(filepath.Join(dir, "node_modules", "axe-core", "axe.min.js"))
	if err != nil {
		t.Fatal(err)
	}
	return string(source)
}

// finding is one rule that elements break.
type finding struct {
	ID, Impact, Help string
	Nodes            []struct {
		Target         []any
		FailureSummary string
	}
}

// wantsAccessible lets axe-core look at the page as it is.
func (w *window) wantsAccessible(what string) {
	w.t.Helper()
	text := js[string](w, `axe.run(document, {iframes: false, resultTypes: ["violations"]}).then((r) => JSON.stringify({rules: r.passes.length, found: r.violations}))`)
	var result struct {
		Rules int
		Found []finding
	}
	if err := json.Unmarshal([]byte(text), &result); err != nil || result.Rules < 15 {
		w.t.Fatalf("axe-core has looked at %d rules, %v: %.300s", result.Rules, err, text)
	}
	for _, f := range result.Found {
		var where []string
		for _, n := range f.Nodes {
			where = append(where, fmt.Sprint(n.Target, " ", n.FailureSummary))
		}
		text := fmt.Sprintf("%s: %s (%s): %s\n%s", what, f.ID, f.Impact, f.Help, strings.Join(where, "\n"))
		if f.Impact == "serious" || f.Impact == "critical" {
			w.t.Error(text)
		} else {
			w.t.Log(text)
		}
	}
}

// TestAccessible: axe-core finds nothing serious in any state of the page.
func TestAccessible(t *testing.T) {
	source := axe(t)
	f := newFake(t, nil)
	for _, l := range looks {
		t.Run(l.name, func(t *testing.T) {
			w := newWindow(t, f.url, f.key)
			w.as(l)
			w.do(source)
			w.press("\r")
			w.wants("#key-error", "key")
			w.wantsAccessible("the door")
			w.enter()
			w.wantsAccessible("nothing yet")
			w.create()
			w.tab("run")
			w.exec("echo this")
			w.exec("warn that")
			w.exec("exit 1")
			w.wants(view+".output", "exit status 1]")
			w.act("snapshot")
			w.wantsAccessible("a dialog")
			w.press("of-" + l.name + "\r")
			w.wants("#tree", "of-"+l.name)
			w.fill("#vcpus", "99")
			w.click("#create-button")
			w.wants("#create .message", "99")
			w.do(`document.getElementById("vcpus").value = ""`)
			w.wantsAccessible("a command, a snapshot, an error")
			w.tab("files")
			w.wants(view+".panel:not([hidden]) [role=status]", "Nothing is here.")
			w.wantsAccessible("files")
			w.tab("ports")
			w.click(view + ".panel:not([hidden]) button[type=submit]")
			w.wants(view+".panel:not([hidden])", "Open port 8000")
			w.wantsAccessible("ports")
			w.tab("terminal")
			w.openTerminal("cat")
			w.wantsAccessible("a terminal")
			w.tab("details")
			w.act("pause")
			w.wants(view+".head .badge", "paused")
			w.wantsAccessible("paused")
			w.act("destroy")
			w.wantsAccessible("a question")
			w.press(kb.Tab + "\r")
			w.wants(view, "It has ended")
			w.click("#ended")
			w.wants("#boxes", "gone (user)")
			w.wantsAccessible("ended")
			w.click("#ended")
		})
	}
}
