package exec

import (
	"errors"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
)

// A process that writes much in small pieces would cost a message for each. So
// output that follows other output closely is left in the pipe for as long as
// the process goes on filling it, within bounds. The first piece after a pause
// is not.
const (
	burstGap  = 2 * time.Millisecond
	burstNap  = time.Millisecond
	burstNaps = 10
)

// pump delivers what the process writes until there can be no more, or until the
// process has exited and linger has had enough. What comes after that is discarded.
func (p *process) pump(o output) {
	after := linger{unseen: o.unseen}
	var delivered time.Time
	for {
		if time.Since(delivered) < burstGap {
			p.letFill(o)
		}
		chunk, err := readChunk(o.f)
		if len(chunk) > 0 {
			p.deliver(&processv1.ProcessEvent{Event: &processv1.ProcessEvent_Data{Data: o.event(chunk)}})
			delivered = time.Now()
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			_ = o.f.Close() // the end of the pipe, or everybody has hung up: nothing more can come
			return
		}
		if p.ended() && after.over(o.f, len(chunk)) {
			go discard(o.f)
			return
		}
	}
}

// letFill waits while a pipe fills, until it holds a good piece.
func (p *process) letFill(o output) {
	for naps, before := 0, -1; naps < burstNaps && !p.ended(); naps++ {
		now := waiting(o.f)
		if now >= o.full || now == before {
			return
		}
		before = now
		time.Sleep(burstNap)
	}
}

// readChunk reads once, into a buffer that is only made when there is something
// to read: an idle process holds none.
func readChunk(f *os.File) ([]byte, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var chunk []byte
	var readErr error
	err = conn.Read(func(fd uintptr) bool {
		buf := make([]byte, max(1, min(pending(int(fd)), maxChunk)))
		n, err := ignoringEINTR(func() (int, error) { return unix.Read(int(fd), buf) })
		switch {
		case errors.Is(err, unix.EAGAIN):
			return false
		case err != nil:
			readErr = err
		case n == 0:
			readErr = io.EOF
		default:
			chunk = buf[:n]
		}
		return true
	})
	return chunk, errors.Join(err, readErr)
}

func ignoringEINTR(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// pending is how many bytes wait in a pipe.
func pending(fd int) int {
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	if err != nil {
		return 0
	}
	return n
}

// waiting is pending for a file.
func waiting(f *os.File) (n int) {
	_ = kernel.WithFD(f, func(fd int) error { n = pending(fd); return nil }) // closed: nothing waits
	return n
}

// linger decides how long a pipe is read after its process has exited while
// somebody else still holds the other end. What the process itself wrote is in
// the pipe by then: these bytes are owed, however slow the reader is.
type linger struct {
	unseen int // bytes that may wait beside those that the kernel counts
	until  time.Time
	owed   int
}

// over is asked after every read, with what it gave. It sets the deadline of
// the next one.
func (l *linger) over(f *os.File, got int) bool {
	left := waiting(f)
	now := time.Now()
	switch {
	case l.until.IsZero():
		l.until, l.owed = now.Add(lingerMax), left+l.unseen
	case got == 0 && left == 0:
		return true // silence
	default:
		l.owed -= got
	}
	next := now.Add(lingerQuiet)
	if l.owed <= 0 {
		if !now.Before(l.until) {
			return true
		}
		if next.After(l.until) {
			next = l.until
		}
	}
	_ = f.SetReadDeadline(next) // a pipe has deadlines
	return false
}

// discard keeps a pipe open and empty for those who still write to it.
func discard(f *os.File) {
	_ = f.SetReadDeadline(time.Time{}) // a pipe has deadlines
	for {
		if _, err := readChunk(f); err != nil {
			_ = f.Close() // read only
			return
		}
	}
}
