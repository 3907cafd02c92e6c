package exec

import (
	"os"

	"golang.org/x/sys/unix"

	processv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/process"
	"github.com/dormouse-sandbox/dormouse/internal/kernel"
)

// streams are what connects a command with us: three pipes, or a terminal.
type streams struct {
	child  [3]*os.File // the command's standard streams; one file thrice for a terminal
	input  *os.File    // nil when the command reads /dev/null
	output []output
	tty    *terminal // nil for pipes
}

// output is one of our ends that is read.
type output struct {
	f *os.File
	// full is how much of what waits, in bytes, is a good piece to read.
	full int
	// unseen is how much more than it says it holds can wait in it, in bytes.
	unseen int
	event  func(chunk []byte) *processv1.ProcessEvent_DataEvent
}

func openPipes(stdin bool) (*streams, error) {
	s := &streams{}
	var err error
	if stdin {
		s.child[0], s.input, err = os.Pipe()
	} else {
		s.child[0], err = os.Open(os.DevNull)
	}
	for i, event := range []func([]byte) *processv1.ProcessEvent_DataEvent{stdoutEvent, stderrEvent} {
		if err != nil {
			break
		}
		var ours *os.File
		if ours, s.child[i+1], err = os.Pipe(); err == nil {
			widen(ours)
			s.output = append(s.output, output{f: ours, full: maxChunk / 2, event: event})
		}
	}
	return s, err
}

// widen makes a pipe hold more than its 64 KiB, so that a busy command and the
// agent take turns less often. The kernel may refuse: it is only faster.
func widen(f *os.File) {
	_ = kernel.WithFD(f, func(fd int) error {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, maxChunk)
		return err
	})
}

// give makes the command's user the owner of its streams: a script that opens
// /dev/stderr opens the pipe anew, and is asked whether it may. A terminal keeps
// its group, tty.
func (s *streams) give(uid, gid int) error {
	if s.tty != nil {
		return s.tty.slave.Chown(uid, -1)
	}
	for i, f := range s.child {
		if i == 0 && s.input == nil {
			continue // /dev/null
		}
		if err := f.Chown(uid, gid); err != nil {
			return err
		}
	}
	return nil
}

// forked closes the command's ends, so that ours see it when it closes its. That
// of a terminal stays open for as long as the command lives.
func (s *streams) forked() {
	if s.tty != nil {
		return
	}
	for _, f := range s.child {
		_ = f.Close() // the command has its own
	}
}

// ended makes those who read look whether the command has ended.
func (s *streams) ended() {
	if s.tty != nil {
		_ = s.tty.slave.Close() // a terminal has nothing to flush
	}
	for _, o := range s.output {
		_ = o.f.SetReadDeadline(past) // closed already: its pump has ended
	}
}

// close closes both ends, after a start that failed.
func (s *streams) close() {
	for _, f := range s.child {
		_ = f.Close() // closed or nil is fine: nothing was written
	}
	_ = s.input.Close() // likewise
	for _, o := range s.output {
		_ = o.f.Close() // likewise
	}
}

func stdoutEvent(chunk []byte) *processv1.ProcessEvent_DataEvent {
	return &processv1.ProcessEvent_DataEvent{Output: &processv1.ProcessEvent_DataEvent_Stdout{Stdout: chunk}}
}

func stderrEvent(chunk []byte) *processv1.ProcessEvent_DataEvent {
	return &processv1.ProcessEvent_DataEvent{Output: &processv1.ProcessEvent_DataEvent_Stderr{Stderr: chunk}}
}
