package template

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

const (
	stepKernel = "fetch kernel"
	// kernelPackage is Debian's kernel without drivers for real hardware.
	kernelPackage = "linux-image-cloud-amd64"
	// kernelSuite has Linux 6.1. Look the pair of kernel and QEMU up before
	// changing it: 6.12 crashes under QEMU 7.2's emulation.
	kernelSuite = "bookworm"

	kernelFile   = "vmlinuz"
	kernelRecord = "kernel.json"
	modulesDir   = "modules"
)

// Kernel is a guest kernel that is ready for use. Its files never change.
type Kernel struct {
	Image      string `json:"-"` // a bzImage or an ELF file; see ExtractELF
	ModulesDir string `json:"-"` // the modules a guest needs; empty if the kernel came without
	Release    string `json:"release"`
	Digest     string `json:"digest"` // of the image and the modules
	HasModules bool   `json:"has_modules"`
}

// KernelConfig says where a kernel comes from.
type KernelConfig struct {
	// Image is any vmlinuz or vmlinux; empty is Debian's cloud kernel.
	Image string
	// ModulesDir is the /lib/modules/RELEASE of Image. Without it everything
	// that a guest needs must be built in.
	ModulesDir string
	// Mirror is as in Recipe, for Debian's kernel.
	Mirror string
	// Revision is as in Recipe: a new value fetches the newest kernel.
	Revision string
}

// Kernel returns a guest kernel, fetching it where needed. Nothing is installed
// on the host.
func (s *Store) Kernel(ctx context.Context, cfg KernelConfig, p Progress) (Kernel, error) {
	k, err := s.kernel(ctx, cfg, p)
	if err != nil {
		return Kernel{}, fmt.Errorf("kernel: %w", sandbox.NoSpace(err))
	}
	return k, nil
}

func (s *Store) kernel(ctx context.Context, cfg KernelConfig, p Progress) (_ Kernel, err error) {
	key, err := kernelKey(cfg)
	if err != nil {
		return Kernel{}, err
	}
	published := filepath.Join(s.cfg.Dir, kernelsDir, key)
	if k, err := readKernel(published); err == nil {
		return k, nil
	}
	lock, err := s.lock(ctx, "kernel-"+key, func() {
		p.line(stepKernel, Unknown, "another process prepares this kernel; waiting for it")
	})
	if err != nil {
		return Kernel{}, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	cached := filepath.Join(s.cfg.Cache, cacheKernels, key)
	if _, err := readKernel(cached); err != nil {
		if err := s.makeKernel(ctx, cfg, cached, p); err != nil {
			return Kernel{}, err
		}
	}
	if err := s.publishTree(ctx, cached, published); err != nil {
		return Kernel{}, fmt.Errorf("publish: %w", err)
	}
	p.step(stepKernel, 1)
	return readKernel(published)
}

// kernelKey names a given kernel by its content, and Debian's by its name and what
// is taken of it.
func kernelKey(cfg KernelConfig) (string, error) {
	if cfg.Image == "" {
		if cfg.ModulesDir != "" {
			return "", sandbox.Errorf(sandbox.KindInvalid, "a modules folder without its kernel image")
		}
		if err := checkMirror(cfg.Mirror); err != nil {
			return "", err
		}
		return hashOf([]any{builderVersion, kernelPackage, kernelSuite, cfg.Mirror, cfg.Revision, wantedNames()}), nil
	}
	digest, err := digestFile(cfg.Image)
	if errors.Is(err, fs.ErrNotExist) {
		return "", sandbox.WithKind(sandbox.KindNotFound, err)
	}
	if err != nil {
		return "", err
	}
	parts := []any{builderVersion, digest}
	if cfg.ModulesDir != "" {
		modules, err := digestModules(cfg.ModulesDir)
		if err != nil {
			return "", err
		}
		parts = append(parts, modules)
	}
	return hashOf(parts), nil
}

// digestModules hashes the modules that would be taken from a folder.
func digestModules(dir string) (string, error) {
	set, err := openModules(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return "", sandbox.WithKind(sandbox.KindNotFound, err)
	}
	if err != nil {
		return "", err
	}
	modules, err := set.needed()
	if err != nil {
		return "", err
	}
	parts := []any{filepath.Base(dir), set.builtin}
	for _, m := range modules {
		parts = append(parts, m.name, m.data)
	}
	return hashOf(parts), nil
}

func readKernel(dir string) (Kernel, error) {
	data, err := osfs.ReadFileLimit(filepath.Join(dir, kernelRecord), maxRecordBytes)
	if err != nil {
		return Kernel{}, err
	}
	var k Kernel
	if err := json.Unmarshal(data, &k); err != nil {
		return Kernel{}, err
	}
	k.Image = filepath.Join(dir, kernelFile)
	if k.HasModules {
		k.ModulesDir = filepath.Join(dir, modulesDir)
	}
	_, err = os.Stat(k.Image)
	return k, err
}

// makeKernel prepares a kernel in a work folder and moves it into the cache.
func (s *Store) makeKernel(ctx context.Context, cfg KernelConfig, cached string, p Progress) (err error) {
	w, err := s.newWork()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	p.step(stepKernel, 0)
	if cfg.Image == "" {
		if cfg.Image, cfg.ModulesDir, err = s.fetchKernel(ctx, w, cfg.Mirror, p); err != nil {
			return err
		}
	}
	out := w.path("out")
	if err := prepareKernel(ctx, cfg, out); err != nil {
		return err
	}
	return s.intoCache(ctx, out, cached)
}

// fetchKernel unpacks Debian's kernel package with mmdebstrap's own apt, which
// works on every distribution.
func (s *Store) fetchKernel(ctx context.Context, w *work, mirror string, p Progress) (image, modules string, err error) {
	root := w.path("root")
	args := []string{
		"--mode=root", "--format=directory", "--variant=extract", "--architectures=amd64",
		"--include=" + kernelPackage, kernelSuite, root,
	}
	if mirror != "" {
		args = append(args, mirror)
	}
	err = errors.Join(fault.Point(ctx, "template/kernel"),
		s.bootstrap(ctx, w, args, func(line string) { p.line(stepKernel, Unknown, line) }))
	if err != nil {
		return "", "", err
	}
	if image, err = onlyMatch(root, "boot/vmlinuz-*"); err != nil {
		return "", "", err
	}
	// lib is a link to usr/lib where the package's suite has merged them.
	for _, pattern := range []string{"lib/modules/*", "usr/lib/modules/*"} {
		if modules, err = onlyMatch(root, pattern); err == nil {
			return image, modules, nil
		}
	}
	return "", "", err
}

func onlyMatch(root, pattern string) (string, error) {
	found, err := filepath.Glob(filepath.Join(root, pattern))
	if err != nil {
		return "", err
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%s holds %d of %s, not one", kernelPackage, len(found), pattern)
	}
	return found[0], nil
}

// prepareKernel fills the folder out with the form that Kernel has.
func prepareKernel(ctx context.Context, cfg KernelConfig, out string) error {
	if err := os.Mkdir(out, 0o755); err != nil {
		return err
	}
	release, err := kernelRelease(cfg.Image)
	if err != nil {
		return err
	}
	k := Kernel{Release: release, HasModules: cfg.ModulesDir != ""}
	if err := copyFile(cfg.Image, filepath.Join(out, kernelFile)); err != nil {
		return err
	}
	if k.HasModules {
		if k.Release == "" {
			k.Release = filepath.Base(cfg.ModulesDir)
		}
		if err := copyModules(cfg.ModulesDir, filepath.Join(out, modulesDir)); err != nil {
			return err
		}
	}
	if k.Digest, err = digestTree(out); err != nil {
		return err
	}
	if err := fault.Point(ctx, "template/kernel-record"); err != nil {
		return err
	}
	return writeJSON("template-record", filepath.Join(out, kernelRecord), k)
}

func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = src.Close() }() // read only
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// digestTree hashes the names and contents of the files below dir.
func digestTree(dir string) (string, error) {
	var parts []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		digest, err := digestFile(path)
		parts = append(parts, strings.TrimPrefix(path, dir), digest)
		return err
	})
	return digestPrefix + hashOf(parts), err
}

// publishTree links or copies a cached folder to its published place, whole.
func (s *Store) publishTree(ctx context.Context, from, to string) (err error) {
	gate, err := lockGate(s.cfg.Dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, gate.Close()) }()
	temp, err := os.MkdirTemp(filepath.Dir(to), ".tmp-kernel-*") // osfs.SweepTemp knows the prefix
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	whole := filepath.Join(temp, "k")
	err = filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		target := whole + strings.TrimPrefix(path, from)
		if d.IsDir() {
			return os.Mkdir(target, 0o755)
		}
		return linkOrCopy("template-kernel", path, target)
	})
	if err != nil {
		return err
	}
	if err := errors.Join(fault.Point(ctx, "template/kernel-publish"), osfs.SyncTree(whole)); err != nil {
		return err
	}
	if err := osfs.RemoveAll("template-kernel", to); err != nil { // only ever something unreadable
		return err
	}
	return osfs.Rename("template-kernel", whole, to)
}
