package template_test

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"

	"github.com/dormouse-sandbox/dormouse/internal/testkit"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
)

const fakeRelease = "6.1.0-9-fake"

// bzImage wraps a payload the way the kernel's build does.
func bzImage(payload []byte) []byte {
	const setupSects = 3
	data := make([]byte, (setupSects+1)*512)
	data[0x1f1] = setupSects
	copy(data[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(data[0x206:], 0x020f)
	binary.LittleEndian.PutUint16(data[0x20e:], 0x400)
	copy(data[0x600:], fakeRelease+" (builder@host) #1\x00")
	binary.LittleEndian.PutUint32(data[0x248:], 64)
	binary.LittleEndian.PutUint32(data[0x24c:], uint32(len(payload)))
	data = append(data, make([]byte, 64)...)
	data = append(data, payload...)
	return append(data, make([]byte, 128)...)
}

// fakeELF looks like a kernel to whoever reads four bytes, and compresses.
func fakeELF(size int) []byte {
	return append([]byte("\x7fELF"), bytes.Repeat([]byte("dormouse sleeps. "), size/17+1)[:size-4]...)
}

func withSize(packed []byte, size int) []byte {
	return binary.LittleEndian.AppendUint32(packed, uint32(size))
}

func packGzip(t testing.TB, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func packZstd(t testing.TB, data []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(data, nil)
}

// packLZ4 writes the legacy frame, in blocks of 8 MiB.
func packLZ4(t testing.TB, data []byte) []byte {
	t.Helper()
	out := []byte{0x02, 0x21, 0x4c, 0x18}
	for len(data) > 0 {
		n := min(len(data), 8<<20)
		block := make([]byte, lz4.CompressBlockBound(n))
		packed, err := lz4.CompressBlock(data[:n], block, nil)
		if err != nil || packed == 0 {
			t.Fatalf("lz4: %d, %v", packed, err)
		}
		out = binary.LittleEndian.AppendUint32(out, uint32(packed))
		out = append(out, block[:packed]...)
		data = data[n:]
	}
	return out
}

// packXZ uses the filter that kernels use.
func packXZ(t testing.TB, data []byte) []byte {
	t.Helper()
	cmd := exec.Command("xz", "--check=crc32", "--x86", "--lzma2=dict=1MiB", "--stdout")
	cmd.Stdin = bytes.NewReader(data)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestExtractELFFromEveryCompression(t *testing.T) {
	testkit.Tool(t, "xz")
	image := fakeELF(20 << 20)
	for name, data := range map[string][]byte{
		"an ELF file":           image,
		"a bzImage with gzip":   bzImage(packGzip(t, image)),
		"a bzImage with xz":     bzImage(withSize(packXZ(t, image), len(image))),
		"a bzImage with zstd":   bzImage(withSize(packZstd(t, image), len(image))),
		"a bzImage with lz4":    bzImage(withSize(packLZ4(t, image), len(image))),
		"a bzImage without any": bzImage(image),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
			if err := os.WriteFile(in, data, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := template.ExtractELF(in, out); err != nil {
				t.Fatal(err)
			}
			if got, _ := os.ReadFile(out); !bytes.Equal(got, image) {
				t.Errorf("%d other bytes came out", len(got))
			}
		})
	}
}

func TestExtractELFRefuses(t *testing.T) {
	testkit.Tool(t, "xz")
	const limit = 1 << 20
	bomb := fakeELF(4 << 20)
	old := bzImage(packGzip(t, fakeELF(1000)))
	binary.LittleEndian.PutUint16(old[0x206:], 0x0207)
	beyond := bzImage(packGzip(t, fakeELF(1000)))
	binary.LittleEndian.PutUint32(beyond[0x24c:], 1<<31)
	wrapped := bzImage(packGzip(t, fakeELF(1000)))
	binary.LittleEndian.PutUint32(wrapped[0x248:], 0xffffffff)
	cut := packLZ4(t, fakeELF(1000))
	for name, tt := range map[string]struct {
		data []byte
		says string
	}{
		"an empty file":                   {nil, "neither an ELF file nor a bzImage"},
		"a text":                          {bytes.Repeat([]byte("text "), 1000), "neither an ELF file nor a bzImage"},
		"an old boot protocol":            {old, "boot protocol 2.07"},
		"a payload beyond the end":        {beyond, "does not lie in"},
		"an offset that would wrap":       {wrapped, "does not lie in"},
		"an unknown compression":          {bzImage(withSize([]byte("LZO is not for us"), 1000)), "unknown compression"},
		"a payload that is no ELF":        {bzImage(packGzip(t, []byte("not a kernel"))), "not an ELF file"},
		"a truncated lz4 block":           {bzImage(withSize(cut[:len(cut)-3], 1000)), "unexpected EOF"},
		"a gzip bomb":                     {bzImage(packGzip(t, bomb)), "more than 1048576"},
		"a zstd bomb that lies":           {bzImage(withSize(packZstd(t, bomb), 1000)), ""},
		"a lz4 bomb that lies":            {bzImage(withSize(packLZ4(t, bomb), 1000)), ""},
		"an xz bomb that lies":            {bzImage(withSize(packXZ(t, bomb), 1000)), "more than 1048576"},
		"a zstd bomb that tells":          {bzImage(withSize(packZstd(t, bomb), len(bomb))), "it says that it unpacks"},
		"a setup header and nothing":      {bzImage(nil)[:0x250], "does not lie in"},
		"an xz payload that is not whole": {bzImage(withSize(packXZ(t, fakeELF(1000))[:60], 1000)), "xz: "},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := template.ExtractELFFrom(tt.data, limit)
			if !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
			}
		})
	}
}

// fakeModule makes a relocatable ELF file with a .modinfo section.
func fakeModule(info string) []byte {
	names := "\x00.shstrtab\x00.modinfo\x00"
	const headerSize, sectionSize = 64, 64
	infoAt := headerSize
	namesAt := infoAt + len(info)
	sectionsAt := (namesAt + len(names) + 7) &^ 7
	var buf bytes.Buffer
	header := elf.Header64{
		Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Shoff: uint64(sectionsAt),
		Ehsize: headerSize, Shentsize: sectionSize, Shnum: 3, Shstrndx: 1,
	}
	copy(header.Ident[:], "\x7fELF\x02\x01\x01")
	_ = binary.Write(&buf, binary.LittleEndian, header) // a buffer takes everything
	buf.WriteString(info + names)
	buf.Write(make([]byte, sectionsAt-buf.Len()))
	for _, section := range []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_STRTAB), Off: uint64(namesAt), Size: uint64(len(names))},
		{Name: 11, Type: uint32(elf.SHT_PROGBITS), Off: uint64(infoAt), Size: uint64(len(info))},
	} {
		_ = binary.Write(&buf, binary.LittleEndian, section)
	}
	return buf.Bytes()
}

// fakeModules is a modules folder: every suffix, both spellings, a soft
// dependency, one that is missing, built-in ones, and one nobody needs.
func fakeModules(t *testing.T, dir string) {
	t.Helper()
	var packed bytes.Buffer
	w, err := xz.NewWriter(&packed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(fakeModule("depends=virtio,virtio_ring\x00license=GPL\x00")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"kernel/drivers/virtio/virtio.ko":                     fakeModule("depends=virtio_ring\x00"),
		"kernel/drivers/virtio/virtio_ring.ko.zst":            packZstd(t, fakeModule("depends=\x00")),
		"kernel/drivers/virtio/virtio_mmio.ko.xz":             packed.Bytes(),
		"kernel/drivers/block/virtio_blk.ko.gz":               packGzip(t, fakeModule("depends=virtio_ring,virtio\x00")),
		"kernel/drivers/net/virtio_net.ko":                    fakeModule("depends=virtio,net_failover\x00"),
		"kernel/drivers/net/net_failover.ko":                  fakeModule("depends=failover\x00"),
		"kernel/net/core/failover.ko":                         fakeModule("depends=\x00"),
		"kernel/drivers/char/hw_random/virtio-rng.ko":         fakeModule("depends=virtio\x00"),
		"kernel/fs/ext4/ext4.ko":                              fakeModule("softdep=pre: crc32c nonesuch post: later\x00depends=jbd2,mbcache\x00"),
		"kernel/fs/jbd2/jbd2.ko":                              fakeModule("depends=\x00"),
		"kernel/lib/crc32c.ko":                                fakeModule("depends=\x00"),
		"kernel/drivers/gpu/drm/amd/amdgpu/amdgpu.ko":         fakeModule("depends=drm\x00"),
		"modules.builtin":                                     []byte("kernel/fs/mbcache.ko\nkernel/fs/overlayfs/overlay.ko\n"),
		"modules.order":                                       []byte("kernel/fs/jbd2/jbd2.ko\n"),
		"kernel/arch/x86/crypto/not-a-module.ko.unknown-type": []byte("x"),
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// fakeOrder is the one order in which fakeModules can be loaded, given the
// order of what the guest wants.
var fakeOrder = []string{
	"virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "failover", "net_failover", "virtio_net", "virtio_rng",
	"crc32c", "jbd2", "ext4",
}

// writeKernelTree is what the Debian package unpacks to.
func writeKernelTree(t *testing.T, root string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(root, "boot"), 0o755); err != nil {
		t.Fatal(err)
	}
	image := bzImage(packGzip(t, fakeELF(5000)))
	if err := os.WriteFile(filepath.Join(root, "boot/vmlinuz-"+fakeRelease), image, 0o644); err != nil {
		t.Fatal(err)
	}
	fakeModules(t, filepath.Join(root, "lib/modules", fakeRelease))
}

func TestDebianKernelIsFetchedOnce(t *testing.T) {
	f := newFakes(t, fakeBoth(t))
	cfg := config(t)
	first, err := open(t, cfg).Kernel(t.Context(), template.KernelConfig{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	again, err := open(t, cfg).Kernel(t.Context(), template.KernelConfig{}, nil)
	if err != nil || again != first || f.runs(t, "mmdebstrap") != 1 {
		t.Errorf("second time: %+v, %v, %d runs", again, err, f.runs(t, "mmdebstrap"))
	}
	if first.Release != fakeRelease || first.Digest == "" {
		t.Errorf("kernel is %+v", first)
	}
	var names []string
	err = filepath.WalkDir(first.ModulesDir, func(path string, d os.DirEntry, err error) error {
		if strings.HasSuffix(path, ".ko") {
			names = append(names, d.Name())
		}
		return err
	})
	if err != nil || len(names) != len(fakeOrder) {
		t.Errorf("%d modules kept, not %d: %v, %v", len(names), len(fakeOrder), names, err)
	}
	noTemp(t, cfg)
}

func TestGivenKernels(t *testing.T) {
	testkit.Root(t)
	dir := t.TempDir()
	writeKernelTree(t, dir)
	image := filepath.Join(dir, "boot/vmlinuz-"+fakeRelease)
	plain := filepath.Join(dir, "vmlinux")
	if err := os.WriteFile(plain, fakeELF(9000), 0o644); err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(dir, "text")
	if err := os.WriteFile(bad, []byte("this is not a kernel"), 0o644); err != nil {
		t.Fatal(err)
	}
	modules := filepath.Join(dir, "lib/modules", fakeRelease)
	for _, tt := range []struct {
		name    string
		cfg     template.KernelConfig
		kind    sandbox.Kind // empty: it works
		release string
	}{
		{"a bzImage with its modules", template.KernelConfig{Image: image, ModulesDir: modules}, "", fakeRelease},
		{"a bzImage with everything built in", template.KernelConfig{Image: image}, "", fakeRelease},
		{"an ELF file takes its release from the folder", template.KernelConfig{Image: plain, ModulesDir: modules}, "", fakeRelease},
		{"an ELF file alone has none", template.KernelConfig{Image: plain}, "", ""},
		{"a text", template.KernelConfig{Image: bad}, sandbox.KindInvalid, ""},
		{"a missing image", template.KernelConfig{Image: dir + "/none"}, sandbox.KindNotFound, ""},
		{"a missing modules folder", template.KernelConfig{Image: image, ModulesDir: dir + "/none"}, sandbox.KindNotFound, ""},
		{"modules of another kind", template.KernelConfig{Image: image, ModulesDir: filepath.Join(modules, "kernel/fs")}, sandbox.KindInvalid, ""},
		{"modules without a kernel", template.KernelConfig{ModulesDir: modules}, sandbox.KindInvalid, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := config(t)
			k, err := open(t, cfg).Kernel(t.Context(), tt.cfg, nil)
			if tt.kind != "" {
				if !sandbox.Is(err, tt.kind) {
					t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
				}
				nothingLeft(t, cfg)
				return
			}
			if err != nil || k.Release != tt.release || (k.ModulesDir != "") != (tt.cfg.ModulesDir != "") {
				t.Errorf("kernel is %+v, %v", k, err)
			}
			noTemp(t, cfg)
		})
	}
}
