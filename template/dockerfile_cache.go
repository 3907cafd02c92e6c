package template

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

// maxStepImages bounds the cache of disks after RUN steps.
const maxStepImages = 32

// names are the files that the guest writes at every start. What they were
// before a step is what they are after it: they would hold the name and the
// addresses of the build.
type names map[string]*string

var nameFiles = []string{"etc/hostname", "etc/hosts", "etc/resolv.conf"}

func saveNames(dir string) (names, error) {
	saved := names{}
	return saved, inTree(dir, func(t *oci.Tree) error {
		for _, name := range nameFiles {
			data, err := t.ReadFile(name, maxAccounts)
			switch {
			case err == nil:
				text := string(data)
				saved[name] = &text
			case errors.Is(err, fs.ErrNotExist), sandbox.Is(err, sandbox.KindInvalid): // a link, or no file
				saved[name] = nil
			default:
				return err
			}
		}
		return nil
	})
}

func (n names) restore(dir string) error {
	return inTree(dir, func(t *oci.Tree) error {
		for _, name := range nameFiles {
			var err error
			if text := n[name]; text != nil {
				err = t.WriteFile(name, []byte(*text), 0o644)
			} else {
				err = t.Remove(name)
			}
			if err != nil {
				return fmt.Errorf("restore /%s: %w", name, err)
			}
		}
		return nil
	})
}

const (
	stepImageFile = "disk.ext4"
	stepNamesFile = "names.json"
)

func (s *Store) stepPath(key string) string { return filepath.Join(s.cfg.Cache, cacheSteps, key) }

// keepStep puts the disk after a step into the cache. The disk moves.
func (b *recipeBuild) keepStep(ctx context.Context, key, image string, n names) (err error) {
	lock, err := b.s.lock(ctx, "step-"+key, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	out, err := os.MkdirTemp(b.w.dir, "step-")
	if err != nil {
		return err
	}
	if err := errors.Join(os.Rename(image, filepath.Join(out, stepImageFile)), writeJSON("template-step", filepath.Join(out, stepNamesFile), n)); err != nil {
		return err
	}
	if err := b.s.intoCache(ctx, out, b.s.stepPath(key)); err != nil {
		return err
	}
	return b.s.pruneSteps()
}

// pruneSteps removes the disks that have been in the cache for the longest time.
func (s *Store) pruneSteps() error {
	dir := filepath.Join(s.cfg.Cache, cacheSteps)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) <= maxStepImages {
		return err
	}
	var infos []fs.FileInfo
	for _, e := range entries {
		if info, err := e.Info(); err == nil { // else it is gone
			infos = append(infos, info)
		}
	}
	slices.SortFunc(infos, func(x, y fs.FileInfo) int { return y.ModTime().Compare(x.ModTime()) })
	var errs []error
	for _, info := range infos[min(maxStepImages, len(infos)):] {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, info.Name())))
	}
	return errors.Join(errs...)
}

// resume begins behind the last RUN whose disk is in the cache; next is 0 if
// there is none.
func (b *recipeBuild) resume(ctx context.Context, p *stagePlan) (dir string, next int, err error) {
	for i := range slices.Backward(p.steps) {
		if p.steps[i].Run == nil {
			continue
		}
		dir, err := b.cachedStep(ctx, p.steps[i])
		if err != nil {
			return "", 0, err
		}
		if dir == "" {
			continue
		}
		for _, s := range p.steps[:i+1] {
			b.p.line(b.name(s), 1, "done before")
		}
		return dir, i + 1, nil
	}
	return "", 0, nil
}

// cachedStep makes a tree of a disk in the cache; without one it is "".
func (b *recipeBuild) cachedStep(ctx context.Context, s plannedStep) (string, error) {
	at := b.s.stepPath(s.key)
	data, err := osfs.ReadFileLimit(filepath.Join(at, stepNamesFile), 8*maxAccounts)
	var n names
	if err != nil || json.Unmarshal(data, &n) != nil {
		return "", nil // not there, or of no use
	}
	dir, err := b.export(ctx, filepath.Join(at, stepImageFile), b.name(s))
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if err != nil {
		b.s.log.Warn("a step in the template cache is of no use", "key", s.key, "err", err)
		return "", nil
	}
	now := time.Now()
	_ = os.Chtimes(at, now, now) // it was used; if it stays old, it goes earlier
	return dir, n.restore(dir)
}
