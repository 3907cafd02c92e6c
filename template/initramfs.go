package template

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// maxGuestBytes bounds the guest binary: it is in every sandbox's memory while
// it boots.
const maxGuestBytes = 128 << 20

// initramfsVersion is part of the name of every initramfs file.
const initramfsVersion = 1

// Initramfs returns a cpio file with the guest binary as /init and the kernel's
// modules as /modules/NNN-name.ko, to be loaded in the order of their names. It
// is not compressed: under emulation unpacking takes longer than copying.
func (s *Store) Initramfs(ctx context.Context, k Kernel, guestBinary string) (string, error) {
	path, err := s.initramfs(ctx, k, guestBinary)
	if err != nil {
		return "", fmt.Errorf("initramfs: %w", sandbox.NoSpace(err))
	}
	return path, nil
}

func (s *Store) initramfs(ctx context.Context, k Kernel, guestBinary string) (_ string, err error) {
	digest, err := digestFile(guestBinary)
	if errors.Is(err, fs.ErrNotExist) {
		return "", sandbox.WithKind(sandbox.KindNotFound, err)
	}
	if err != nil {
		return "", err
	}
	key := hashOf([]any{initramfsVersion, k.Digest, digest})
	path := filepath.Join(s.cfg.Dir, initramfsDir, key+".cpio")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	init, err := osfs.ReadFileLimit(guestBinary, maxGuestBytes)
	if err != nil {
		return "", err
	}
	data, err := packInitramfs(init, k.ModulesDir)
	if err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	gate, err := lockGate(s.cfg.Dir)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, gate.Close()) }()
	return path, osfs.WriteFile("template-initramfs", path, data, 0o444)
}

// packInitramfs makes the same bytes from the same content.
func packInitramfs(init []byte, modulesDir string) ([]byte, error) {
	if !bytes.HasPrefix(init, elfMagic) {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "the guest binary is not an ELF file")
	}
	var modules []module
	if modulesDir != "" {
		set, err := openModules(modulesDir)
		if err != nil {
			return nil, err
		}
		if modules, err = set.needed(); err != nil {
			return nil, err
		}
	}
	var buf bytes.Buffer
	c := newc{w: &buf}
	for _, dir := range []string{"dev", "proc", "sys", "newroot", "modules"} {
		c.dir(dir)
	}
	c.char("dev/console", 0o600, 5, 1) // the kernel opens it for /init before anything is mounted
	c.char("dev/null", 0o666, 1, 3)
	c.file("init", 0o755, init)
	for i, m := range modules {
		c.file(fmt.Sprintf("modules/%03d-%s.ko", i, m.name), 0o644, m.data)
	}
	err := c.close()
	return buf.Bytes(), err
}
