package e2e_test

import (
	"strings"
	"testing"
	"time"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// needArchive spares a lab, which has no network, what fetches packages.
func needArchive(t *testing.T) {
	t.Helper()
	testkit.Require(t, "network", !testkit.InLab(), "a lab has none")
}

// TestTemplateFromPackages: a list of Debian packages becomes a template, and its
// log stays readable.
func TestTemplateFromPackages(t *testing.T) {
	needArchive(t)
	w := shared(t)
	log := w.buildTemplate(api.BuildTemplate{Name: "e2e-packages", Packages: []string{"jq"}}, nil)
	got, err := w.Client.Template(within(t, time.Minute), "e2e-packages")
	if err != nil || got.DefaultUser != "user" || len(got.Start) > 0 || got.Healthcheck != nil {
		t.Errorf("%+v, %v", got, err)
	}
	kept, err := w.Client.TemplateLog(within(t, time.Minute), "e2e-packages")
	if err != nil || !strings.HasPrefix(kept, "install packages\n") || !strings.Contains(kept, "make image\n") || strings.Contains(log+kept, "/work/build-") {
		t.Errorf("log: %q, %v", kept, err)
	}
	req := small()
	req.Template = "e2e-packages"
	box := w.create(req)
	if out := w.sh(box.ID, `id -un; sudo id -un; echo '{"a":42}' | jq .a`); out != "user\nroot\n42" {
		t.Errorf("inside: %q", out)
	}
	if out := w.cli(0, "", "template", "log", "e2e-packages"); !strings.HasPrefix(out, "install packages\n") || !strings.Contains(out, "make image\n") {
		t.Errorf("on the command line: %q", out)
	}
}

// TestPackagesThatAreNotThere: the error says which, and nothing is left.
func TestPackagesThatAreNotThere(t *testing.T) {
	testkit.Long(t, "two builds that fail after apt-get update")
	needArchive(t)
	w := shared(t)
	for says, req := range map[string]api.BuildTemplate{
		"Unable to locate package nosuchthing":              {Packages: []string{"nosuchthing"}},
		"nosuchsuite Release' does not have a Release file": {Suite: "nosuchsuite", Packages: []string{"jq"}},
	} {
		req.Name = "e2e-wrong"
		_, err := w.Client.BuildTemplate(within(t, 10*time.Minute), req, nil, nil)
		if !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "/work/build-") {
			t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
		}
		if _, err := w.Client.Template(within(t, time.Minute), "e2e-wrong"); !sandbox.Is(err, sandbox.KindNotFound) {
			t.Errorf("it is there: %v", err)
		}
	}
}
