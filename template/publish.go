package template

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
)

// publish makes a cached image visible under its name. The record comes last:
// before it the old template is there, after it the new one. The log of who made
// the image goes with it.
func (s *Store) publish(ctx context.Context, t Template, cached string) (err error) {
	gate, err := lockGate(s.cfg.Dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, gate.Close()) }()
	if err := fault.Point(ctx, "template/publish"); err != nil {
		return err
	}
	target, err := s.imagePath(t.Digest)
	if err != nil {
		return err
	}
	if err := linkOrCopy("template-image", filepath.Join(cached, imageFile), target); err != nil {
		return err
	}
	dir := filepath.Join(s.cfg.Dir, t.Name)
	if err := osfs.MkdirAll("template-publish", dir, 0o755); err != nil {
		return err
	}
	log, err := readLog(cached)
	if err != nil {
		return err
	}
	if err := writeLog(dir, log); err != nil {
		return err
	}
	return writeJSON("template-publish", filepath.Join(dir, templateFile), t)
}

// sweepPublished removes temporary files next to what is published. Everybody
// who makes such files holds the gate.
func (s *Store) sweepPublished() (err error) {
	gate, err := lockGate(s.cfg.Dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, gate.Close()) }()
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return err
	}
	errs := []error{osfs.SweepTemp(s.cfg.Dir)}
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".tmp-") {
			errs = append(errs, osfs.SweepTemp(filepath.Join(s.cfg.Dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

func writeJSON(op, path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return osfs.WriteFile(op, path, append(data, '\n'), 0o644)
}

// linkOrCopy makes to a file with from's content, whole and durable; an
// existing one stays, since its name is its content. Both are read-only for
// good, so that sharing the blocks is safe.
func linkOrCopy(op, from, to string) error {
	if _, err := os.Lstat(to); err == nil {
		return nil
	}
	err := os.Link(from, to)
	if err == nil || errors.Is(err, fs.ErrExist) {
		return osfs.SyncDir(filepath.Dir(to))
	}
	// Another file system, one without links, or too many of them: copy.
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = src.Close() }() // read only
	info, err := src.Stat()
	if err != nil {
		return err
	}
	return osfs.Replace(op, to, info.Mode().Perm(), func(dst *os.File) error {
		return sparse.CopyFile(dst, src)
	})
}
