package template

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Folders below Config.Dir that are not templates. Template names never begin
// with a dot.
const (
	imagesDir    = ".image"     // <digest>.ext4
	kernelsDir   = ".kernel"    // <key>/{vmlinuz, modules/…, kernel.json}
	initramfsDir = ".initramfs" // <key>.cpio
	elfDir       = ".elf"       // <digest>.elf: kernels, unpacked
)

// Folders below Config.Cache.
const (
	workDir      = "work"
	locksDir     = "lock"
	cacheImages  = "image"
	cacheKernels = "kernel"
	cacheSteps   = "step" // disks after the RUN steps of Dockerfiles
)

const (
	templateFile   = "template.json"
	maxRecordBytes = 1 << 20
)

// Config says where a Store keeps things.
type Config struct {
	// Dir holds what is published: <name>/template.json, and images, kernels
	// and initramfs files by content. It must last.
	Dir string
	// Cache holds builds by the hash of their recipe, and builds under way. It
	// may be deleted at any time, and several stores may share it. On the file
	// system of Dir, published things are hard links into it.
	Cache string
	// Keyring is Debian's archive keyring; empty means where Debian and Ubuntu
	// install it.
	Keyring string
	Log     *slog.Logger // nil discards
}

// Store is a folder of templates. Several processes may use one at once.
type Store struct {
	cfg Config
	log *slog.Logger
}

// Template is a published base image.
type Template struct {
	Name   string `json:"name"`
	Digest string `json:"digest"` // "sha256:…" of the image's bytes
	// Image is the absolute path of a raw ext4 file system, mode 0444. Its bytes
	// never change; a rebuilt template has another path.
	Image          string            `json:"-"`
	ImageBytes     int64             `json:"image_bytes"`     // apparent size
	AllocatedBytes int64             `json:"allocated_bytes"` // blocks on the disk
	DefaultUser    string            `json:"default_user"`
	DefaultWorkdir string            `json:"default_workdir"`
	Env            map[string]string `json:"env,omitempty"`
	BuiltAt        time.Time         `json:"built_at"`
	// Key is the hash of the recipe and the builder's version.
	Key string `json:"key"`
	// Source says for people what the template was made from, and Config what
	// the image it was made from says about its use. Both are empty for one of
	// packages.
	Source string       `json:"source,omitempty"`
	Config *ImageConfig `json:"config,omitempty"`
}

// ImageConfig is what an image wants besides a user, a directory and variables.
type ImageConfig struct {
	// Start is what the image runs by itself: its entrypoint, with the command as
	// arguments.
	Start        []string          `json:"start,omitempty"`
	Healthcheck  *Healthcheck      `json:"healthcheck,omitempty"`
	ExposedPorts []string          `json:"exposed_ports,omitempty"` // "8080/tcp"
	Labels       map[string]string `json:"labels,omitempty"`
	StopSignal   string            `json:"stop_signal,omitempty"`
	Shell        []string          `json:"shell,omitempty"` // for lines, instead of /bin/sh -c
	// User is what the image says, where DefaultUser is an account of its own.
	User string `json:"user,omitempty"`
}

// Healthcheck is how to ask whether what an image starts is ready.
type Healthcheck struct {
	// Test is ["NONE"], ["CMD", program, …] or ["CMD-SHELL", line].
	Test        []string      `json:"test"`
	Interval    time.Duration `json:"interval,omitempty"` // in nanoseconds, as all here; 0: the reader's default
	Timeout     time.Duration `json:"timeout,omitempty"`
	StartPeriod time.Duration `json:"start_period,omitempty"`
	Retries     int           `json:"retries,omitempty"`
}

// Open makes the folders and clears away what crashed builds left.
func Open(cfg Config) (*Store, error) {
	if cfg.Keyring == "" {
		cfg.Keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	}
	for _, dir := range []*string{&cfg.Dir, &cfg.Cache} {
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return nil, fmt.Errorf("open template store: %w", err)
		}
		*dir = abs
	}
	s := &Store{cfg: cfg, log: cfg.Log}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	for _, dir := range []string{imagesDir, kernelsDir, initramfsDir, elfDir} {
		if err := osfs.MkdirAll("template-open", filepath.Join(cfg.Dir, dir), 0o755); err != nil {
			return nil, fmt.Errorf("open template store: %w", sandbox.NoSpace(err))
		}
	}
	if err := s.makeCache(); err != nil {
		return nil, fmt.Errorf("open template store: %w", sandbox.NoSpace(err))
	}
	if err := s.sweep(); err != nil {
		return nil, fmt.Errorf("sweep template store: %w", err)
	}
	return s, nil
}

// makeCache is called before every use: the cache may vanish at any time. Who
// can open a file for reading can also lock it: what locks hang on is closed to
// other users, who could stop every build with one flock(1).
func (s *Store) makeCache() error {
	for _, d := range []struct {
		name string
		perm fs.FileMode
	}{
		{workDir, 0o711}, // apt's own user passes through
		{locksDir, 0o700},
		{cacheImages, 0o755},
		{cacheKernels, 0o755},
		{cacheSteps, 0o700}, // unfinished, and nobody else's
	} {
		path := filepath.Join(s.cfg.Cache, d.name)
		if err := osfs.MkdirAll("template-cache", path, d.perm); err != nil {
			return err
		}
		if err := os.Chmod(path, d.perm); err != nil { // one made by an earlier version
			return err
		}
	}
	return nil
}

// Get finds a published template. The error's kind is not_found when there is
// none of that name, and invalid when it is no name at all.
func (s *Store) Get(name string) (Template, error) {
	if err := sandbox.SafeName("template", name); err != nil {
		return Template{}, err
	}
	data, err := osfs.ReadFileLimit(filepath.Join(s.cfg.Dir, name, templateFile), maxRecordBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return Template{}, sandbox.Errorf(sandbox.KindNotFound, "template %q does not exist", name)
	}
	if err != nil {
		return Template{}, fmt.Errorf("read template %q: %w", name, err)
	}
	var t Template
	if err := json.Unmarshal(data, &t); err != nil {
		return Template{}, fmt.Errorf("read template %q: %w", name, err)
	}
	t.Name = name
	if t.Image, err = s.imagePath(t.Digest); err != nil {
		return Template{}, fmt.Errorf("read template %q: %w", name, err)
	}
	info, err := os.Stat(t.Image)
	if err != nil {
		return Template{}, fmt.Errorf("template %q has lost its image: %w", name, err)
	}
	t.ImageBytes, t.AllocatedBytes = info.Size(), sparse.Allocated(info)
	return t, nil
}

// List returns the published templates by name. One that is broken is left out:
// it must not keep the others from being used.
func (s *Store) List() ([]Template, error) {
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	var list []Template
	for _, e := range entries {
		if !e.IsDir() || sandbox.SafeName("template", e.Name()) != nil {
			continue
		}
		t, err := s.Get(e.Name())
		if sandbox.Is(err, sandbox.KindNotFound) { // a folder whose build never got to publish
			continue
		}
		if err != nil {
			s.log.Error("template is broken", "template", e.Name(), "err", err)
			continue
		}
		list = append(list, t)
	}
	return list, nil
}

func (s *Store) imagePath(digest string) (string, error) {
	hash, ok := strings.CutPrefix(digest, digestPrefix)
	if !ok || !isHex(hash) {
		return "", fmt.Errorf("%q is not a digest", digest)
	}
	return filepath.Join(s.cfg.Dir, imagesDir, hash+".ext4"), nil
}
