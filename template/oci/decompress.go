package oci

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"errors"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/xi2/xz"
)

// maxWindow is the most that a stream of zstd or xz may make us remember; it is
// what the zstd tool accepts by itself, and twice what "xz -9" asks for.
const maxWindow = 128 << 20

// How the formats begin. A name in a plain tar file can begin with "BZh": of bzip2
// the head of its first block, or of its end, is looked at, too.
var (
	gzipMagic  = []byte{0x1f, 0x8b}
	zstdMagic  = []byte{0x28, 0xb5, 0x2f, 0xfd}
	xzMagic    = []byte("\xfd7zXZ\x00")
	bzip2Magic = []byte("BZh")
	bzip2Block = []byte{0x31, 0x41, 0x59, 0x26, 0x53, 0x59}
	bzip2End   = []byte{0x17, 0x72, 0x45, 0x38, 0x50, 0x90}
)

const longestMagic = 10

// decompress looks at what a stream is, whatever its media type says. The
// function it returns is called at the end.
func decompress(r io.Reader) (io.Reader, func(), error) {
	from := &supply{r: r}
	buffered := bufio.NewReaderSize(from, 64<<10)
	head, err := buffered.Peek(longestMagic)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	done := func() {}
	var format string
	var plain io.Reader
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		format = "gzip"
		plain, err = gzip.NewReader(buffered)
	case bytes.HasPrefix(head, zstdMagic):
		var z *zstd.Decoder
		z, err = zstd.NewReader(buffered, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow),
			zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(1<<62))
		if format, plain = "zstd", z; err == nil {
			done = z.Close
		}
	case bytes.HasPrefix(head, xzMagic):
		format = "xz"
		plain, err = xz.NewReader(buffered, maxWindow)
	case isBzip2(head):
		format, plain, err = "bzip2", bzip2.NewReader(buffered), nil
	default:
		return buffered, done, nil
	}
	out := unpacked{plain, from, format}
	if err != nil {
		return nil, nil, out.explain(err)
	}
	return out, done, nil
}

func isBzip2(head []byte) bool {
	level, ok := bytes.CutPrefix(head, bzip2Magic)
	return ok && len(level) > 0 && level[0] >= '1' && level[0] <= '9' && (bytes.HasPrefix(level[1:], bzip2Block) || bytes.HasPrefix(level[1:], bzip2End))
}

// supply remembers why it could not go on.
type supply struct {
	r   io.Reader
	err error
}

func (s *supply) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// unpacked is what comes out of a decompressor. What that finds wrong is the
// stream's fault, unless its supply has failed.
type unpacked struct {
	r      io.Reader
	from   *supply
	format string
}

func (u unpacked) Read(p []byte) (int, error) {
	n, err := u.r.Read(p)
	return n, u.explain(err)
}

func (u unpacked) explain(err error) error {
	switch {
	case err == nil || err == io.EOF: // one that is wrapped is somebody's complaint
		return err
	case u.from.err != nil:
		return u.from.err
	}
	return invalid("its %s stream is broken: %w", u.format, err)
}
