package template

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// Bounds on kernels: a distribution's vmlinuz has 10 to 20 MB, its vmlinux
// without debug information 50 to 90 MB.
const (
	maxImageBytes = 512 << 20
	maxELFBytes   = 1 << 30
)

// Fields of the setup header, by their offset in a bzImage.
// https://docs.kernel.org/arch/x86/boot.html
const (
	offSetupSects    = 0x1f1
	offMagic         = 0x202
	offVersion       = 0x206
	offKernelVersion = 0x20e
	offPayload       = 0x248
	offPayloadLength = 0x24c
	headerEnd        = 0x250

	minProtocol = 0x0208 // the first with the payload's place
	sectorBytes = 512
)

var (
	elfMagic     = []byte("\x7fELF")
	setupMagic   = []byte("HdrS")
	gzipMagic    = []byte{0x1f, 0x8b, 8}
	xzMagic      = []byte("\xfd7zXZ\x00")
	zstdMagic    = []byte{0x28, 0xb5, 0x2f, 0xfd}
	lz4OldMagic  = []byte{0x02, 0x21, 0x4c, 0x18} // the legacy frame
	lz4BlockSize = 8 << 20                        // of the legacy frame
)

// ExtractELF writes the ELF file inside the kernel in to out, for monitors that
// boot nothing else. A kernel that is an ELF file already is copied. The kind of
// an error about the kernel itself is invalid.
func ExtractELF(in, out string) error {
	data, err := osfs.ReadFileLimit(in, maxImageBytes)
	if err != nil {
		return fmt.Errorf("extract kernel: %w", err)
	}
	image, err := extractELF(data, maxELFBytes)
	if err != nil {
		return fmt.Errorf("extract kernel %s: %w", in, err)
	}
	if err := osfs.WriteFile("template-elf", out, image, 0o444); err != nil {
		return fmt.Errorf("extract kernel: %w", sandbox.NoSpace(err))
	}
	return nil
}

func extractELF(data []byte, limit int64) ([]byte, error) {
	if bytes.HasPrefix(data, elfMagic) {
		return data, nil
	}
	payload, err := payloadOf(data)
	if err != nil {
		return nil, sandbox.WithKind(sandbox.KindInvalid, err)
	}
	image, err := unpackKernel(payload, limit)
	if err != nil {
		return nil, sandbox.WithKind(sandbox.KindInvalid, fmt.Errorf("unpack: %w", err))
	}
	if !bytes.HasPrefix(image, elfMagic) {
		return nil, sandbox.Errorf(sandbox.KindInvalid, "what the kernel unpacks to is not an ELF file")
	}
	return image, nil
}

// checkBzImage makes sure that data has a setup header.
func checkBzImage(data []byte) error {
	if len(data) < headerEnd || !bytes.Equal(data[offMagic:offMagic+4], setupMagic) {
		return errors.New("neither an ELF file nor a bzImage")
	}
	if v := binary.LittleEndian.Uint16(data[offVersion:]); v < minProtocol {
		return fmt.Errorf("a bzImage of boot protocol %d.%02d; 2.08 is the oldest that says where its payload is", v>>8, v&0xff)
	}
	return nil
}

func setupBytes(data []byte) int {
	sects := int(data[offSetupSects])
	if sects == 0 {
		sects = 4 // by the boot protocol
	}
	return (sects + 1) * sectorBytes
}

// payloadOf cuts the compressed kernel out of a bzImage.
func payloadOf(data []byte) ([]byte, error) {
	if err := checkBzImage(data); err != nil {
		return nil, err
	}
	start := int64(setupBytes(data)) + int64(binary.LittleEndian.Uint32(data[offPayload:]))
	length := int64(binary.LittleEndian.Uint32(data[offPayloadLength:]))
	if length < 8 || start+length > int64(len(data)) {
		return nil, fmt.Errorf("the payload of %d bytes at %d does not lie in the %d bytes of the file", length, start, len(data))
	}
	return data[start : start+length], nil
}

// unpackKernel decompresses a payload. All formats but gzip are followed by four
// bytes with the unpacked size, which the kernel's build appends.
func unpackKernel(payload []byte, limit int64) ([]byte, error) {
	body := payload[:len(payload)-4]
	if !bytes.HasPrefix(payload, gzipMagic) && !bytes.HasPrefix(payload, elfMagic) {
		if size := int64(binary.LittleEndian.Uint32(payload[len(body):])); size > limit {
			return nil, fmt.Errorf("it says that it unpacks to %d bytes, more than %d", size, limit)
		}
	}
	switch {
	case bytes.HasPrefix(payload, elfMagic):
		return payload, nil // CONFIG_KERNEL_UNCOMPRESSED
	case bytes.HasPrefix(payload, gzipMagic):
		r, err := gzip.NewReader(bytes.NewReader(payload))
		if err != nil {
			return nil, err
		}
		r.Multistream(false)
		return readLimit(r, limit)
	case bytes.HasPrefix(payload, zstdMagic):
		return unpackZstd(body, limit)
	case bytes.HasPrefix(payload, lz4OldMagic):
		return unpackLZ4(body, limit)
	case bytes.HasPrefix(payload, xzMagic):
		return unpackXZ(body, limit)
	}
	return nil, fmt.Errorf("unknown compression, it begins with % x", payload[:6])
}

func unpackZstd(body []byte, limit int64) ([]byte, error) {
	// The kernel's build uses level 22, whose window is 128 MiB.
	d, err := zstd.NewReader(bytes.NewReader(body), zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderMaxMemory(uint64(limit)), zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return readLimit(d, limit)
}

// unpackLZ4 reads the legacy frame: blocks of up to 8 MiB behind their length.
func unpackLZ4(body []byte, limit int64) ([]byte, error) {
	var out []byte
	block := make([]byte, min(int64(lz4BlockSize), limit+1))
	for rest := body[len(lz4OldMagic):]; len(rest) > 0; {
		if len(rest) < 4 {
			return nil, io.ErrUnexpectedEOF
		}
		size := int64(binary.LittleEndian.Uint32(rest))
		rest = rest[4:]
		if size > int64(len(rest)) {
			return nil, io.ErrUnexpectedEOF
		}
		n, err := lz4.UncompressBlock(rest[:size], block)
		if err != nil {
			return nil, err
		}
		if int64(len(out)+n) > limit {
			return nil, fmt.Errorf("it unpacks to more than %d bytes", limit)
		}
		out, rest = append(out, block[:n]...), rest[size:]
	}
	return out, nil
}

// unpackXZ asks the xz tool: kernels use its x86 filter, which the Go library
// does not have.
func unpackXZ(body []byte, limit int64) (_ []byte, err error) {
	path, err := exec.LookPath("xz")
	if err != nil {
		return nil, sandbox.Errorf(sandbox.KindUnsupported, "xz is not installed: apt-get install xz-utils")
	}
	var stderr tail
	cmd := exec.Command(path, "--decompress", "--stdout", "--single-stream")
	cmd.Stdin, cmd.Stderr = bytes.NewReader(body), &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	image, err := readLimit(stdout, limit)
	if err != nil {
		_ = cmd.Process.Kill() // gone already, or stopped here
	}
	if e := cmd.Wait(); err == nil && e != nil {
		stderr.flush()
		err = fmt.Errorf("xz: %w: %s", e, stderr.text())
	}
	return image, err
}

// kernelRelease reads the release that a bzImage says it is; an ELF file does
// not say. A file that is neither is invalid.
func kernelRelease(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()                                  // read only
	data, err := io.ReadAll(io.LimitReader(f, sectorBytes+0xffff+64)) // kernel_version is 16 bits wide
	if err != nil {
		return "", err
	}
	return releaseOf(data)
}

func releaseOf(data []byte) (string, error) {
	if bytes.HasPrefix(data, elfMagic) {
		return "", nil
	}
	if err := checkBzImage(data); err != nil {
		return "", sandbox.WithKind(sandbox.KindInvalid, err)
	}
	offset := int(binary.LittleEndian.Uint16(data[offKernelVersion:]))
	if offset == 0 || offset+sectorBytes >= len(data) {
		return "", nil
	}
	text, _, _ := bytes.Cut(data[offset+sectorBytes:min(len(data), offset+sectorBytes+64)], []byte{0})
	release, _, _ := strings.Cut(string(text), " ")
	return strings.ToValidUTF8(release, "?"), nil
}
