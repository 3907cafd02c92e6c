package fuse

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Files is what is served. Its methods are called from many goroutines.
type Files interface {
	// Resolve is the node ID of a name, greater than 1 and always the same for the
	// same name; fs.ErrNotExist if there is no such file.
	Resolve(name string) (node uint64, size int64, err error)
	// Size is the size of a file.
	Size(node uint64) (int64, error)
	// ReadAt fills p with bytes of a file, all of it within the file's size.
	ReadAt(node uint64, p []byte, off int64) error
	// Forget says that the kernel has no more use for a file, for now.
	Forget(node uint64)
	// Failed is told what could not be served, and answered as an I/O error.
	Failed(node uint64, off int64, size int, err error)
}

// Serve answers requests until the file system is unmounted. First it answers
// what a server before it has taken and not answered. dev and slots stay open.
func Serve(dev, slots *os.File, files Files) (err error) {
	memory, err := mapSlots(slots)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, memory.unmap()) }()
	s := server{fd: int(dev.Fd()), files: files}
	var wg sync.WaitGroup
	errs := make([]error, Workers)
	for i := range Workers {
		wg.Go(func() { errs[i] = s.work(memory.slot(i)) })
	}
	wg.Wait()
	runtime.KeepAlive(dev)
	runtime.KeepAlive(slots) // the next holder takes it over from this process
	return errors.Join(errs...)
}

type server struct {
	fd    int
	files Files
}

// work answers one request after the other. The slot is emptied after each
// answer, so that at any instant it says what has to be answered yet.
func (s *server) work(slot []byte) error {
	data := make([]byte, maxPages*4096)
	if r, ok := taken(slot); ok {
		if err := s.handle(r, data); err != nil {
			return err
		}
	}
	for {
		empty(slot)
		n, err := read(s.fd, slot)
		if errors.Is(err, unix.ENODEV) {
			return nil // unmounted
		}
		if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		r, err := parseRequest(slot[:n])
		if err != nil {
			return err
		}
		if err := s.handle(r, data); err != nil {
			return err
		}
	}
}

// handle answers a request, if it wants an answer.
func (s *server) handle(r request, data []byte) error {
	var out []byte
	var errno unix.Errno
	switch r.opcode {
	case opForget:
		s.files.Forget(r.node)
		return nil
	case opBatchForget:
		s.forgetMany(r.body)
		return nil
	case opInterrupt: // nothing takes long enough
		return nil
	case opLookup:
		out, errno = s.lookup(r)
	case opGetattr:
		out, errno = s.getattr(r)
	case opRead:
		out, errno = s.read(r, data)
	case opOpen:
		// Without openNoFlush every close would wait for us: also the one in a
		// process that is just being forked, and its parent with it, which may be
		// the one who has to start us.
		out = openOut(openKeepCache | openNoFlush)
	case opOpendir:
		out = openOut(0)
	case opReaddir: // names are known, not listed
	case opStatfs:
		out = statfsOut()
	case opRelease, opReleasedir, opFsync, opDestroy:
	default:
		errno = unix.ENOSYS
	}
	return answer(s.fd, r.unique, errno, out)
}

func (s *server) lookup(r request) ([]byte, unix.Errno) {
	name := r.body
	for i, b := range name {
		if b == 0 {
			name = name[:i]
			break
		}
	}
	if r.node != rootID {
		return nil, unix.ENOTDIR
	}
	node, size, err := s.files.Resolve(string(name))
	if err != nil {
		return nil, s.failed(node, 0, 0, err)
	}
	return entryOut(node, size), 0
}

func (s *server) getattr(r request) ([]byte, unix.Errno) {
	if r.node == rootID {
		return attrOut(rootID, 0), 0
	}
	size, err := s.files.Size(r.node)
	if err != nil {
		return nil, s.failed(r.node, 0, 0, err)
	}
	return attrOut(r.node, size), 0
}

func (s *server) read(r request, data []byte) ([]byte, unix.Errno) {
	off, n, err := parseRead(r.body)
	if err != nil {
		return nil, unix.EINVAL
	}
	size, err := s.files.Size(r.node)
	if err != nil {
		return nil, s.failed(r.node, off, n, err)
	}
	p := data[:max(0, min(int64(n), size-off))]
	if err := s.files.ReadAt(r.node, p, off); err != nil {
		return nil, s.failed(r.node, off, n, err)
	}
	return p, 0
}

// failed turns an error into what the kernel is told.
func (s *server) failed(node uint64, off int64, n int, err error) unix.Errno {
	if errors.Is(err, fs.ErrNotExist) && n == 0 {
		return unix.ENOENT
	}
	s.files.Failed(node, off, n, err)
	return unix.EIO
}

// forgetMany reads a BATCH_FORGET: how many, four bytes of nothing, then node IDs
// with how often each had been looked up.
func (s *server) forgetMany(body []byte) {
	const headBytes, oneBytes = 8, 16
	if len(body) < headBytes {
		return
	}
	count := native.Uint32(body)
	for body = body[headBytes:]; count > 0 && len(body) >= oneBytes; count-- {
		s.files.Forget(native.Uint64(body))
		body = body[oneBytes:]
	}
}
