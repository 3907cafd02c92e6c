package template

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Bounds on files from a modules folder.
const (
	maxModuleBytes  = 64 << 20
	maxBuiltinBytes = 4 << 20
)

// wanted are the modules that the guest needs before its root file system is
// there, and those its programs cannot load later, since the image holds no
// modules. Any of them may be built in instead.
var wanted = []struct {
	name string
	must bool // the guest cannot work without it
}{
	{"virtio_ring", true},
	{"virtio", true},
	{"virtio_mmio", true},
	{"virtio_pci", false},
	{"virtio_blk", true},
	{"failover", false},
	{"net_failover", false},
	{"virtio_net", true},
	{"virtio_rng", false},
	{"virtio_console", false},
	{"overlay", false},
	{"tcp_diag", false},       // a copy ends the connections of its past by it
	{"crc32c_generic", false}, // ext4 asks for it by another name, so it is in no list of dependencies
	{"ext4", true},
}

// wantedNames are the names of the wanted modules.
func wantedNames() []string {
	var names []string
	for _, w := range wanted {
		names = append(names, w.name)
	}
	return names
}

// module is one loadable module.
type module struct {
	name string
	path string // its file
	data []byte // decompressed
}

// moduleSet finds modules in a folder of the form /lib/modules/RELEASE.
//
// It does not read modules.dep: packages do not contain it, and depmod may not
// be on the host. What depmod knows is in the modules themselves.
type moduleSet struct {
	files   map[string]string // by name
	builtin map[string]bool
}

func openModules(dir string) (*moduleSet, error) {
	set := &moduleSet{files: map[string]string{}}
	data, err := osfs.ReadFileLimit(filepath.Join(dir, "modules.builtin"), maxBuiltinBytes)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	set.builtin = parseBuiltin(data)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if name, ok := moduleName(d.Name()); ok {
				set.files[name] = path
			}
		}
		return err
	})
	return set, err
}

// parseBuiltin reads modules.builtin: one path of a module per line.
func parseBuiltin(data []byte) map[string]bool {
	builtin := map[string]bool{}
	for line := range strings.Lines(string(data)) {
		if name, ok := moduleName(filepath.Base(strings.TrimSpace(line))); ok {
			builtin[name] = true
		}
	}
	return builtin
}

// moduleName is the name of the module in a file. The kernel does not tell a
// dash from an underscore; file names have either.
func moduleName(file string) (string, bool) {
	name, suffix, ok := strings.Cut(file, ".ko")
	switch suffix {
	case "", ".xz", ".zst", ".gz":
		return strings.ReplaceAll(name, "-", "_"), ok && name != ""
	}
	return "", false
}

// needed returns the wanted modules and all they depend on, in the order in
// which they must be loaded.
func (set *moduleSet) needed() ([]module, error) {
	walk := moduleWalk{set: set, done: map[string]bool{}}
	for _, w := range wanted {
		_, loadable := set.files[w.name]
		if !loadable && !set.builtin[w.name] && w.must {
			return nil, sandbox.Errorf(sandbox.KindInvalid, "the kernel has no %s, neither built in nor as a module", w.name)
		}
		if err := walk.visit(w.name, !loadable); err != nil {
			return nil, err
		}
	}
	return walk.order, nil
}

// moduleWalk orders modules behind what they depend on.
type moduleWalk struct {
	set   *moduleSet
	done  map[string]bool // visited, or being visited: cycles end here
	order []module
}

func (w *moduleWalk) visit(name string, optional bool) error {
	if w.done[name] || w.set.builtin[name] {
		return nil
	}
	path, ok := w.set.files[name]
	if !ok {
		if optional {
			return nil
		}
		return sandbox.Errorf(sandbox.KindInvalid, "a module depends on %s, which the kernel does not have", name)
	}
	w.done[name] = true
	data, err := readModule(path)
	if err != nil {
		return fmt.Errorf("read module %s: %w", name, err)
	}
	info, err := parseModinfo(data)
	if err != nil {
		return fmt.Errorf("read module %s: %w", name, err)
	}
	for _, dep := range info.softdeps {
		if err := w.visit(dep, true); err != nil {
			return err
		}
	}
	for _, dep := range info.depends {
		if err := w.visit(dep, false); err != nil {
			return err
		}
	}
	w.order = append(w.order, module{name: name, path: path, data: data})
	return nil
}

type modinfo struct {
	depends  []string
	softdeps []string // to be loaded first, if they exist
}

// parseModinfo reads the .modinfo section of a module: NUL-separated key=value.
func parseModinfo(data []byte) (modinfo, error) {
	file, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return modinfo{}, fmt.Errorf("not a module: %w", err)
	}
	section := file.Section(".modinfo")
	if section == nil {
		return modinfo{}, errors.New("not a module: it has no .modinfo section")
	}
	if section.Type == elf.SHT_NOBITS || section.FileSize > uint64(len(data)) {
		return modinfo{}, errors.New("not a module: its .modinfo section is beyond its end")
	}
	text, err := section.Data()
	if err != nil {
		return modinfo{}, fmt.Errorf("not a module: %w", err)
	}
	return parseModinfoText(text), nil
}

func parseModinfoText(text []byte) modinfo {
	var info modinfo
	for item := range bytes.SplitSeq(text, []byte{0}) {
		key, value, _ := strings.Cut(string(item), "=")
		value = strings.ReplaceAll(value, "-", "_")
		switch key {
		case "depends":
			for dep := range strings.SplitSeq(value, ",") {
				if dep != "" {
					info.depends = append(info.depends, dep)
				}
			}
		case "softdep":
			info.softdeps = append(info.softdeps, softdeps(value)...)
		}
	}
	return info
}

// softdeps takes the names before "post:" from "pre: a b post: c".
func softdeps(value string) []string {
	var names []string
	pre := false
	for _, word := range strings.Fields(value) {
		switch {
		case word == "pre:":
			pre = true
		case word == "post:":
			pre = false
		case pre:
			names = append(names, word)
		}
	}
	return names
}

// readModule reads a module's file and decompresses it by its suffix.
func readModule(path string) ([]byte, error) {
	data, err := osfs.ReadFileLimit(path, maxModuleBytes)
	if err != nil {
		return nil, err
	}
	var r io.Reader
	switch filepath.Ext(path) {
	case ".ko":
		return data, nil
	case ".xz":
		r, err = xz.NewReader(bytes.NewReader(data))
	case ".zst":
		var d *zstd.Decoder
		d, err = zstd.NewReader(bytes.NewReader(data), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxModuleBytes))
		if err == nil {
			defer d.Close()
		}
		r = d
	case ".gz":
		r, err = gzip.NewReader(bytes.NewReader(data))
	default:
		return nil, fmt.Errorf("%s is not the file of a module", path)
	}
	if err != nil {
		return nil, err
	}
	return readLimit(r, maxModuleBytes)
}

// readLimit reads everything, or fails when there is more than limit: a
// decompressor must not fill the memory.
func readLimit(r io.Reader, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(data)) > limit {
		return nil, fmt.Errorf("it unpacks to more than %d bytes", limit)
	}
	return data, err
}

// copyModules writes what a guest needs from one modules folder into another,
// decompressed. Names keep their path below the folder.
func copyModules(from, to string) error {
	set, err := openModules(from)
	if err != nil {
		return err
	}
	modules, err := set.needed()
	if err != nil {
		return err
	}
	for _, m := range modules {
		rel, err := filepath.Rel(from, m.path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, strings.TrimSuffix(rel, filepath.Ext(rel)))
		if strings.HasSuffix(rel, ".ko") {
			target = filepath.Join(to, rel)
		}
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(target, m.data, 0o444); err != nil {
			return err
		}
	}
	builtin, err := osfs.ReadFileLimit(filepath.Join(from, "modules.builtin"), maxBuiltinBytes)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(to, "modules.builtin"), builtin, 0o444)
}
