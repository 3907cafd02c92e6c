package qemu

import (
	"errors"
	"fmt"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// While no agent runs, nobody trims a VM's logs, and a guest could fill the file
// system that they are on at the speed of its serial port. So QEMU may write its
// files only so far (RLIMIT_FSIZE), and whoever holds the VM moves that limit on
// as it trims. QEMU takes a write past it as failed, and drops the byte; the VM
// runs on.
//
// The limit holds for every file of the process, and disks may be files too: so
// the logs begin at an offset that no disk reaches. A sparse file of that size is
// no trouble for any file system that Linux is run on.
const logBase = 4 << 40 // four times the largest disk of a sandbox

// spare is what may be written to each log while nobody looks after it. It is more
// than a guest prints between two looks.
func (d *Driver) spare() int64 { return 4 * d.config.ConsoleLimit }

// ignoreFileLimit makes a write past the limit an error instead of the signal
// that ends a process. A process that is started from here inherits that.
var ignoreFileLimit = sync.OnceFunc(func() { signal.Ignore(unix.SIGXFSZ) })

// tendLogs bounds the logs, and says once when it cannot.
func (m *machine) tendLogs() {
	err := m.boundLogs()
	if err == nil || m.complained || m.pid.Exited() {
		return
	}
	m.complained = true
	m.driver.config.Log.Warn("the logs of a vm are not bounded while no server is up", "sandbox", m.record.ID, "err", err)
}

// boundLogs trims the logs and lets QEMU write spare() more to each.
func (m *machine) boundLogs() error {
	errs := []error{m.console.trim(), m.log.trim()}
	if m.console.base == 0 || m.log.base == 0 {
		return errors.Join(errs...) // by an earlier version: its disk lies where its logs do
	}
	console, err := m.console.end()
	log, err2 := m.log.end()
	if err := errors.Join(err, err2); err != nil {
		return errors.Join(append(errs, err)...)
	}
	end, spare := max(console, log), m.driver.spare()
	if end == m.logsEnd {
		return errors.Join(errs...)
	}
	// One limit for both: the log that lags could be filled up to it.
	errs = append(errs, m.console.bringForward(end-spare), m.log.bringForward(end-spare))
	if err := limitFiles(m.pid.PID(), end+spare); err != nil {
		return errors.Join(append(errs, err)...)
	}
	m.logsEnd = end
	return errors.Join(errs...)
}

// limitFiles sets how far a process may write into a file. Only what a guest can
// do is bounded: the hard limit stays, for a process of another user needs a
// privilege to have it moved.
func limitFiles(pid int, size int64) error {
	var limit unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, nil, &limit); err != nil {
		return fmt.Errorf("read the file size limit of pid %d: %w", pid, err)
	}
	limit.Cur = min(uint64(size), limit.Max)
	if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, &limit, nil); err != nil {
		return fmt.Errorf("limit the file size of pid %d: %w", pid, err)
	}
	return nil
}
