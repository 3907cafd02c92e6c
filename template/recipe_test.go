package template_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
		"a package that apt removes":     func(r *template.Recipe) { r.Packages = []string{"sudo-"} },
		"a package that is a path":       func(r *template.Recipe) { r.Packages = []string{"./evil.deb"} },
		"a package of another suite":     func(r *template.Recipe) { r.Packages = []string{"git/sid"} },
		"more packages than anybody has": func(r *template.Recipe) { r.Packages = make([]string, 600) },
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

// TestDebianRecipe: the packages of a list, and what an account needs.
func TestDebianRecipe(t *testing.T) {
	newFakes(t, fakeRoot)
	s := open(t, config(t))
	made := build(t, s, template.DebianRecipe("mine", "", []string{"g++", "git"}, 64))
	if made.DefaultUser != "user" || made.Env["LANG"] == "" {
		t.Errorf("template: %+v", made)
	}
	args, err := os.ReadFile(filepath.Join(filepath.Dir(mmdebstrap(t)), "mmdebstrap.runs"))
	if err != nil || !strings.Contains(string(args), "--include=bash,ca-certificates,passwd,sudo,g++,git ") || !strings.Contains(string(args), " bookworm /") {
		t.Errorf("mmdebstrap was given %s, %v", args, err)
	}
}

// mmdebstrap is the path of the fake.
func mmdebstrap(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("mmdebstrap")
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// TestWhoseFaultItIs: what apt says of a list is told to whoever made it.
func TestWhoseFaultItIs(t *testing.T) {
	for says, want := range map[string]sandbox.Kind{
		"E: Unable to locate package nosuchthing":                                   sandbox.KindInvalid,
		"E: Package 'x' has no installation candidate":                              sandbox.KindInvalid,
		"E: The repository 'http://x nosuch Release' does not have a Release file.": sandbox.KindInvalid,
		"W: Failed to fetch x Temporary failure resolving 'deb.debian.org'":         sandbox.KindTransient,
		"E: something else": sandbox.KindInternal,
	} {
		newFakes(t, `echo "in $root: `+says+`" >&2; exit 100`)
		cfg := config(t)
		_, err := open(t, cfg).Build(t.Context(), recipe(), nil)
		if !sandbox.Is(err, want) || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: error of kind %s: %v", says, sandbox.KindOf(err), err)
		}
		if want != sandbox.KindInternal && strings.Contains(err.Error(), cfg.Cache) {
			t.Errorf("our folder is in the message: %v", err)
		}
		nothingLeft(t, cfg)
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
