// Package hooks runs what an image wants run when its machine goes on from a
// snapshot: the executables of one folder, in the order of their names, one at a
// time, as root, while all other processes stand still. There a copy can do what
// nobody else can do for it: seed a program's own random numbers, make new keys,
// tell a cluster that it is somebody else.
//
// A hook that fails is reported and holds nothing up; one that takes too long is
// ended, with all that it has started. What a hook leaves running on purpose goes
// on with the user's processes. None of a hook's output holds it up.
package hooks

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/identity"
	"github.com/dormouse-sandbox/dormouse/guest/reap"
)

// Dir is where an image has them.
const Dir = "/etc/dormouse/on-resume.d"

const (
	// maxHooks bounds how many are run.
	maxHooks = 64
	// maxOutput is how much is kept of what one writes, in bytes: the end of it.
	maxOutput = 4 << 10
	// quiet is how long the output of what a hook has left running is waited for.
	quiet = 100 * time.Millisecond
	// dying is how long a hook may take to go once it is killed.
	dying = time.Second
	// leaving is how long what was killed may take to leave its cgroup: on a busy machine
	// it waits for a processor first.
	leaving = 3 * time.Second
)

// Runner runs the hooks of one machine.
type Runner struct {
	Dir    string
	Reaper *reap.Reaper
	Path   string // their PATH
	// Cgroup is where they run: a cgroup v2 directory that nobody else uses, or
	// empty. Leftovers is one that takes what they leave running.
	Cgroup, Leftovers string
	// Limit bounds one hook, Total all of them.
	Limit, Total time.Duration
	Log          *slog.Logger
}

// Run runs all of them. It returns when the last has ended, or was given up.
func (r *Runner) Run(ctx context.Context, id identity.Identity) []guestapi.Hook {
	names, err := r.names()
	if err != nil {
		return []guestapi.Hook{{Name: filepath.Base(r.Dir), Error: err.Error()}}
	}
	if len(names) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, r.Total)
	defer cancel()
	env := r.environment(id)
	var out []guestapi.Hook
	for _, name := range names {
		began := time.Now()
		output, err := r.run(ctx, name, env)
		hook := guestapi.Hook{Name: name, Output: printable(output), TookMs: time.Since(began).Milliseconds()}
		if err != nil {
			hook.Error = err.Error()
		}
		r.report(hook)
		out = append(out, hook)
	}
	return out
}

// names lists the hooks. What begins with a dot, ends with a tilde, is no file or
// cannot be executed is none.
func (r *Runner) names() ([]string, error) {
	entries, err := os.ReadDir(r.Dir) // sorted
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, ".") || strings.HasSuffix(name, "~") {
			continue
		}
		info, err := os.Stat(filepath.Join(r.Dir, name)) // a link may lead to one
		if err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			names = append(names, name)
		}
	}
	if len(names) > maxHooks {
		return nil, fmt.Errorf("%d hooks, at most %d are run", len(names), maxHooks)
	}
	return names, nil
}

// environment is root's, and then the sandbox's.
func (r *Runner) environment(id identity.Identity) []string {
	env := map[string]string{
		"PATH": r.Path, "HOME": "/root", "USER": "root", "LOGNAME": "root",
	}
	maps.Copy(env, id.Env)
	env["DORMOUSE_SANDBOX_ID"] = id.SandboxID
	var list []string
	for _, name := range slices.Sorted(maps.Keys(env)) {
		if !strings.ContainsRune(name+env[name], 0) {
			list = append(list, name+"="+env[name])
		}
	}
	return list
}

// report tells the console.
func (r *Runner) report(h guestapi.Hook) {
	if r.Log == nil {
		return
	}
	for line := range strings.Lines(h.Output) {
		r.Log.Info("hook", "name", h.Name, "says", strings.TrimRight(line, "\n"))
	}
	if h.Error != "" {
		r.Log.Error("hook", "name", h.Name, "err", h.Error, "took_ms", h.TookMs)
	}
}
