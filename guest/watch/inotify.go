package watch

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/internal/kernel"
)

// One instance of the kernel's inotify. Only one goroutine reads it.
type inotify struct {
	f   *os.File
	buf []byte

	queue []raw // read and not handled
	total int64 // bytes that were read in all
	done  int64 // and of those, how many belong to events that were handled
}

// raw is an event as the kernel tells it.
type raw struct {
	wd     int32
	mask   uint32
	cookie uint32
	name   string
	end    int64 // where in the stream of all bytes it ends
}

// readBytes is how much is read at once, in bytes.
const readBytes = 32 << 10

func openInotify() (*inotify, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
		return nil, ErrLimit
	}
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	return &inotify{f: os.NewFile(uintptr(fd), "inotify")}, nil
}

func (n *inotify) close() error { return n.f.Close() }

// add watches a directory. Of one that is watched already it gives the number that
// it has.
func (n *inotify) add(path string, mask uint32) (wd int32, err error) {
	err = kernel.WithFD(n.f, func(fd int) error {
		got, err := unix.InotifyAddWatch(fd, path, mask)
		wd = int32(got)
		return err
	})
	if errors.Is(err, unix.ENOSPC) {
		return 0, fmt.Errorf("watch %s: %w", path, ErrLimit)
	}
	if err != nil {
		return 0, &os.PathError{Op: "watch", Path: path, Err: err}
	}
	return wd, nil
}

// remove ends the watch of a directory. Its events that wait are still told.
func (n *inotify) remove(wd int32) {
	_ = kernel.WithFD(n.f, func(fd int) error { // the kernel may have ended it already
		_, err := unix.InotifyRmWatch(fd, uint32(wd))
		return err
	})
}

// mark is a place in the stream of events: what the kernel knows now comes before
// it, what happens from now on behind it.
func (n *inotify) mark() (int64, error) {
	waits := 0
	err := kernel.WithFD(n.f, func(fd int) (err error) {
		waits, err = unix.IoctlGetInt(fd, unix.TIOCINQ)
		return err
	})
	return n.total + int64(waits), err
}

// passed reports whether all events before a mark were handled.
func (n *inotify) passed(mark int64) bool { return n.done >= mark }

// next waits for an event, until a deadline if there is one.
func (n *inotify) next(deadline time.Time) (raw, error) {
	for len(n.queue) == 0 {
		if err := n.fill(deadline); err != nil {
			return raw{}, err
		}
	}
	e := n.queue[0]
	n.queue = n.queue[1:]
	return e, nil
}

// handled says that the work for an event is done.
func (n *inotify) handled(e raw) { n.done = e.end }

// find looks for an event among those that wait, and, until a deadline, among
// those to come.
func (n *inotify) find(deadline time.Time, match func(raw) bool) (raw, bool) {
	for looked := 0; ; {
		for ; looked < len(n.queue); looked++ {
			if match(n.queue[looked]) {
				return n.queue[looked], true
			}
		}
		if n.fill(deadline) != nil { // next says what is wrong, if it is not the time
			return raw{}, false
		}
	}
}

// fill reads what there is, and waits for it until a deadline.
func (n *inotify) fill(deadline time.Time) error {
	if err := n.f.SetReadDeadline(deadline); err != nil {
		return err
	}
	if n.buf == nil {
		n.buf = make([]byte, readBytes)
	}
	got, err := n.f.Read(n.buf)
	if err != nil {
		return err
	}
	return n.parse(n.buf[:got])
}

func (n *inotify) parse(data []byte) error {
	for len(data) > 0 {
		if len(data) < unix.SizeofInotifyEvent {
			return fmt.Errorf("inotify: %w", io.ErrUnexpectedEOF)
		}
		head := (*unix.InotifyEvent)(unsafe.Pointer(&data[0]))
		size := unix.SizeofInotifyEvent + int(head.Len)
		if len(data) < size {
			return fmt.Errorf("inotify: %w", io.ErrUnexpectedEOF)
		}
		n.total += int64(size)
		n.queue = append(n.queue, raw{
			wd: head.Wd, mask: head.Mask, cookie: head.Cookie,
			name: unix.ByteSliceToString(data[unix.SizeofInotifyEvent:size]), end: n.total,
		})
		data = data[size:]
	}
	return nil
}
