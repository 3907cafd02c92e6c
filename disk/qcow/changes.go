package qcow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/dormouse-sandbox/dormouse/disk"
)

// changes is what the lower overlays of a line held: disk.Changes.
type changes struct {
	size  int64
	runs  []disk.BlockRun
	line  []*mapping // from the base up
	base  *os.File
	files []*os.File // all that is open
}

// openChanges reads the first n overlays of a disk. They are not written to any
// more, or not now.
func openChanges(ctx context.Context, config disk.Config, n int) (_ *changes, err error) {
	c := &changes{size: config.SizeBytes}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	if c.base, err = os.Open(config.Base); err != nil {
		return nil, fmt.Errorf("open base: %w", err)
	}
	c.files = append(c.files, c.base)
	set := disk.NewBlocks(config.SizeBytes)
	for i := range n {
		m, f, err := openOverlay(config, i)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", overlayPath(config.Dir, i), err)
		}
		c.files, c.line = append(c.files, f), append(c.line, m)
		if err := m.mark(ctx, set); err != nil {
			return nil, fmt.Errorf("%s: %w", overlayPath(config.Dir, i), err)
		}
	}
	c.runs = set.Runs()
	return c, nil
}

// openOverlay opens one overlay of a line, if it is what it has to be.
func openOverlay(config disk.Config, n int) (_ *mapping, _ *os.File, err error) {
	f, err := openRegular(overlayPath(config.Dir, n))
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close() // read only
		}
	}()
	data, err := io.ReadAll(io.NewSectionReader(f, 0, maxHeader))
	if err != nil {
		return nil, nil, err
	}
	h, err := parseHeader(data)
	if err != nil {
		return nil, nil, err
	}
	if want := headerOf(config, n); h != want {
		return nil, nil, fmt.Errorf("it is %v, not %v", h, want)
	}
	g, err := parseGeometry(data)
	if err != nil {
		return nil, nil, err
	}
	m, err := openMapping(f, g, config.SizeBytes)
	return m, f, err
}

// openRegular opens a regular file, without following a link.
func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("not a regular file: %w", fs.ErrInvalid)
	}
	if err != nil {
		_ = f.Close() // read only
		return nil, err
	}
	return f, nil
}

// Runs lists what the overlays hold.
func (c *changes) Runs() []disk.BlockRun { return c.runs }

// Close closes the files.
func (c *changes) Close() error {
	var errs []error
	for _, f := range c.files {
		errs = append(errs, f.Close())
	}
	c.files = nil
	return errors.Join(errs...)
}

// place is where bytes of the disk are: from nil are zeros.
type place struct {
	from io.ReaderAt
	at   int64
}

// ReadAt reads what the guest would.
func (c *changes) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 || off > c.size {
		return 0, fmt.Errorf("read at byte %d of a disk that has %d", off, c.size)
	}
	if rest := c.size - off; int64(len(p)) > rest {
		p, err = p[:rest], io.EOF
	}
	for n < len(p) {
		at := off + int64(n)
		where, length, err := c.stretch(at, int64(len(p)-n))
		if err != nil {
			return n, fmt.Errorf("read at byte %d: %w", at, err)
		}
		if err := where.read(p[n:][:length]); err != nil {
			return n, fmt.Errorf("read at byte %d: %w", at, err)
		}
		n += int(length)
	}
	return n, err
}

// stretch says where bytes from off on are, and how many of at most so many lie
// there behind one another.
func (c *changes) stretch(off, most int64) (place, int64, error) {
	first, err := c.find(off / disk.BlockBytes)
	if err != nil {
		return place{}, 0, err
	}
	first.at += off % disk.BlockBytes
	length := disk.BlockBytes - off%disk.BlockBytes
	for length < most {
		next, err := c.find((off + length) / disk.BlockBytes)
		if err != nil {
			return place{}, 0, err
		}
		if next.from != first.from || next.from != nil && next.at != first.at+length {
			break
		}
		length += disk.BlockBytes
	}
	return first, min(length, most), nil
}

// find is the place of a block: in the topmost overlay that has it.
func (c *changes) find(block int64) (place, error) {
	for i := len(c.line) - 1; i >= 0; i-- {
		m := c.line[i]
		found, err := m.find(block)
		if err != nil {
			return place{}, err
		}
		in := block % m.clusterBlocks()
		switch bit := uint32(1) << in; {
		case found.zero&bit != 0:
			return place{}, nil
		case found.data&bit != 0:
			return place{m.file, found.at + in*disk.BlockBytes}, nil
		}
	}
	return place{c.base, block * disk.BlockBytes}, nil
}

// read fills p. What lies behind the end of a file is zero, for a guest too.
func (w place) read(p []byte) error {
	n := 0
	if w.from != nil {
		var err error
		if n, err = w.from.ReadAt(p, w.at); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	clear(p[n:])
	return nil
}
