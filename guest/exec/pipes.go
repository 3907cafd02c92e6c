package exec

import (
	"os"

	"golang.org/x/sys/unix"
)

// pipes are the three standard streams: the child's ends and ours.
type pipes struct {
	theirs, ours [3]*os.File // ours[0] is nil when the child reads /dev/null
}

func openPipes(stdin bool) (*pipes, error) {
	p := &pipes{}
	var err error
	if stdin {
		p.theirs[0], p.ours[0], err = os.Pipe()
	} else {
		p.theirs[0], err = os.Open(os.DevNull)
	}
	for i := 1; i <= 2 && err == nil; i++ {
		p.ours[i], p.theirs[i], err = os.Pipe()
		if err == nil {
			widen(p.ours[i])
		}
	}
	return p, err
}

// widen makes a pipe hold more than its 64 KiB, so that a busy command and the
// agent take turns less often. The kernel may refuse: it is only faster.
func widen(f *os.File) {
	if conn, err := f.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, maxChunk) })
	}
}

// give makes the command's user the owner of its streams: a script that opens
// /dev/stderr opens the pipe anew, and is asked whether it may.
func (p *pipes) give(uid, gid int) error {
	for i, f := range p.theirs {
		if p.ours[i] == nil {
			continue // /dev/null
		}
		if err := f.Chown(uid, gid); err != nil {
			return err
		}
	}
	return nil
}

// forked closes the child's ends, so that ours see it when the child closes its.
func (p *pipes) forked() {
	for _, f := range p.theirs {
		_ = f.Close() // the child has its own
	}
}

// close closes both, after a start that failed.
func (p *pipes) close() {
	for i := range p.theirs {
		_ = p.theirs[i].Close() // closed or nil is fine: nothing was written
		_ = p.ours[i].Close()   // likewise
	}
}
