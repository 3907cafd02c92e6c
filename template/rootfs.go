package template

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const stepPackages = "install packages"

var errNeedsRoot = sandbox.Errorf(sandbox.KindUnsupported, "building needs root: files in the image belong to other users")

// milestones are what mmdebstrap says on its way, with how far it is by then;
// measured with the base recipe.
var milestones = []struct {
	text string
	at   float64
}{
	{"running apt-get update", 0.01},
	{"downloading packages with apt", 0.06},
	{"extracting archives", 0.12},
	{"installing essential packages", 0.16},
	{"installing remaining packages", 0.35},
	{"running --customize-hook", 0.97},
	{"cleaning package lists", 0.98},
}

// bootstrapProgress turns mmdebstrap's output into events of one step. The path of
// our folder is nobody's affair.
func bootstrapProgress(p Progress, step, dir string) func(line string) {
	at := 0.0
	return func(line string) {
		for _, m := range milestones {
			if strings.Contains(line, m.text) {
				at = max(at, m.at)
			}
		}
		p.line(step, at, strings.ReplaceAll(line, dir, ""))
	}
}

// bootstrap runs mmdebstrap; the folder it fills is the last of its arguments.
func (s *Store) bootstrap(ctx context.Context, w *work, args []string, line func(string)) error {
	if os.Geteuid() != 0 {
		return errNeedsRoot
	}
	if _, err := os.Stat(s.cfg.Keyring); err != nil {
		return sandbox.Errorf(sandbox.KindUnsupported,
			"Debian's archive keys are missing (%s): apt-get install debian-archive-keyring", s.cfg.Keyring)
	}
	scratch := w.path("tmp")
	if err := os.MkdirAll(scratch, 0o755); err != nil {
		return err
	}
	if err := os.Chmod(scratch, 0o777|os.ModeSticky); err != nil { // for apt's own user, whatever the umask
		return err
	}
	err := tool{
		name: "mmdebstrap", args: args, dir: w.dir, hold: w.lock, line: line,
		env:  []string{"TMPDIR=" + scratch},
		cure: "apt-get install mmdebstrap",
	}.run(ctx)
	return blame(err, w.dir)
}

// whatAptSays tells whose fault it is that packages could not be installed.
var whatAptSays = []struct {
	text string
	kind sandbox.Kind
}{
	{"Temporary failure resolving", sandbox.KindTransient},
	{"Could not resolve", sandbox.KindTransient},
	{"Could not connect", sandbox.KindTransient},
	{"Connection failed", sandbox.KindTransient},
	{"Connection timed out", sandbox.KindTransient},
	{"Unable to locate package", sandbox.KindInvalid},
	{"has no installation candidate", sandbox.KindInvalid},
	{"unmet dependencies", sandbox.KindInvalid},
	{"does not have a Release file", sandbox.KindInvalid},
	{"is not signed", sandbox.KindInvalid},
}

// blame gives a failed bootstrap its kind. What is a caller's affair he is told,
// without the path of our folder.
func blame(err error, dir string) error {
	if err == nil || sandbox.KindOf(err) != sandbox.KindInternal {
		return err
	}
	for _, said := range whatAptSays {
		if text := err.Error(); strings.Contains(text, said.text) {
			return sandbox.WithKind(said.kind, errors.New(strings.ReplaceAll(text, dir, "")))
		}
	}
	return err
}

// finish sets what packages leave open, and removes what must not be the same
// in every sandbox or came from the host.
func finish(root string, r Recipe) error {
	dir, err := os.OpenRoot(root) // a link in the image never leads out of it
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }() // nothing to lose
	for _, f := range []struct {
		path, text string
		perm       fs.FileMode
	}{
		{"etc/machine-id", "", 0o444}, // empty: to be set at boot
		{"etc/hostname", "sandbox\n", 0o644},
		{"etc/hosts", "127.0.0.1 localhost\n127.0.1.1 sandbox\n::1 localhost\n", 0o644},
		{"etc/resolv.conf", "", 0o644}, // mmdebstrap copies the host's
		{"etc/default/locale", "LANG=C.UTF-8\n", 0o644},
		{"etc/sudoers.d/" + r.User, r.User + " ALL=(ALL:ALL) NOPASSWD:ALL\n", 0o440},
	} {
		if err := replaceIn(dir, f.path, f.text, f.perm); err != nil {
			return fmt.Errorf("write /%s: %w", f.path, err)
		}
	}
	return removeStale(dir, root)
}

func replaceIn(dir *os.Root, path, text string, perm fs.FileMode) error {
	if err := dir.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := dir.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := dir.WriteFile(path, []byte(text), perm); err != nil {
		return err
	}
	return dir.Chmod(path, perm) // the umask does not count
}

// removeStale removes identities, logs and caches.
func removeStale(dir *os.Root, root string) error {
	for _, pattern := range []string{
		"etc/ssh/ssh_host_*", "etc/.pwd.lock", "etc/*-", "run/*", "tmp/*", "var/tmp/*",
		"var/lib/dbus/machine-id", "var/lib/systemd/random-seed", "var/lib/apt/lists/*",
		"var/cache/apt/*.bin", "var/cache/ldconfig/aux-cache", "var/log/*.log", "var/log/apt/*",
	} {
		paths, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return err
		}
		for _, path := range paths {
			rel, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			if err := dir.RemoveAll(rel); err != nil {
				return fmt.Errorf("remove /%s: %w", rel, err)
			}
		}
	}
	return nil
}

// content is what a tree needs in a file system.
type content struct {
	blocks, inodes int64
	newest         time.Time // of the times that came with the packages
}

// fallbackTime is for trees in which everything is new.
var fallbackTime = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)

// measure walks the tree and sets every time later than started back to the
// newest that came with a package, so that two builds agree. Earlier times must
// stay: compiled Python modules hold the time of their source.
func measure(root string, started time.Time) (content, error) {
	var c content
	times := map[string]time.Time{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		c.inodes++
		c.blocks += blocksOf(info)
		times[path] = info.ModTime()
		if info.ModTime().Before(started) && info.ModTime().After(c.newest) {
			c.newest = info.ModTime()
		}
		return nil
	})
	if err != nil {
		return c, err
	}
	if c.newest.IsZero() {
		c.newest = fallbackTime
	}
	c.newest = c.newest.Truncate(time.Second)
	for path, mtime := range times {
		if !mtime.Before(started) {
			mtime = c.newest
		}
		ts := unix.NsecToTimespec(mtime.UnixNano())
		err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil {
			return c, fmt.Errorf("set time of %s: %w", path, err)
		}
	}
	return c, nil
}

// blocksOf counts 4 KiB blocks; a directory and a link may need one of their own.
func blocksOf(info fs.FileInfo) int64 {
	if !info.Mode().IsRegular() {
		return 1
	}
	size := min(info.Size(), sparse.Allocated(info)+blockSize) // sparse files stay sparse
	return (size + blockSize - 1) / blockSize
}
