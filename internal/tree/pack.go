package tree

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// namesAtOnce is how many names of a directory are in memory.
	namesAtOnce = 512
	// maxLinked and maxLinkedNames bound the files with several names that are
	// remembered, so that theirs stay links, and the bytes of those names. Others
	// become files of their own.
	maxLinked      = 1 << 16
	maxLinkedNames = 8 << 20
	// copyBuffer is the size of the one buffer that a copy uses, in bytes.
	copyBuffer = 128 << 10
)

// Pack writes the tree below a directory. Progress is given the content of the
// files as it goes. After an error the stream has no end, but says the error.
func Pack(ctx context.Context, w io.Writer, root *os.Root, progress io.Writer) (Report, error) {
	p := &packer{ctx: ctx, tar: tar.NewWriter(w), progress: orNobody(progress), links: map[inode]string{}, buf: make([]byte, copyBuffer)}
	err := p.directory(root, "", 0, 0)
	return p.report, finish(p.tar, p.report, err)
}

// Measure says what Pack would write.
func Measure(ctx context.Context, root *os.Root) (Report, error) {
	p := &packer{ctx: ctx, links: map[inode]string{}}
	err := p.directory(root, "", 0, 0)
	return p.report, err
}

type inode struct{ dev, ino uint64 }

type packer struct {
	ctx      context.Context // of the one call
	tar      *tar.Writer     // nil: only count
	progress io.Writer
	report   Report
	links    map[inode]string // the first name of each
	named    int              // bytes of these names
	buf      []byte
}

// directory packs a directory and all below it. dev is the device of the one above.
func (p *packer) directory(dir *os.Root, name string, dev uint64, depth int) error {
	if depth > MaxDepth {
		return at(name, tooDeep())
	}
	f, err := dir.Open(".")
	if err != nil {
		return at(name, err)
	}
	defer func() { _ = f.Close() }() // read only
	info, err := f.Stat()
	if err != nil {
		return at(name, err)
	}
	if own := idOf(info).dev; own != dev || depth == 0 {
		madeUp, err := fromKernel(f)
		if err != nil {
			return at(name, err)
		}
		if madeUp && depth == 0 {
			return invalid("the kernel makes up what is in it")
		}
		if madeUp {
			p.report.skip(name, 1)
			return nil
		}
		dev = own
	}
	if err := p.header(info, name, tar.TypeDir, ""); err != nil {
		return err
	}
	p.report.Directories++
	for {
		names, err := f.Readdirnames(namesAtOnce)
		for _, base := range names {
			if err := p.entry(dir, base, path.Join(name, base), dev, depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return at(name, err)
		}
	}
}

// entry packs what is in a directory. What has gone meanwhile was never there.
func (p *packer) entry(dir *os.Root, base, name string, dev uint64, depth int) error {
	if err := context.Cause(p.ctx); err != nil {
		return err
	}
	if strings.HasPrefix(base, TempNew) || strings.HasPrefix(base, TempReplace) {
		return nil
	}
	info, err := dir.Lstat(base)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return at(name, err)
	}
	switch mode := info.Mode(); {
	case mode.IsRegular():
		err = p.regular(dir, info, base, name)
	case mode.IsDir():
		err = p.below(dir, info, base, name, dev, depth)
	case mode&fs.ModeSymlink != 0:
		var to string
		if to, err = dir.Readlink(base); err == nil {
			p.report.Files++
			err = p.header(info, name, tar.TypeSymlink, to)
		}
	default:
		p.report.skip(name, 1)
	}
	if errors.Is(err, errGone) {
		return nil
	}
	return err
}

var errGone = errors.New("it has gone")

// opened says whether what was opened is what was looked at: a link may have taken
// its place.
func opened(name string, looked fs.FileInfo, now fs.FileInfo, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errGone
	case err != nil:
		return at(name, err)
	case !os.SameFile(looked, now):
		return at(name, conflict("it was replaced while it was read"))
	}
	return nil
}

func (p *packer) below(dir *os.Root, info fs.FileInfo, base, name string, dev uint64, depth int) error {
	sub, err := dir.OpenRoot(base)
	if err != nil {
		return opened(name, nil, nil, err)
	}
	defer func() { _ = sub.Close() }() // read only
	now, err := sub.Stat(".")
	if err := opened(name, info, now, err); err != nil {
		return err
	}
	return p.directory(sub, name, dev, depth+1)
}

func (p *packer) regular(dir *os.Root, info fs.FileInfo, base, name string) error {
	if first, ok := p.linked(info, name); ok {
		p.report.Files++
		return p.header(info, name, tar.TypeLink, first)
	}
	if p.tar == nil {
		p.report.Files++
		p.report.Bytes += info.Size()
		return nil
	}
	// O_NONBLOCK keeps a pipe that took the file's place from stopping us.
	f, err := dir.OpenFile(base, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return opened(name, nil, nil, err)
	}
	defer func() { _ = f.Close() }() // read only
	now, err := f.Stat()
	if err := opened(name, info, now, err); err != nil {
		return err
	}
	if err := p.header(now, name, tar.TypeReg, ""); err != nil {
		return err
	}
	p.report.Files++
	return p.content(f, name, now.Size())
}

// linked gives the first name of a file that has come already.
func (p *packer) linked(info fs.FileInfo, name string) (first string, ok bool) {
	st, isStat := info.Sys().(*syscall.Stat_t)
	if !isStat || st.Nlink < 2 {
		return "", false
	}
	id := idOf(info)
	if first, ok = p.links[id]; !ok && len(p.links) < maxLinked && p.named < maxLinkedNames {
		p.links[id] = name
		p.named += len(name)
	}
	return first, ok
}

// content copies as many bytes as the header has said. What a file that has become
// shorter lacks is filled up, so that the error can still be told behind it.
func (p *packer) content(f *os.File, name string, size int64) error {
	from := &source{r: io.LimitReader(f, size)}
	n, err := io.CopyBuffer(struct{ io.Writer }{p.tar}, io.TeeReader(from, p.progress), p.buf)
	p.report.Bytes += n
	switch {
	case err != nil && from.err == nil:
		return err // of the stream
	case n == size:
		return nil
	}
	if err == nil {
		err = conflict("it became shorter while it was read")
	}
	clear(p.buf)
	for n < size {
		if context.Cause(p.ctx) != nil {
			return context.Cause(p.ctx)
		}
		more, bad := p.tar.Write(p.buf[:min(size-n, copyBuffer)])
		if n += int64(more); bad != nil {
			return bad
		}
	}
	return at(name, err)
}

// header writes what an entry is.
func (p *packer) header(info fs.FileInfo, name string, kind byte, to string) error {
	if p.tar == nil {
		return nil
	}
	h := &tar.Header{
		Typeflag: kind, Name: name, Linkname: to, Mode: int64(info.Mode().Perm()), ModTime: info.ModTime(), Format: tar.FormatPAX,
	}
	switch kind {
	case tar.TypeDir:
		if name == "" {
			h.Name = "."
		}
		h.Name += "/"
	case tar.TypeReg:
		h.Size = info.Size()
	}
	if err := p.tar.WriteHeader(h); err != nil {
		return at(name, err)
	}
	return nil
}

func idOf(info fs.FileInfo) inode {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return inode{uint64(st.Dev), st.Ino}
	}
	return inode{}
}

// fromKernel knows the file systems whose files claim to be regular, and have no
// true size or no end.
func fromKernel(f *os.File) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return false, err
	}
	switch st.Type {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC,
		unix.DEVPTS_SUPER_MAGIC, unix.SECURITYFS_MAGIC, unix.BPF_FS_MAGIC, unix.EFIVARFS_MAGIC, unix.PSTOREFS_MAGIC:
		return true, nil
	}
	return false, nil
}
