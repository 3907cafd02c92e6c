package template

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Bounds on what is kept of a tool's output for the error message.
const (
	tailLines    = 20
	maxLineBytes = 4 << 10
)

// tool is one run of an outside program.
type tool struct {
	name string
	args []string
	env  []string // besides PATH, locale and proxies
	dir  string
	hold *os.File // inherited, so that its lock lives as long as the program
	line func(string)
	user uint32 // to run as; 0 stays root
	// file is a last argument: a file that the user may open, wherever it lies.
	file *os.File
	// cure is what to do when the program is missing.
	cure string
}

// run runs the program to its end. It does not outlive this process, and its
// children do not outlive it.
func (t tool) run(ctx context.Context) error {
	path, err := findTool(t.name)
	if err != nil {
		return sandbox.Errorf(sandbox.KindUnsupported, "%s is not installed: %s", t.name, t.cure)
	}
	out := &tail{line: t.line}
	cmd := exec.CommandContext(ctx, path, t.args...)
	cmd.Dir = t.dir
	cmd.Env = append(toolEnv(), t.env...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = alone()
	if t.user != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: t.user, Gid: t.user}
	}
	if t.hold != nil {
		cmd.ExtraFiles = []*os.File{t.hold}
	}
	if t.file != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, t.file)
		cmd.Args = append(cmd.Args, fmt.Sprintf("/proc/self/fd/%d", 2+len(cmd.ExtraFiles)))
	}
	// Pdeathsig is about the thread that forks, so it must stay until the end.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = cmd.Run()
	out.flush()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", t.name, context.Cause(ctx))
	}
	err = fmt.Errorf("%s: %w\n%s", t.name, err, out.text())
	if out.sawFull {
		return sandbox.WithKind(sandbox.KindNoSpace, err)
	}
	return err
}

// alone puts a program into a PID namespace, so that killing it kills all it
// started, and into a mount namespace, so that no mount of it survives.
func alone() *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() == 0 {
		attr.Cloneflags = syscall.CLONE_NEWPID
		attr.Unshareflags = syscall.CLONE_NEWNS
	}
	return attr
}

// findTool also looks where distributions keep programs for root: sudo and
// user sessions often have no sbin on PATH.
func findTool(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin/", "/sbin/"} {
		if path, e := exec.LookPath(dir + name); e == nil {
			return path, nil
		}
	}
	return "", err
}

// toolEnv passes on nothing that could change what is built. Without
// SOURCE_DATE_EPOCH in particular: with it Python compiles modules that must
// hash their source at each import.
func toolEnv() []string {
	env := []string{
		"PATH=" + os.Getenv("PATH") + ":/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/root",
	}
	for _, name := range []string{"http_proxy", "https_proxy", "ftp_proxy", "no_proxy"} {
		for _, key := range []string{name, strings.ToUpper(name)} {
			if value, ok := os.LookupEnv(key); ok {
				env = append(env, key+"="+value)
			}
		}
	}
	return env
}

// tail keeps the last lines written to it and hands each line on.
type tail struct {
	line    func(string)
	partial []byte
	last    []string
	sawFull bool // a line spoke of a full disk
}

func (t *tail) Write(p []byte) (int, error) {
	n := len(p)
	for {
		i := bytes.IndexAny(p, "\r\n")
		if i < 0 {
			break
		}
		t.add(append(t.partial, p[:i]...))
		t.partial, p = nil, p[i+1:]
	}
	t.partial = append(t.partial, p...)
	if len(t.partial) > maxLineBytes {
		t.flush()
	}
	return n, nil
}

func (t *tail) flush() {
	t.add(t.partial)
	t.partial = nil
}

func (t *tail) add(b []byte) {
	line := strings.TrimSpace(strings.ToValidUTF8(string(b), "?"))
	if line == "" {
		return
	}
	t.sawFull = t.sawFull || strings.Contains(line, syscall.ENOSPC.Error()) || strings.Contains(line, "No space left on device")
	if len(t.last) == tailLines {
		t.last = slices.Delete(t.last, 0, 1)
	}
	t.last = append(t.last, line)
	if t.line != nil {
		t.line(line)
	}
}

func (t *tail) text() string { return strings.Join(t.last, "\n") }
