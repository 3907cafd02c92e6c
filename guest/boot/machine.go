package boot

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi"
	"github.com/dormouse-sandbox/dormouse/guest/past"
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

// SetHostname renames the machine, now and in its files. One that has the name keeps
// its files as they are.
func (s *System) SetHostname(name string) error {
	var is unix.Utsname
	if err := unix.Uname(&is); err == nil && unix.ByteSliceToString(is.Nodename[:]) == name {
		return nil
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return err
	}
	if err := writeHostname("/etc", name); err != nil {
		fmt.Fprintf(os.Stderr, "dormouse-guest: names: %v\n", err) // a read-only /etc is tolerated
	}
	return nil
}

// EndPast ends what ties a machine that was restored to the time before. What it has
// learned of its wire stays true: only the gateway is there, with one address everywhere.
func (s *System) EndPast() (dropped int, err error) {
	return past.EndConnections(guestapi.Port) // the agent ends its own
}

// Life is the serial number of the root disk: the disk is asked for it each time,
// and each start and each restore of a machine gives it another one.
func (s *System) Life() (string, error) {
	serial, err := os.ReadFile(filepath.Join("/sys/class/block", filepath.Base(s.Boot.RootDevice), "serial"))
	return strings.TrimSpace(string(serial)), err
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
