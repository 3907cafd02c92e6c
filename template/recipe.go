package template

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// builderVersion is part of every cache key: raise it when the same recipe
// gives another image or kernel than before.
const builderVersion = 2

// Bounds of Recipe.ImageMiB. The upper one is what the image can be grown to.
const (
	minImageMiB = 64
	maxImageMiB = 1 << 20
)

// Recipe says what goes into a base image.
type Recipe struct {
	Name string // of the template; not part of the image
	// Suite is a Debian suite, such as "bookworm". Its keys must be in
	// Config.Keyring.
	Suite string
	// Mirror is a URL of the archive. Empty means mmdebstrap's own choice, which
	// includes the suite's security updates. It stays in the image's sources.
	Mirror   string
	Packages []string // besides apt and Debian's essential packages
	// ImageMiB is the size of the file system; 0 is what fits, with some room.
	// A guest grows it online when its disk is larger, up to 1 TiB.
	ImageMiB int
	// User is made with uid 1000, bash and sudo without a password.
	User string
	// Workdir is where commands run by default; empty is the user's home.
	Workdir string
	Env     map[string]string // for every process of the sandbox
	// Revision is part of the key and nothing else: a new value builds again,
	// with the newest packages.
	Revision string
}

// DefaultSuite is the suite of recipes that name none.
const DefaultSuite = "bookworm"

// furniture is what a sandbox made of packages has besides them: an account with
// bash, and sudo for it, and the names of those who sign certificates.
var furniture = []string{"bash", "ca-certificates", "passwd", "sudo"}

// DebianRecipe is a template of packages that somebody has listed, with what the
// account of a sandbox needs. Without a suite it is DefaultSuite.
func DebianRecipe(name, suite string, packages []string, imageMiB int) Recipe {
	if suite == "" {
		suite = DefaultSuite
	}
	return Recipe{
		Name: name, Suite: suite, Packages: append(slices.Clone(furniture), packages...), ImageMiB: imageMiB,
		User: "user", Env: map[string]string{"LANG": "C.UTF-8"},
	}
}

// BaseRecipe is the default template: a small Debian with Python, git and the
// tools that people type without thinking.
func BaseRecipe() Recipe {
	return Recipe{
		Name:  "base",
		Suite: DefaultSuite,
		Packages: []string{
			"bash", "ca-certificates", "coreutils", "curl", "git", "iproute2", "iputils-ping", "less", "nano",
			"ncurses-bin", "netbase", "passwd", "procps", "python-is-python3", "python3", "python3-pip",
			"python3-venv", "sudo", "tzdata", "unzip", "xz-utils",
		},
		User: "user",
		Env:  map[string]string{"LANG": "C.UTF-8"},
	}
}

var (
	accountPattern = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
	envPattern     = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
)

// check makes sure that nothing in a recipe can become an option or a command.
func (r Recipe) check() error {
	if err := sandbox.SafeName("template", r.Name); err != nil {
		return err
	}
	if most := sandbox.MaxPackages + len(furniture); len(r.Packages) > most {
		return invalid("there are %d packages, at most %d are allowed", len(r.Packages), most)
	}
	if err := errors.Join(sandbox.CheckSuite(r.Suite), sandbox.CheckPackages(r.Packages)); err != nil {
		return err
	}
	switch {
	case !accountPattern.MatchString(r.User) || r.User == "root":
		return invalid("user %q must match %s and not be root", r.User, accountPattern)
	case r.Workdir != "" && !strings.HasPrefix(r.Workdir, "/"):
		return invalid("working directory %q must be an absolute path", r.Workdir)
	}
	for name := range r.Env {
		if !envPattern.MatchString(name) {
			return invalid("variable %q must match %s", name, envPattern)
		}
	}
	return errors.Join(checkImageMiB(r.ImageMiB), checkMirror(r.Mirror))
}

func checkMirror(mirror string) error {
	if mirror == "" {
		return nil
	}
	u, err := url.Parse(mirror)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || strings.ContainsAny(mirror, " \t\n") {
		return invalid("mirror %q must be a http or https URL", mirror)
	}
	if u.User != nil {
		return invalid("mirror must not hold credentials: they would be readable in the image")
	}
	return nil
}

func invalid(format string, args ...any) error {
	return sandbox.Errorf(sandbox.KindInvalid, "recipe: "+format, args...)
}

// key is the same for recipes that give the same image.
func (r Recipe) key() string {
	r.Name = ""
	r.Packages = slices.Compact(slices.Sorted(slices.Values(r.Packages)))
	if len(r.Env) == 0 {
		r.Env = nil
	}
	return hashOf(struct {
		Version int
		Recipe  Recipe
	}{builderVersion, r})
}

func (r Recipe) home() string { return "/home/" + r.User }

// template is what the recipe says about the template it makes.
func (r Recipe) template() Template {
	t := Template{Name: r.Name, Key: r.key(), DefaultUser: r.User, DefaultWorkdir: r.Workdir, Env: maps.Clone(r.Env)}
	if t.DefaultWorkdir == "" {
		t.DefaultWorkdir = r.home()
	}
	return t
}

// trimmed is what dpkg leaves out of every package, now and inside the sandbox.
var trimmed = []string{
	"path-exclude=/usr/share/man/*",
	"path-exclude=/usr/share/info/*",
	"path-exclude=/usr/share/doc/*",
	"path-include=/usr/share/doc/*/copyright", // licences ask for it
	"path-exclude=/usr/share/locale/*",
	"path-include=/usr/share/locale/locale.alias",
}

// mmdebstrapArgs makes a whole root file system in the folder root.
func (r Recipe) mmdebstrapArgs(root string) []string {
	args := []string{
		"--mode=root", "--format=directory", "--variant=apt", "--architectures=amd64",
		"--include=" + strings.Join(r.Packages, ","),
	}
	for _, opt := range trimmed {
		args = append(args, "--dpkgopt="+opt)
	}
	// The account's name has been checked: it needs no quotes.
	args = append(args, fmt.Sprintf(
		`--customize-hook=chroot "$1" useradd --create-home --uid 1000 --user-group --shell /bin/bash %s`, r.User))
	args = append(args, r.Suite, root)
	if r.Mirror != "" {
		args = append(args, r.Mirror)
	}
	return args
}
