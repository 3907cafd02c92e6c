package template_test

import (
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
)

var badNames = []string{
	"", ".", "..", "../images", "a/b", "/etc/passwd", ".image", "-x", "a\x00b", "a b", "a\nb",
	"0123456789012345678901234567890123456789012345678901234567890123456789",
}

func TestNamesDoNotLeaveTheFolder(t *testing.T) {
	f := newFakes(t, fakeRoot)
	cfg := config(t)
	s := open(t, cfg)
	for _, name := range badNames {
		if _, err := s.Get(name); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("get %q: %v", name, err)
		}
		r := recipe()
		r.Name = name
		if _, err := s.Build(t.Context(), r, nil); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("build %q: %v", name, err)
		}
	}
	if f.runs(t, "mmdebstrap") != 0 {
		t.Error("a tool ran for a bad name")
	}
	nothingLeft(t, cfg)
}

func TestUnknownTemplateIsNotFound(t *testing.T) {
	if _, err := open(t, config(t)).Get("nonesuch"); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("get: %v", err)
	}
}

func TestRecipesThatCouldBecomeCommands(t *testing.T) {
	s := open(t, config(t))
	for name, change := range map[string]func(*template.Recipe){
		"a suite that is an option":      func(r *template.Recipe) { r.Suite = "--hook" },
		"no suite":                       func(r *template.Recipe) { r.Suite = "" },
		"a package with a comma":         func(r *template.Recipe) { r.Packages = []string{"a,b"} },
		"a package that is an option":    func(r *template.Recipe) { r.Packages = []string{"--simulate"} },
		"a user with a command":          func(r *template.Recipe) { r.User = "a; reboot" },
		"root as the user":               func(r *template.Recipe) { r.User = "root" },
		"a mirror that is a path":        func(r *template.Recipe) { r.Mirror = "/etc/apt/sources.list" },
		"a mirror with a second line":    func(r *template.Recipe) { r.Mirror = "http://a/\ndeb http://b/" },
		"a mirror with a password":       func(r *template.Recipe) { r.Mirror = "https://user:pass@a/debian" },
		"an image below the bound":       func(r *template.Recipe) { r.ImageMiB = 1 },
		"an image above the bound":       func(r *template.Recipe) { r.ImageMiB = 1<<20 + 1 },
		"a relative working directory":   func(r *template.Recipe) { r.Workdir = "home" },
		"a variable with an equals sign": func(r *template.Recipe) { r.Env = map[string]string{"A=B": "c"} },
	} {
		r := recipe()
		change(&r)
		if _, err := s.Build(t.Context(), r, nil); !sandbox.Is(err, sandbox.KindInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOpenTwiceLeaksNothing(t *testing.T) {
	cfg := config(t)
	open(t, cfg)
	before := testkit.OpenFDs(t)
	open(t, cfg)
	if after := testkit.OpenFDs(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
