package template

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// ELF returns the kernel as an ELF file, unpacked once. A guest that boots it
// does not unpack it again each time, which under emulation is a tenth of a boot.
func (s *Store) ELF(ctx context.Context, k Kernel) (_ string, err error) {
	path := filepath.Join(s.cfg.Dir, elfDir, k.Digest+".elf")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	gate, err := lockGate(s.cfg.Dir)
	if err != nil {
		return "", fmt.Errorf("extract kernel: %w", err)
	}
	defer func() { err = errors.Join(err, gate.Close()) }()
	return path, ExtractELF(k.Image, path)
}
