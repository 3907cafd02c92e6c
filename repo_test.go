// Package dormouse_test holds the repository's own rules. Each is a test whose
// message says why the rule is there.
package dormouse_test

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
)

const module = "github.com/dormouse-sandbox/dormouse"

// file is one parsed Go file; path is relative to the repository, with slashes.
type file struct {
	path string
	fset *token.FileSet
	ast  *ast.File
}

func (f file) dir() string  { return filepath.ToSlash(filepath.Dir(f.path)) }
func (f file) isTest() bool { return strings.HasSuffix(f.path, "_test.go") }
func (f file) line(n ast.Node) string {
	return f.path + ":" + strconv.Itoa(f.fset.Position(n.Pos()).Line)
}

// generated folders hold code that tools wrote; rules of style are not for them.
func generated(path string) bool { return strings.Contains("/"+path+"/", "/gen/") }

// goFiles parses every Go file of the repository that a person wrote.
func goFiles(t *testing.T) []file {
	t.Helper()
	var files []file
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		path = filepath.ToSlash(path)
		if d.IsDir() {
			skip := path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata") || path == "bin" || path == "build" || generated(path)
			if skip {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		fset := token.NewFileSet()
		parsed, err := parser.ParseFile(fset, path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		files = append(files, file{path, fset, parsed})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 20 {
		t.Fatalf("found %d Go files; the walk does not see the repository", len(files))
	}
	return files
}

// imports are the packages of this module that a file imports, relative to it.
func (f file) imports() []string {
	var out []string
	for _, spec := range f.ast.Imports {
		path, err := strconv.Unquote(spec.Path.Value)
		if rest, ok := strings.CutPrefix(path, module+"/"); ok && err == nil {
			out = append(out, rest)
		}
	}
	return out
}

// below says whether a package is one of these trees or in one of them.
func below(pkg string, trees ...string) bool {
	return slices.ContainsFunc(trees, func(tree string) bool { return pkg == tree || strings.HasPrefix(pkg, tree+"/") })
}

// mayImport says, for each part of the machine, which other parts it may use.
// The first entry that fits a package counts. Tests may use more.
var mayImport = []struct {
	part   string
	others []string
	why    string
}{
	{"sandbox", nil, "the words are everybody's, so they depend on nobody"},
	{"api", []string{"sandbox"}, "the public contract is plain data"},
	{"internal", []string{"internal", "sandbox"}, "what everybody uses knows nothing of the machine"},
	{"client", []string{"api", "sandbox", "internal"}, "a client uses the public contract and nothing behind it"},
	{"web", []string{"api", "sandbox", "internal"}, "the pages are a client like any other"},
	{"host/hostapi", []string{"sandbox", "internal"}, "the contract between control and host belongs to neither"},
	{"guest/guestapi", []string{"sandbox", "internal"}, "the contract with the guest belongs to neither side"},
	{"vmm", mechanism, mechanismWhy},
	{"disk", mechanism, mechanismWhy},
	{"netns", mechanism, mechanismWhy},
	{"cgroup", mechanism, mechanismWhy},
	{"snapshot", mechanism, mechanismWhy},
	{"pager", mechanism, mechanismWhy},
	{"template", mechanism, mechanismWhy},
	{"lab", mechanism, mechanismWhy},
	{"guest", append([]string{"guest/guestapi"}, mechanism...), mechanismWhy},
	{
		"control",
		[]string{"host/hostapi", "api", "client", "web", "sandbox", "internal"},
		"control is stateless and reaches a host only through host/hostapi, so that a fleet is not another program",
	},
	{
		"host",
		[]string{"vmm", "disk", "netns", "cgroup", "snapshot", "pager", "template", "guest", "sandbox", "internal"},
		"the host joins the mechanisms; it does not know who asks it",
	},
}

var mechanism = []string{"sandbox", "internal"}

const mechanismWhy = "mechanisms never import one another: they meet in host, through plain data"

func TestImportsPointOneWay(t *testing.T) {
	for _, f := range goFiles(t) {
		if f.isTest() {
			continue
		}
		for _, rule := range mayImport {
			if !below(f.dir(), rule.part) {
				continue
			}
			for _, imported := range f.imports() {
				if !below(imported, rule.part) && !below(imported, rule.others...) {
					t.Errorf("%s imports %s: %s", f.path, imported, rule.why)
				}
			}
			break
		}
		if below(f.dir(), "cmd", "test") {
			continue
		}
		for _, imported := range f.imports() {
			if below(imported, "cmd", "test") {
				t.Errorf("%s imports %s: nothing depends on a command or a test", f.path, imported)
			}
		}
	}
}

// The words and the public contract are what others build on: a dependency of
// theirs would become everybody's.
func TestWordsAndContractUseTheStandardLibraryOnly(t *testing.T) {
	for _, f := range goFiles(t) {
		if f.isTest() || !below(f.dir(), "sandbox", "api") {
			continue
		}
		for _, spec := range f.ast.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if first, _, _ := strings.Cut(path, "/"); strings.Contains(first, ".") && !strings.HasPrefix(path, module+"/") {
				t.Errorf("%s imports %s: sandbox and api use the standard library only, for whoever imports them gets it too", f.path, path)
			}
		}
	}
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	documented := map[string]bool{}
	for _, f := range goFiles(t) {
		if f.isTest() {
			continue
		}
		if doc := f.ast.Doc.Text(); strings.HasPrefix(doc, "Package ") || strings.HasPrefix(doc, "Command ") {
			documented[f.dir()] = true
		} else if !documented[f.dir()] {
			documented[f.dir()] = false
		}
	}
	for dir, ok := range documented {
		if !ok {
			t.Errorf("%s has no package comment: say what it is, what it promises, what it leaves to others", dir)
		}
	}
}

var emptyName = regexp.MustCompile(`(Manager|Service|Helper|Impl|Utils?)$`)

func TestTypesSayWhatTheyAre(t *testing.T) {
	for _, f := range goFiles(t) {
		for _, decl := range f.ast.Decls {
			d, ok := decl.(*ast.GenDecl)
			if !ok || d.Tok != token.TYPE {
				continue
			}
			for _, spec := range d.Specs {
				if s, ok := spec.(*ast.TypeSpec); ok && emptyName.MatchString(s.Name.Name) {
					t.Errorf("%s: type %s: such a name says nothing about what it is; name the thing", f.line(s), s.Name.Name)
				}
			}
		}
	}
}

// The environment is part of the command line. These may read it all the same.
var readsEnvironment = []string{
	"cmd", "test",
	"internal/fault", "internal/testkit", // they must reach a process that a test starts
	"guest/exec", // hands its own PATH on to commands, as the guest's contract says
	"template",   // hands PATH and the proxy settings on to the tools it runs
}

func TestOnlyCommandsReadTheEnvironment(t *testing.T) {
	for _, f := range goFiles(t) {
		if f.isTest() || below(f.dir(), readsEnvironment...) {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok && (s.Sel.Name == "Getenv" || s.Sel.Name == "LookupEnv") {
				if x, ok := s.X.(*ast.Ident); ok && x.Name == "os" {
					t.Errorf("%s reads the environment: do that in cmd/ and pass a struct, or nobody can see what a package depends on", f.line(n))
				}
			}
			return true
		})
	}
}

// Cut in two, or this file would break its own rule.
var unfinished = regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|XX` + `X)\b`)

func TestNothingIsLeftForLater(t *testing.T) {
	for _, f := range goFiles(t) {
		for _, group := range f.ast.Comments {
			if m := unfinished.FindString(group.Text()); m != "" {
				t.Errorf("%s has a %s: do it, or write an issue; a note in the code is read by nobody", f.line(group), m)
			}
		}
	}
}

// maxLines is a rule with room: nine in ten functions should have less than 45.
const maxLines = 80

func TestFunctionsAreOneThought(t *testing.T) {
	for _, f := range goFiles(t) {
		if f.isTest() {
			continue
		}
		for _, decl := range f.ast.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || fn.Body == nil {
				continue
			}
			if n := f.fset.Position(fn.End()).Line - f.fset.Position(fn.Pos()).Line + 1; n > maxLines {
				t.Errorf("%s: %s has %d lines, at most %d: a function is one thought; its steps have names", f.line(fn), fn.Name.Name, n, maxLines)
			}
		}
	}
}

func TestGeneratedCodeIsFresh(t *testing.T) {
	probe := exec.CommandContext(t.Context(), "go", "tool", "-modfile=tools/go.mod", "-n", "buf")
	out, err := probe.CombinedOutput()
	testkit.Require(t, "buf", err == nil, "go tool buf: "+strings.TrimSpace(string(out)))

	fresh := t.TempDir()
	generate := exec.CommandContext(t.Context(), "go", "tool", "-modfile=tools/go.mod", "buf", "generate", "-o", fresh)
	if out, err := generate.CombinedOutput(); err != nil {
		t.Fatalf("buf generate: %v\n%s", err, out)
	}
	want, have := tree(t, fresh), map[string][]byte{}
	for _, dir := range []string{"guest/guestapi/gen", "host/hostapi/gen"} {
		for path, data := range tree(t, dir) {
			have[dir+"/"+path] = data
		}
	}
	if len(want) == 0 {
		t.Fatal("buf generated nothing")
	}
	for path, data := range want {
		if !bytes.Equal(have[path], data) {
			t.Errorf("%s is not what its .proto file says: run make generate and commit", path)
		}
		delete(have, path)
	}
	for path := range have {
		t.Errorf("%s is generated by nothing: delete it", path)
	}
}

// tree reads every file below root, by its path from there.
func tree(t *testing.T, root string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		out[filepath.ToSlash(rel)], err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
