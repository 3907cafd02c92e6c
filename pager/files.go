package pager

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
)

// Image is one file as it is composed.
type Image interface {
	io.ReaderAt
	Bytes() int64
	Close() error
}

// Source knows the images that may be asked for.
type Source interface {
	// Open opens an image by name; fs.ErrNotExist if there is none. The same name
	// has the same bytes for ever.
	Open(name string) (Image, error)
	// Names lists all of them, in any order.
	Names() ([]string, error)
}

// Files serves a source's images; it is fuse.Files. An image is opened when it is
// first needed and closed when the kernel has no more use for it.
type Files struct {
	source Source
	log    *slog.Logger

	mu   sync.Mutex // guards what is below
	open map[uint64]*file
	// names are those that the source had when a node was asked for that nobody
	// had looked up: by a kernel that another server had told its node ID.
	names map[uint64]string
	// damaged are the names of images of which something could not be read.
	damaged map[string]bool
}

// damagedPrefix begins the name of an empty file that is there when something of the
// image behind the prefix could not be read.
const damagedPrefix = "damaged."

// file is one that is open, or being opened.
type file struct {
	once  sync.Once
	image Image
	err   error
	users int // guarded by Files.mu
	gone  bool
}

// NewFiles serves a source. Failures go to the log, one line each.
func NewFiles(source Source, log *slog.Logger) *Files {
	return &Files{source: source, log: log, open: map[uint64]*file{}, names: map[uint64]string{}, damaged: map[string]bool{}}
}

// nodeOf is the node ID of a name: for every server the same.
func nodeOf(name string) uint64 {
	sum := sha256.Sum256([]byte(name))
	return binary.BigEndian.Uint64(sum[:]) | 1<<63 // not 0, and not the root's 1
}

// Resolve opens an image.
func (f *Files) Resolve(name string) (node uint64, size int64, err error) {
	node = nodeOf(name)
	f.mu.Lock()
	if image, ok := strings.CutPrefix(name, damagedPrefix); ok {
		defer f.mu.Unlock()
		if f.damaged[image] {
			return node, 0, nil
		}
		return node, 0, fs.ErrNotExist
	}
	if other, taken := f.names[node]; taken && other != name {
		f.mu.Unlock()
		return node, 0, fmt.Errorf("%s has the node ID of %s", name, other)
	}
	f.names[node] = name
	f.mu.Unlock()
	size, err = f.Size(node)
	return node, size, err
}

// Size is an image's.
func (f *Files) Size(node uint64) (size int64, err error) {
	err = f.with(node, func(i Image) error { size = i.Bytes(); return nil })
	return size, err
}

// ReadAt reads from an image.
func (f *Files) ReadAt(node uint64, p []byte, off int64) error {
	return f.with(node, func(i Image) error {
		n, err := i.ReadAt(p, off)
		if n == len(p) {
			return nil
		}
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return err
	})
}

// Forget closes an image; it is opened again if it is asked for again.
func (f *Files) Forget(node uint64) {
	f.mu.Lock()
	file := f.open[node]
	delete(f.open, node)
	f.mu.Unlock()
	if file != nil {
		f.leave(file, true)
	}
}

// Failed logs what could not be served.
func (f *Files) Failed(node uint64, off int64, size int, err error) {
	f.mu.Lock()
	name := f.names[node]
	if size > 0 && name != "" {
		f.damaged[name] = true
	}
	f.mu.Unlock()
	f.log.Error("not served", "image", name, "offset", off, "bytes", size, "err", err)
}

// Close closes every image.
func (f *Files) Close() error {
	f.mu.Lock()
	nodes := make([]uint64, 0, len(f.open))
	for node := range f.open {
		nodes = append(nodes, node)
	}
	f.mu.Unlock()
	for _, node := range nodes {
		f.Forget(node)
	}
	return nil
}

// with uses an image, which stays open meanwhile.
func (f *Files) with(node uint64, use func(Image) error) error {
	f.mu.Lock()
	of := f.open[node]
	if of == nil {
		of = &file{}
		f.open[node] = of
	}
	of.users++
	f.mu.Unlock()
	defer f.leave(of, false)
	of.once.Do(func() { of.image, of.err = f.openNode(node) })
	if of.err != nil {
		f.mu.Lock()
		if f.open[node] == of { // the next one tries again
			delete(f.open, node)
		}
		f.mu.Unlock()
		return of.err
	}
	return use(of.image)
}

// leave closes an image that was forgotten, after its last user.
func (f *Files) leave(of *file, forgotten bool) {
	f.mu.Lock()
	if forgotten {
		of.gone = true
	} else {
		of.users--
	}
	last := of.gone && of.users == 0 && of.image != nil
	image := of.image
	if last {
		of.image = nil
	}
	f.mu.Unlock()
	if last {
		if err := image.Close(); err != nil {
			f.log.Warn("image not closed", "err", err)
		}
	}
}

func (f *Files) openNode(node uint64) (Image, error) {
	name, err := f.nameOf(node)
	if err != nil {
		return nil, err
	}
	return f.source.Open(name)
}

// nameOf finds the name of a node that another server looked up.
func (f *Files) nameOf(node uint64) (string, error) {
	f.mu.Lock()
	name, ok := f.names[node]
	f.mu.Unlock()
	if ok {
		return name, nil
	}
	all, err := f.source.Names()
	if err != nil {
		return "", err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, name := range all {
		f.names[nodeOf(name)] = name
	}
	if name, ok = f.names[node]; !ok {
		return "", fmt.Errorf("nobody knows node %x: %w", node, fs.ErrNotExist)
	}
	return name, nil
}
