package kernel

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cldExited is CLD_EXITED: si_status is an exit code, otherwise a signal.
const cldExited = 1

// sigchld is the part of siginfo_t that waitid fills in on 64-bit Linux
// (include/uapi/asm-generic/siginfo.h): the union begins at byte 16.
type sigchld struct {
	signo, errno, code, _ int32
	pid                   int32
	uid                   uint32
	status                int32
}

func statusOf(info *unix.Siginfo) Status {
	c := (*sigchld)(unsafe.Pointer(info))
	if c.pid == 0 { // WNOHANG found nothing: it still runs
		return Status{}
	}
	if c.code == cldExited {
		return Status{Known: true, Code: int(c.status)}
	}
	return Status{Known: true, Signal: syscall.Signal(c.status)}
}
