package template

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Delete removes a template's name, and its build from the cache if no other
// template is the same. Its image stays, as that of a template that was built
// anew does: who may still need it is more than this package knows.
func (s *Store) Delete(ctx context.Context, name string) (err error) {
	t, err := s.Get(name) // one that is broken can be deleted too
	if sandbox.Is(err, sandbox.KindNotFound) || sandbox.Is(err, sandbox.KindInvalid) {
		return err
	}
	gate, err := lockGate(s.cfg.Dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, gate.Close()) }()
	if err := fault.Point(ctx, "template/delete"); err != nil {
		return err
	}
	if err := osfs.RemoveAll("template-delete", filepath.Join(s.cfg.Dir, name)); err != nil {
		return fmt.Errorf("delete template %q: %w", name, err)
	}
	s.log.Info("template deleted", "template", name, "digest", t.Digest)
	others, err := s.List()
	if err != nil || !isHex(t.Key) {
		return err
	}
	for _, o := range others {
		if o.Key == t.Key {
			return nil
		}
	}
	if err := os.RemoveAll(filepath.Join(s.cfg.Cache, cacheImages, t.Key)); err != nil {
		return fmt.Errorf("delete template %q from the cache: %w", name, err)
	}
	return nil
}
