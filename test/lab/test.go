package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/lab"
)

// Where things are inside.
const (
	insideWork   = "/work"
	insideSource = insideWork + "/src"
	insideBin    = insideWork + "/bin"
)

// suite is one package's tests, compiled.
type suite struct {
	dir    string // below the module's root, with slashes
	binary string // name in that folder
}

// attempts bounds how often what the emulator has broken is run.
const attempts = 3

// test runs packages' tests in one lab, one package after the other. When its own
// kernel dies, the rest runs in another one.
func (o options) test(ctx context.Context, packages []string) (failures int, err error) {
	if len(packages) == 0 {
		return 0, errors.New("which packages?")
	}
	temp, err := os.MkdirTemp(tempDir(), "dormouse-lab-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	begun := time.Now()
	stage, file := filepath.Join(temp, "stage"), filepath.Join(temp, "work.img")
	suites, err := o.compile(ctx, packages, stage)
	if err != nil {
		return 0, err
	}
	say("lab: compiled %d test binaries in %.1fs", len(suites), time.Since(begun).Seconds())
	if err := errors.Join(lab.MakeDisk(ctx, file, stage, 0), os.RemoveAll(stage)); err != nil {
		return 0, err
	}
	work := func(string) ([]lab.Disk, error) {
		return []lab.Disk{{Serial: "work", File: file, Path: insideWork, Overlay: true}}, nil
	}
	for try := 1; len(suites) > 0; try++ {
		_, err := o.with(ctx, work, func(s *session) (int, error) {
			for len(suites) > 0 {
				ok, err := o.runSuite(ctx, s, suites[0], 1)
				if err != nil {
					return 0, fmt.Errorf("%s: %w", suites[0].dir, err)
				}
				if !ok {
					failures++
				}
				suites = suites[1:]
			}
			return 0, nil
		})
		if err != nil && (try == attempts || !errors.Is(err, lab.ErrPanic)) {
			return 0, err
		}
		if err != nil {
			say("lab: %v\nlab: the emulator does that; the rest runs in another lab, see docs/decisions.md", err)
			o.out += "-again"
		}
	}
	return failures, nil
}

// compile fills the folder stage with what the tests need: their binaries, each
// in its package's folder beside what is not Go source there, and the programs
// that they run.
func (o options) compile(ctx context.Context, packages []string, stage string) ([]suite, error) {
	root, err := output(ctx, "go", "list", "-m", "-f", "{{.Dir}}")
	if err != nil {
		return nil, err
	}
	// A pattern like ./disk/... also matches folders in which there is nothing to test.
	dirs, err := output(ctx, "go", append([]string{"list", "-f", "{{if or .TestGoFiles .XTestGoFiles}}{{.Dir}}{{end}}"}, packages...)...)
	if err != nil {
		return nil, err
	}
	if dirs == "" {
		return nil, fmt.Errorf("%s: no tests", strings.Join(packages, " "))
	}
	if err := o.programs(ctx, root, filepath.Join(stage, "bin")); err != nil {
		return nil, err
	}
	var suites []suite
	for _, dir := range strings.Fields(dirs) {
		rel, err := filepath.Rel(root, dir)
		if err != nil {
			return nil, err
		}
		s := suite{dir: filepath.ToSlash(rel), binary: path.Base(filepath.ToSlash(rel)) + ".test"}
		to := filepath.Join(stage, "src", rel)
		if err := os.MkdirAll(to, 0o755); err != nil {
			return nil, err
		}
		if err := goTool(ctx, dir, "test", "-c", "-trimpath", "-o", filepath.Join(to, s.binary), "."); err != nil {
			return nil, err
		}
		if err := copyData(ctx, root, rel, stage); err != nil {
			return nil, err
		}
		suites = append(suites, s)
	}
	// What finds the module's root by its go.mod finds it inside too.
	return suites, copyFile(filepath.Join(root, "go.mod"), filepath.Join(stage, "src", "go.mod"))
}

// programs builds what DORMOUSE_BIN has inside: the commands, and the programs
// in testdata folders, each where testkit.Program looks for it.
func (o options) programs(ctx context.Context, root, to string) error {
	if o.bin != "" {
		return copyTree(o.bin, to)
	}
	for _, name := range []string{"dormouse", "dormouse-guest"} {
		if err := goTool(ctx, root, "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -X main.version=test",
			"-o", filepath.Join(to, name), "./cmd/"+name); err != nil {
			return err
		}
	}
	// Those of all packages: the tests of one run programs of another's too.
	for _, pattern := range []string{"*/testdata/*/main.go", "*/*/testdata/*/main.go"} {
		mains, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return err
		}
		for _, main := range mains {
			dir := filepath.Dir(main)
			name, err := filepath.Rel(root, dir)
			if err != nil {
				return err
			}
			if err := goTool(ctx, dir, "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", filepath.Join(to, name), "."); err != nil {
				return err
			}
		}
	}
	return nil
}

// copyData copies a package's folder without its Go code and its subpackages.
func copyData(ctx context.Context, root, rel, stage string) error {
	from := filepath.Join(root, rel)
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Type().IsRegular() && filepath.Ext(e.Name()) != ".go" {
			if err := copyFile(filepath.Join(from, e.Name()), filepath.Join(stage, "src", rel, e.Name())); err != nil {
				return err
			}
		}
	}
	testdata := filepath.Join(from, "testdata")
	if _, err := os.Stat(testdata); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return copyTree(testdata, filepath.Join(stage, "src", rel, "testdata"))
}

// runSuite runs one test binary, for the try-th time, and says how it went. What
// failed because the emulator reset guests runs again.
func (o options) runSuite(ctx context.Context, s *session, t suite, try int) (bool, error) {
	ending := ".log"
	if try > 1 {
		ending = fmt.Sprintf("-%d.log", try)
	}
	r := &report{}
	if o.verbose {
		r.live = os.Stdout
	}
	args := []string{"./" + t.binary, "-test.v", "-test.paniconexit0", "-test.timeout=" + o.suiteLimit(ctx).String()}
	if o.run != "" {
		args = append(args, "-test.run="+o.run)
	}
	if o.skip != "" {
		args = append(args, "-test.skip="+o.skip)
	}
	env := append([]string{
		"REQUIRE=" + requirements(os.Getenv("REQUIRE")), "DORMOUSE_LONG=" + os.Getenv("DORMOUSE_LONG"),
		"DORMOUSE_BIN=" + insideBin, "DORMOUSE_ASSETS=/var/cache/dormouse/assets", "DORMOUSE_LAB=1", "DORMOUSE_ACCEL=kvm", "DORMOUSE_UP=--boot-timeout 5m", "DORMOUSE_PATIENCE=4",
	}, o.env...)
	status, err := s.Run(ctx, lab.Command{Args: args, Env: env, Dir: path.Join(insideSource, t.dir), Stdout: r, Stderr: r})
	log := filepath.Join(o.out, strings.ReplaceAll(t.dir, "/", "-")+ending)
	if e := os.WriteFile(log, r.all.Bytes(), 0o644); e != nil {
		err = errors.Join(err, e)
	}
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return false, fmt.Errorf("%w; the end of its output (all in %s):\n%s", err, log, lastLines(r.all.String(), 30))
	}
	unexpected := r.unexpected()
	ok := status.Code == 0 && (try == 1 || r.passed > 0) && len(status.Left) == 0 && len(unexpected) == 0
	word := "ok  "
	if !ok {
		word = "FAIL"
		if !o.verbose {
			_, _ = os.Stdout.Write(r.all.Bytes())
		}
		say("exit status %d %s", status.Code, status.Error)
	}
	for _, left := range status.Left {
		say("     left running: %s", left)
	}
	for _, n := range r.needs {
		say("     skipped: %s", n.said)
	}
	for _, wrong := range unexpected {
		say("     skipped, which is a failure: %s", wrong)
	}
	say("%s lab: %-22s %6.1fs  %s", word, t.dir, status.Took.Seconds(), r.counts())
	// Beside tests that failed, nothing was wrong: no panic, nothing skipped or left.
	if ok || status.Code != testsFailed || len(status.Left) > 0 || len(unexpected) > 0 || !r.onlyResets() || try == attempts {
		return ok, nil
	}
	for _, pattern := range r.again() {
		say("lab: guests of the emulated KVM were reset in %s, see docs/decisions.md; it runs again:", pattern)
		o.run = pattern
		if ok, err := o.runSuite(ctx, s, t, try+1); err != nil || !ok {
			return ok, err
		}
	}
	return true, nil
}

// testsFailed is the exit status of a test binary that ran to its end. One that
// panics or takes too long has another.
const testsFailed = 1

// suiteLimit leaves time to say what a test that hangs was doing.
func (o options) suiteLimit(ctx context.Context) time.Duration {
	deadline, ok := ctx.Deadline()
	if !ok {
		return o.timeout
	}
	return max(time.Second, time.Until(deadline)-15*time.Second).Round(time.Second)
}

// requirements is what must not be missing inside: all that the outside demands,
// and what the lab is for.
func requirements(outside string) string {
	const inside = "root,kvm,dm,tun,cgroup"
	if outside == "" {
		return inside
	}
	return inside + "," + outside
}

func output(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

// goTool runs go without cgo: what it builds needs no library inside.
func goTool(ctx context.Context, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

func copyFile(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, data, info.Mode().Perm())
}

func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return copyFile(name, to+strings.TrimPrefix(name, from))
	})
}

func lastLines(text string, most int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-most):], "\n")
}
