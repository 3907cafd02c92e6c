package template_test

import (
	"bytes"
	"testing"

	"github.com/dormouse-sandbox/dormouse/template"
)

const fuzzLimit = 1 << 20

func FuzzExtractELF(f *testing.F) {
	image := fakeELF(2000)
	f.Add(image)
	f.Add(bzImage(packGzip(f, image)))
	f.Add(bzImage(withSize(packZstd(f, image), len(image))))
	f.Add(bzImage(withSize(packLZ4(f, image), len(image))))
	f.Add(bzImage(nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		out, err := template.ExtractELFFrom(data, fuzzLimit)
		if err == nil && !bytes.HasPrefix(out, []byte("\x7fELF")) {
			t.Error("success without an ELF file")
		}
		if len(out) > max(fuzzLimit, len(data)) {
			t.Errorf("%d bytes came out of %d", len(out), len(data))
		}
		_, _ = template.ReleaseOf(data) // must not panic
	})
}

// A kernel cut off anywhere is an error, never other bytes.
func TestTruncatedKernels(t *testing.T) {
	image := fakeELF(3000)
	for _, whole := range [][]byte{
		bzImage(packGzip(t, image)), bzImage(withSize(packZstd(t, image), len(image))), bzImage(withSize(packLZ4(t, image), len(image))),
	} {
		end := len(whole) - 128 // where the payload ends
		for n := range end {
			if _, err := template.ExtractELFFrom(whole[:n], fuzzLimit); err == nil {
				t.Fatalf("no error at %d of %d bytes", n, end)
			}
		}
	}
}

func FuzzModinfo(f *testing.F) {
	f.Add(fakeModule("depends=virtio,virtio_ring\x00softdep=pre: crc32c post: x\x00"))
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _ = template.ParseModinfo(data) // must not panic
		info := template.ParseModinfoText(data)
		_ = info
		for name := range template.ParseBuiltin(data) {
			if name == "" || bytes.ContainsAny([]byte(name), "/-") {
				t.Errorf("module name %q", name)
			}
		}
	})
}
