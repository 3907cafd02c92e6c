package dockerfile

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Bounds of one Dockerfile.
const (
	MaxBytes  = 1 << 20
	maxStages = 32
	maxSteps  = 256
)

// Scratch is the base of a stage that begins with nothing.
const Scratch = "scratch"

// File is a Dockerfile that has been read, with the arguments of one build.
type File struct {
	Stages []Stage

	args   map[string]string // given for this build
	global map[string]string // of ARG before the first FROM, and those that are always there
	lex    *shell.Lex
}

// Stage is one FROM and what follows it. Base is another stage's index, or -1 and
// Image says what it is made from.
type Stage struct {
	Name  string // lower case; may be empty
	Image string
	Base  int
	Line  int

	commands []instructions.Command
}

// platform is what sandboxes are.
var platform = map[string]string{
	"TARGETPLATFORM": "linux/amd64", "TARGETOS": "linux", "TARGETARCH": "amd64", "TARGETVARIANT": "",
	"BUILDPLATFORM": "linux/amd64", "BUILDOS": "linux", "BUILDARCH": "amd64", "BUILDVARIANT": "",
}

// Parse reads a Dockerfile. Args are what "docker build --build-arg" is given.
func Parse(text []byte, args map[string]string) (*File, error) {
	if len(text) > MaxBytes {
		return nil, invalid(0, "it has %d bytes, at most %d", len(text), MaxBytes)
	}
	ast, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "Dockerfile: %w", err)
	}
	stages, globals, err := instructions.Parse(ast.AST, linter.New(&linter.Config{SkipAll: true}))
	if err != nil {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "Dockerfile: %w", err)
	}
	f := &File{args: args, global: maps.Clone(platform), lex: shell.NewLex(ast.EscapeToken)}
	for _, a := range globals {
		if err := f.declare(a.Args, f.global, nil, line(&a)); err != nil {
			return nil, err
		}
	}
	if len(stages) == 0 || len(stages) > maxStages {
		return nil, invalid(0, "it has %d stages, it must have 1 to %d", len(stages), maxStages)
	}
	steps := 0
	for i, s := range stages {
		if err := f.addStage(s); err != nil {
			return nil, err
		}
		if steps += len(stages[i].Commands); steps > maxSteps {
			return nil, invalid(0, "it has more than %d instructions", maxSteps)
		}
	}
	return f, nil
}

func (f *File) addStage(s instructions.Stage) error {
	at := 0
	if len(s.Location) > 0 {
		at = s.Location[0].Start.Line
	}
	base, err := f.word(s.BaseName, f.global)
	if err != nil {
		return invalid(at, "%v", err)
	}
	on, err := f.word(s.Platform, f.global)
	if err != nil {
		return invalid(at, "%v", err)
	}
	if on != "" && on != "linux/amd64" {
		return invalid(at, "FROM --platform=%.100s: sandboxes are linux/amd64", on)
	}
	if base == "" {
		return invalid(at, "FROM names no image: %.100q is empty", s.BaseName)
	}
	stage := Stage{Name: strings.ToLower(s.Name), Image: base, Base: f.find(base, false), Line: at, commands: s.Commands}
	if stage.Base >= 0 {
		stage.Image = ""
	}
	f.Stages = append(f.Stages, stage)
	return nil
}

// find looks for an earlier stage by its name, the latest of that name, or by its
// number.
func (f *File) find(name string, number bool) int {
	for i := range slices.Backward(f.Stages) {
		if f.Stages[i].Name != "" && f.Stages[i].Name == strings.ToLower(name) {
			return i
		}
	}
	if i, err := strconv.Atoi(name); number && err == nil && i >= 0 && i < len(f.Stages) {
		return i
	}
	return -1
}

// Target finds the stage to build: the last one for an empty name.
func (f *File) Target(name string) (int, error) {
	if name == "" {
		return len(f.Stages) - 1, nil
	}
	if i := f.find(name, true); i >= 0 {
		return i, nil
	}
	return 0, invalid(0, "it has no stage named %.100q", name)
}

// declare takes over an ARG: what was given for this build, else what was
// declared globally, else its default.
func (f *File) declare(args []instructions.KeyValuePairOptional, into, env map[string]string, at int) error {
	for _, a := range args {
		value, ok := f.args[a.Key]
		if !ok && a.Value != nil {
			var err error
			if value, err = f.word(*a.Value, merged(into, env)); err != nil {
				return invalid(at, "%v", err)
			}
			ok = true
		}
		if !ok {
			value, ok = f.global[a.Key]
		}
		if ok {
			into[a.Key] = value
		}
	}
	return nil
}

// word expands the variables in a word.
func (f *File) word(word string, env map[string]string) (string, error) {
	out, _, err := f.lex.ProcessWord(word, values(env))
	if strings.ContainsRune(out, 0) {
		return "", fmt.Errorf("%.100q has a NUL byte in it", word)
	}
	return out, err
}

func (f *File) expander(env map[string]string) instructions.SingleWordExpander {
	return func(word string) (string, error) { return f.word(word, env) }
}

// values is what the parser asks for variables.
type values map[string]string

func (v values) Get(name string) (string, bool) { value, ok := v[name]; return value, ok }
func (v values) Keys() []string                 { return slices.Sorted(maps.Keys(v)) }

func merged(weak, strong map[string]string) map[string]string {
	out := maps.Clone(weak)
	if out == nil {
		out = map[string]string{}
	}
	maps.Copy(out, strong)
	return out
}

func line(c instructions.Command) int {
	if at := c.Location(); len(at) > 0 {
		return at[0].Start.Line
	}
	return 0
}

// invalid is an error about a line, or about the whole for line 0.
func invalid(line int, format string, args ...any) error {
	where := "Dockerfile: "
	if line > 0 {
		where = fmt.Sprintf("Dockerfile, line %d: ", line)
	}
	return sandbox.Errorf(sandbox.KindInvalid, "%s", where+fmt.Sprintf(format, args...))
}
