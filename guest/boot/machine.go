package boot

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxFiles is the limit of open files, in a guest whose kernel's default (4096)
// is too small for databases and build tools.
const (
	softFiles = 65536
	hardFiles = 1048576
)

// raiseLimits goes through package syscall, which else gives children the limit
// that the agent itself was started with.
func raiseLimits() error {
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: softFiles, Max: hardFiles})
}

// SetClock steps the wall clock.
func (s *System) SetClock(at time.Time) error {
	ts, err := unix.TimeToTimespec(at)
	if err != nil {
		return err
	}
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// SetHostname renames the machine, now and in its files.
func (s *System) SetHostname(name string) error {
	if err := unix.Sethostname([]byte(name)); err != nil {
		return err
	}
	if err := writeHostname("/etc", name); err != nil {
		fmt.Fprintf(os.Stderr, "dormouse-guest: names: %v\n", err) // a read-only /etc is tolerated
	}
	return nil
}

// Of linux/random.h.
const (
	rndAddEntropy  = 0x40085203 // _IOW('R', 0x03, int[2])
	rndReseedCRNG  = 0x5207     // _IO('R', 0x07), Linux 4.14
	maxEntropy     = 4096       // bytes
	bitsPerByte    = 8
	entropyHeaders = 8 // two int: bits of entropy, bytes that follow
)

// AddEntropy mixes secret bytes of the host into the kernel's pool, credits
// them in full, and makes the generator start from them at once: two copies of
// one snapshot part here.
func (s *System) AddEntropy(data []byte) error {
	if len(data) > maxEntropy {
		return fmt.Errorf("%d bytes of entropy, %d is the bound", len(data), maxEntropy)
	}
	f, err := os.OpenFile("/dev/urandom", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // a device
	buf := binary.NativeEndian.AppendUint32(nil, uint32(len(data)*bitsPerByte))
	buf = binary.NativeEndian.AppendUint32(buf, uint32(len(data)))
	buf = append(buf, data...)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndAddEntropy, uintptr(unsafe.Pointer(&buf[0]))); errno != 0 {
		return fmt.Errorf("RNDADDENTROPY: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("RNDRESEEDCRNG: %w", errno)
	}
	return nil
}

// PowerOff ends all user processes, writes everything to the disk and switches
// the machine off. It returns only if the kernel refuses.
func PowerOff(userCgroup string) error {
	if userCgroup != "" {
		_ = os.WriteFile(filepath.Join(userCgroup, "cgroup.kill"), []byte("1"), 0) // Linux 5.14; the sync below is what counts
	}
	unix.Sync()
	return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}
