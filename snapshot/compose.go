package snapshot

import (
	"errors"
	"fmt"
	"io"
)

// Image is a manifest with its layers open: the bytes of a memory or a disk. It
// may be read from any goroutine.
type Image struct {
	manifest *Manifest
	layers   []*Layer
	release  func() error
}

// Manifest is what the image is made of.
func (i *Image) Manifest() *Manifest { return i.manifest }

// Layer is the open layer of that number in the manifest.
func (i *Image) Layer(n int) *Layer { return i.layers[n] }

// Close gives the layers back.
func (i *Image) Close() error { return i.release() }

// ReadAt composes bytes of the image.
func (i *Image) ReadAt(p []byte, off int64) (n int, err error) {
	size := i.manifest.Bytes()
	if off < 0 || off > size {
		return 0, fmt.Errorf("read at byte %d of an image that has %d", off, size)
	}
	if rest := size - off; int64(len(p)) > rest {
		p, err = p[:rest], io.EOF
	}
	if len(p) == 0 {
		return 0, err
	}
	for at := i.manifest.extents.find(off / BlockBytes); n < len(p); at++ {
		e := i.manifest.Extent(at)
		part := p[n:min(int64(len(p)), int64(n)+e.End()*BlockBytes-(off+int64(n)))]
		if e.Layer == Zero {
			clear(part)
			n += len(part)
			continue
		}
		got, err := i.layers[e.Layer].ReadAt(part, off+int64(n)-e.Start*BlockBytes+e.Offset*BlockBytes)
		n += got
		if err != nil && (got < len(part) || !errors.Is(err, io.EOF)) { // a layer may end with the part
			return n, err
		}
	}
	return n, err
}
